"""plot_run.py draws the logs of several runs into one figure."""

import json

from helpers import call_main, expect_error

from plot_run import PANELS, draw, read_rows


def write_log(folder, rows) -> None:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, **values) -> dict:
    return {"step": step, "loss": 1 / step, "grad_norm": 1.0, "images_per_sec": 9.0, **values}


def test_plotted_runs_share_the_curve_panels_and_the_colour_scale_of_load_maps(tmp_path):
    low, high, dense = (tmp_path / name for name in ("a/run-0", "b/run-0", "dense-0"))
    write_log(low, [row(s, expert_load=[1.5, 2.0], val_loss=0.5) for s in (1, 5, 9)])
    write_log(high, [row(s, expert_load=[2.0, 4.0]) for s in (1, 5)])
    write_log(dense, [row(1), row(5, loss="nan"), row(9)])
    (high / "config.yaml").write_text("{}\n---\nsparse_blocks: [3, 5]\n")
    call_main("plot_run.py", low, high, dense)
    assert [path.name for path in tmp_path.glob("**/*.png")] == ["runs.png"]
    axes = draw({run: read_rows(run) for run in (low, high, dense)}).axes
    assert [axis.get_title() for axis in axes[:4]] == list(PANELS.values())[:4]
    assert [line.get_label() for line in axes[1].lines] == ["a/run", "b/run", "dense"]
    assert list(axes[0].lines[-2].get_xdata()) == [1, 9]  # dense, without the step with NaN
    maps = [axis.collections[0] for axis in axes[4:6]]
    assert maps[0].get_clim() == maps[1].get_clim() and maps[0].get_clim()[1] > 2
    assert axes[4].get_xlim() == axes[5].get_xlim() == axes[0].get_xlim() == (1, 9)
    layers = [axis.yaxis.get_major_formatter()(1) for axis in axes[4:6]]
    assert layers == ["1", "5"]  # numbers of blocks, where config.yaml says them
    assert len(draw({dense: read_rows(dense)}).axes) == 3


def test_the_range_of_the_loss_is_that_of_its_tail_and_the_last_values_are_printed(
    tmp_path, capsys
):
    for run, end in (("a", 0.30), ("b", 0.31)):
        rows = [row(s, loss=9.0 if s < 10 else end, dead_experts=s // 50) for s in range(1, 101)]
        write_log(tmp_path / run, rows)
    call_main("plot_run.py", tmp_path / "a", tmp_path / "b")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a: step 100  loss 0.3  grad_norm 1  images_per_sec 9  dead_experts 2"
    figure = draw({run: read_rows(run) for run in (tmp_path / "a", tmp_path / "b")})
    low, high = figure.axes[0].get_ylim()
    assert 0.29 < low < 0.3 and 0.31 < high < 0.32
    dead = figure.axes[-1]
    assert dead.get_title() == PANELS["dead_experts"]
    assert all(tick == int(tick) for tick in dead.get_yticks())  # experts are counted


def test_the_loss_that_falls_is_drawn(tmp_path):
    """The weighted loss of a mean flow is 1, whatever the error."""
    errors = {1: 0.9, 5: 0.5, 9: 0.3}
    write_log(
        tmp_path / "mean", [row(s) | {"loss": 1 - s / 1e6, "mse": e} for s, e in errors.items()]
    )
    write_log(tmp_path / "plain", [row(s, mse=2 / s) for s in (1, 5, 9)])
    figure = draw({run: read_rows(run) for run in sorted(tmp_path.iterdir())})
    mean, plain = (line for line in figure.axes[0].lines if len(line.get_xdata()))
    assert list(mean.get_ydata()) == list(errors.values())
    assert list(plain.get_ydata()) == [1, 1 / 5, 1 / 9]
    assert "mean (mse)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_missing_or_damaged_log_is_a_one_line_error_of_plot_run(tmp_path, capsys):
    assert "log.jsonl" in expect_error(capsys, "plot_run.py", tmp_path)
    for line in ('{"step": 2, "lo', "[1]", '{"loss": 1}', '{"step": "x"}'):
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line)
        assert "log.jsonl, line 2" in expect_error(capsys, "plot_run.py", tmp_path)
