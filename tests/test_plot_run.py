"""plot_run.py: one picture of the logs of several runs."""

import json

from conftest import call_main, expect_error
from PIL import Image


def write_log(folder, rows) -> None:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, **values) -> dict:
    return {"step": step, "loss": 1 / step, "grad_norm": 1.0, "images_per_sec": 9.0, **values}


def test_sparse_and_dense_runs_share_one_picture(tmp_path):
    sparse = [row(s, expert_load=[1.5, 2.0], val_loss=0.5, val_bins=[0.5] * 10) for s in (1, 5, 9)]
    write_log(tmp_path / "sparse", sparse)
    write_log(tmp_path / "dense", [row(1), row(5, loss="nan"), row(9)])
    call_main("plot_run.py", tmp_path / "sparse", tmp_path / "dense")
    width, height = Image.open(tmp_path / "sparse" / "run.png").size
    assert width > 1000 and height > 500
    call_main("plot_run.py", tmp_path / "dense", "--output", tmp_path / "dense.png")
    assert Image.open(tmp_path / "dense.png").size[1] < height


def test_a_folder_without_a_log_is_one_line(tmp_path, capsys):
    assert "log.jsonl" in expect_error(capsys, "plot_run.py", tmp_path)
