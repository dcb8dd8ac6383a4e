"""Routing analysis: the recorder, the count tables, the statistics, the figures and the scripts."""

import csv
import gc
import json
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, call_main, expect_error, run_script
from matplotlib.image import imread

import analysis.counts as counts_module
import expert_data
import heatmap_class
import heatmap_patch
import heatmap_timestep
from analysis.counts import RoutingCounts, Settings
from analysis.recorder import RoutingRecorder
from analysis.statistics import (
    layer_statistics,
    load_entropy,
    max_over_mean_load,
    mutual_information,
    row_information,
    similarity_order,
)
from checkpoints import Record, save_model
from models import DiT
from runtime.errors import UserError
from sampling.generate import generate

STEPS, TOKENS, K = 3, 16, 2
CLASS_NAMES = [f"class {label}" for label in range(10)]


def random_model(seed: int = 0, **overrides) -> DiT:
    """A tiny DiT whose routing depends on class, time and position: no weight is left at zero."""
    torch.manual_seed(seed)
    model = DiT(**{**TINY_MODEL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def record(model: DiT, batches: list[list[int]], **options) -> RoutingRecorder:
    """Samples images of the labels in each batch under a recorder."""
    options = dict(objective="rectified_flow", num_steps=STEPS, cfg_scale=2.0) | options
    seeds = iter(range(1000))
    with RoutingRecorder(model, options["num_steps"]) as recorder:
        for labels in batches:
            recorder.start_batch(labels)
            generate(
                model, labels, [next(seeds) for _ in labels], callback=recorder.end_step, **options
            )
    return recorder


def tables(recorder: RoutingRecorder) -> list[np.ndarray]:
    return [t.numpy() for t in (recorder.by_class, recorder.by_step, recorder.by_position)]


# The recorder


@pytest.mark.parametrize("objective", ["rectified_flow", "gaussian"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_recorder_counts_what_a_brute_force_count_of_the_logits_gives(objective, cfg_scale):
    model = random_model()
    labels = [3, 7, 3]
    logits = []  # of every step and layer
    hooks = [
        block.moe.gate.register_forward_hook(
            lambda gate, x, out: logits.append(gate.score(x[0].flatten(0, 1)))
        )
        for block in model.blocks
    ]
    options = dict(objective=objective, cfg_scale=cfg_scale, num_steps=STEPS)
    by_class, by_step, by_position = tables(record(model, [labels], **options))
    for hook in hooks:
        hook.remove()

    expected = [np.zeros_like(table) for table in (by_class, by_step, by_position)]
    for call, rows in enumerate(logits):
        step, layer = divmod(call, len(model.blocks))
        assert len(rows) == (1 if cfg_scale == 1 else 2) * len(labels) * TOKENS
        for row in range(len(labels) * TOKENS):
            for expert in rows[row].argsort(descending=True)[:K].tolist():
                expected[0][layer, labels[row // TOKENS], expert] += 1
                expected[1][layer, step, expert] += 1
                expected[2][layer, row % TOKENS, expert] += 1
    for got, want in zip((by_class, by_step, by_position), expected, strict=True):
        assert np.array_equal(got, want)


def test_every_table_counts_every_assignment():
    counts = [0] * 10
    for label in [0, 1, 2, 2, 9]:
        counts[label] += STEPS * TOKENS * K
    by_class, by_step, by_position = tables(record(random_model(), [[0, 1, 2], [2, 9]]))
    assert (by_class.sum(-1) == counts).all()
    assert (by_step.sum(-1) == 5 * TOKENS * K).all()
    assert (by_position.sum(-1) == 5 * STEPS * K).all()
    assert np.array_equal(by_class.sum(1), by_step.sum(1))
    assert np.array_equal(by_class.sum(1), by_position.sum(1))


def test_counts_do_not_depend_on_the_batches():
    model = random_model()
    together, apart = record(model, [[1, 2, 3, 4]]), record(model, [[1], [2, 3], [4]])
    for one, other in zip(tables(together), tables(apart), strict=True):
        assert np.array_equal(one, other)


def test_unconditional_half_is_not_counted():
    model, labels = random_model(), [4, 5]
    x, t = torch.randn(4, 4, 8, 8), torch.rand(4)
    counts = []
    for y in ([4, 5], [4, 5, 10, 10], [4, 5, 0, 1]):
        with RoutingRecorder(model, num_steps=1) as recorder:
            recorder.start_batch(labels)
            model(x[: len(y)], t[: len(y)], torch.tensor(y))
        counts.append(tables(recorder))
    for other in counts[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(counts[0], other, strict=True))


def test_recorder_notes_the_time_of_each_step():
    model = random_model()
    flow = record(model, [[0], [1]], num_steps=4)
    assert flow.times.tolist() == [1, 0.75, 0.5, 0.25]
    gaussian = record(model, [[0]], objective="gaussian", num_steps=2)
    assert gaussian.times.tolist() == [999, 0]


def hooks_of(model: DiT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recorder_leaves_nothing_behind_also_after_an_exception():
    model = random_model()
    names, before = set(vars(model.blocks[0])), hooks_of(model)
    x, t, y = torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0])
    want = model(x, t, y)[0]
    with pytest.raises(KeyboardInterrupt), RoutingRecorder(model, 1) as recorder:
        recorder.start_batch([0])
        assert hooks_of(model) == before + len(model.blocks)
        assert torch.equal(model(x, t, y)[0], want)
        raise KeyboardInterrupt
    assert hooks_of(model) == before
    assert set(vars(model.blocks[0])) == names
    counted = recorder.by_class.clone()
    model(x, t, y)
    assert torch.equal(recorder.by_class, counted)


def test_recorder_refuses_what_it_cannot_attribute():
    model = random_model()
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    with RoutingRecorder(model, 1) as recorder:
        with pytest.raises(RuntimeError, match="start_batch"):
            model(x, t, y)
        recorder.start_batch([0, 1])
        with pytest.raises(RuntimeError, match="got 3 images, expected 2"):
            model(x, t, y)


@pytest.mark.parametrize("compiled_before", [True, False])
def test_recorder_counts_compiled_blocks(compiled_before):
    model, compiled = random_model(), random_model()
    for block in compiled.blocks:
        block.compile(backend="eager")
    if compiled_before:
        generate(compiled, [1], [0], objective="rectified_flow", num_steps=2)
    steps = 12  # more than the graphs that torch.compile would build for one function
    want = record(model, [[1, 2]], num_steps=steps)
    got = record(compiled, [[1, 2]], num_steps=steps)
    for one, other in zip(tables(want), tables(got), strict=True):
        assert np.array_equal(one, other)


def test_memory_does_not_grow_with_the_number_of_images():
    model = random_model()

    def live_bytes(num_batches: int) -> tuple[int, int]:
        recorder = record(model, [[0, 1]] * num_batches, num_steps=2)
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        held = sum(v.nbytes for v in vars(recorder).values() if isinstance(v, torch.Tensor))
        return held, len(tensors)

    live_bytes(1)
    assert live_bytes(1) == live_bytes(8)


def test_tables_of_imagenet_are_small():
    with torch.device("meta"):
        model = DiT(depth=12, hidden_size=384, num_heads=6, num_experts=8)
    recorder = RoutingRecorder(model, num_steps=250)
    held = sum(v.nbytes for v in vars(recorder).values() if isinstance(v, torch.Tensor))
    assert held < 2e6


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs a GPU on which PyTorch's grouped product is fused",
)
def test_recorder_never_waits_for_the_gpu():
    model = random_model().cuda().bfloat16()
    want = record(model, [[1, 2]])
    x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.rand(2, device="cuda")
    y = torch.tensor([1, 2], device="cuda")
    with RoutingRecorder(model, num_steps=2) as recorder:
        recorder.start_batch([1, 2])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2):
                model(x, t, y)
                recorder.end_step({"step": step, "t": t})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert want.by_class.is_cuda
    assert (recorder.by_step.sum(-1) == 2 * TOKENS * K).all()


# Statistics


def test_uniform_choice_has_full_entropy_and_no_information():
    table = np.full((10, 3, 8), 5)
    assert np.allclose(load_entropy(table), 3)
    assert np.allclose(max_over_mean_load(table), 1)
    assert np.allclose(mutual_information(table), 0)


def test_one_expert_for_each_class_is_full_information():
    table = 7 * np.eye(8, dtype=int)[:, None, :]  # (8, 1, 8)
    assert np.allclose(load_entropy(table), 3)
    assert np.allclose(mutual_information(table), 3)
    assert np.allclose(row_information(table), 3)


def test_one_expert_for_all_has_no_entropy_and_no_information():
    table = np.zeros((4, 1, 8), int)
    table[:, :, 2] = 9
    assert load_entropy(table) == 0
    assert max_over_mean_load(table) == 8
    assert mutual_information(table) == 0


def test_information_is_entropy_less_conditional_entropy():
    table = np.array([[[3, 1]], [[1, 3]]])
    binary = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert np.allclose(mutual_information(table), 1 - binary)
    lopsided = np.array([[[30, 10]], [[1, 3]]])  # rows of different weight
    p = lopsided[:, 0] / lopsided.sum()
    direct = (p * np.log2(p / (p.sum(0) * p.sum(1, keepdims=True)))).sum()
    assert np.allclose(mutual_information(lopsided), direct)


def test_plug_in_bias_is_of_the_size_that_the_docstring_says():
    rows, experts, n = 10, 8, 4000
    drawn = np.random.default_rng(0).multinomial(n // rows, [1 / experts] * experts, (200, rows))
    mean = mutual_information(drawn.transpose(1, 0, 2)).mean()  # the 200 trials as layers
    assert np.isclose(mean, (rows - 1) * (experts - 1) / (2 * n * np.log(2)), rtol=0.05)


def test_similarity_order_puts_like_next_to_like():
    table = np.array([[[9, 1]], [[1, 9]], [[8, 2]], [[2, 8]]])
    order = similarity_order(table).tolist()
    assert order in ([0, 2, 3, 1], [1, 3, 2, 0])


def test_statistics_name_layers_and_what_the_rows_are():
    rows = layer_statistics(np.full((10, 3, 8), 5), "class", layers=[0, 2])
    assert [row["layer"] for row in rows] == [0, 2]
    assert rows[0]["max_load_entropy_bits"] == 3
    assert rows[0]["class_information_bits"] == 0


# The file


def random_counts(
    num_layers=2, num_experts=4, num_classes=5, num_steps=3, grid_size=2, seed=0
) -> RoutingCounts:
    """Counts of random choices: class and step and position of each token, and two experts."""
    rng = np.random.default_rng(seed)
    positions = grid_size**2
    shape = (num_classes, num_steps, positions, num_layers, num_experts)
    scores = rng.random(shape) + np.linspace(0, 1, num_classes)[:, None, None, None, None] ** 2
    scores = scores + rng.random(shape[3:])
    best = np.argsort(-scores, axis=-1)[..., :K]
    chosen = np.zeros(shape, np.int64)
    np.put_along_axis(chosen, best, 1, axis=-1)
    settings = Settings(
        "DiT-T/2", "gaussian", "ddpm", num_steps, 1.5, 0, 1, grid_size, num_experts, K
    )
    return RoutingCounts(
        by_class=chosen.sum((1, 2)),
        by_step=chosen.sum((0, 2)),
        by_position=chosen.sum((0, 1)),
        labels=np.arange(num_classes),
        class_names=np.array([f"class ${label}_" for label in range(num_classes)]),
        times=np.linspace(999, 0, num_steps),
        settings=settings,
    )


def test_counts_come_back_from_the_file_as_they_were(tmp_path):
    counts = random_counts()
    counts.save(tmp_path / "counts.npz")
    loaded = RoutingCounts.load(tmp_path / "counts.npz")
    assert loaded.settings == counts.settings
    for name in ("by_class", "by_step", "by_position", "labels", "class_names", "times"):
        got, want = getattr(loaded, name), getattr(counts, name)
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    assert loaded.total == 5 * 3 * 4 * K * 2
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "counts.npz"
    path.write_text("old")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(UserError, match="No space left"):
        random_counts().save(path)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


def changed(field: str, value) -> dict:
    return {"settings": json.dumps({**settings_of(random_counts()), field: value})}


def settings_of(counts: RoutingCounts) -> dict:
    return vars(counts.settings)


WRONG_ARRAYS = {
    "pickled objects": {"class_names": np.array([Bomb()] * 5, dtype=object)},
    "pickled table": {"by_class": np.array(Bomb(), dtype=object)},
    "shape of by_class": {"by_class": np.zeros((5, 2), np.int64)},
    "shape of by_step": {"by_step": np.zeros((3, 2, 5), np.int64)},
    "no classes": {"by_class": np.zeros((0, 2, 4), np.int64)},
    "floating counts": {"by_position": random_counts().by_position.astype(float)},
    "negative count": {"by_class": random_counts().by_class * [-1, 1, 1, 1]},
    "row sum": {"by_class": random_counts().by_class + 1},
    "other totals of the experts": {"by_step": random_counts().by_step[..., ::-1]},
    "labels": {"labels": np.arange(4)},
    "number of names": {"class_names": np.array(["a"])},
    "names that are numbers": {"class_names": np.arange(5)},
    "time that is nan": {"times": np.array([1.0, np.nan, 0.0])},
    "settings that are no JSON": {"settings": "{"},
    "settings that are no object": {"settings": "[]"},
    "deep JSON": {"settings": "[" * 100_000},
    "setting of another type": changed("num_steps", "3"),
    "setting below 1": changed("num_experts_per_tok", 0),
    "setting that is true": changed("grid_size", True),
    "another number of images": changed("images_per_class", 2),
    "unknown setting": changed("note", "hi"),
    "missing": {"times": None},
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_counts_are_refused_in_one_line(case, tmp_path):
    counts = random_counts()
    names = ("by_class", "by_step", "by_position", "labels", "class_names", "times")
    arrays = {name: getattr(counts, name) for name in names}
    arrays = {**arrays, "settings": json.dumps(settings_of(counts)), **WRONG_ARRAYS[case]}
    path = tmp_path / "counts.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match="not the counts of expert_data.py") as error:
        RoutingCounts.load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_damaged_files_are_refused_wherever_they_are_damaged(tmp_path):
    path = tmp_path / "counts.npz"
    counts = random_counts()
    counts.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            RoutingCounts.load(path)
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            loaded = RoutingCounts.load(path)
        except UserError:
            continue
        assert np.array_equal(loaded.by_class, counts.by_class)  # a byte that nobody reads


def test_file_that_is_no_npz_is_refused(tmp_path):
    for name, write in {
        "text.npz": lambda path: path.write_text("not a zip"),
        "array.npz": lambda path: np.save(path.open("wb"), np.arange(3)),
        "folder.npz": lambda path: path.mkdir(),
        "absent.npz": lambda path: None,
    }.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match=name):
            RoutingCounts.load(tmp_path / name)


def test_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "counts.npz"
    random_counts().save(path)
    monkeypatch.setattr(counts_module, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="bytes of arrays, expected at most 1000"):
        RoutingCounts.load(path)


# The scripts

SCRIPTS = {"class": heatmap_class, "timestep": heatmap_timestep, "patch": heatmap_patch}


def call(module, monkeypatch, *arguments) -> None:
    """Runs a script's main in this process, as its command line would."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main(module.parse_args())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_vae):
    """A function: saves a random tiny model of an objective and returns its path."""

    def save(objective: str):
        path = tmp_path_factory.mktemp("model") / "model.safetensors"
        model = random_model()
        info = {
            "objective": objective,
            "vae_path": str(tiny_vae),
            "class_names": tuple(CLASS_NAMES),
        }
        save_model(path, model.state_dict(), Record(config=model.config, **info))
        return path

    return save


@pytest.mark.parametrize(
    ("objective", "cfg_scale"), [("rectified_flow", 2), ("gaussian", 1)], ids=["flow", "gaussian"]
)
def test_from_a_checkpoint_to_the_figures(objective, cfg_scale, checkpoint, tmp_path, capsys):
    """As processes for the one objective, and in this one for the other."""

    def run(*command) -> str:
        if objective == "rectified_flow":
            return run_script(*command).stdout
        call_main(*command)
        return capsys.readouterr().out

    data = tmp_path / "made" / "counts.npz"
    said = run(
        "expert_data.py", "--ckpt", checkpoint(objective), "--images-per-class", 2,
        "--class-labels", "class 8", 3, 3, "--num-sampling-steps", STEPS, "--batch-size", 3,
        "--cfg-scale", cfg_scale, "--output", data,
    )  # fmt: skip
    total = 4 * STEPS * TOKENS * K * 2
    assert f"{total} assignments = 4 images x 3 steps x 16 tokens x 2 experts x 2 layers" in said
    assert str(data) in said
    counts = RoutingCounts.load(data)
    assert counts.labels.tolist() == [8, 3]
    assert counts.class_names.tolist() == ["class 8", "class 3"]
    assert counts.total == total
    assert counts.settings.cfg_scale == cfg_scale

    kind = {"rectified_flow": "class", "gaussian": "timestep"}[objective]
    figure = tmp_path / "figures" / "heat.png"
    said = run(f"heatmap_{kind}.py", "--data", data, "--output", figure)
    assert imread(figure).std() > 0.1
    with figure.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1"]
    assert 0 <= float(rows[0]["load_entropy_bits"]) <= 2
    assert said.splitlines()[0].split() == list(rows[0])


def test_counts_are_those_of_the_images_that_sampling_draws(checkpoint, tmp_path, monkeypatch):
    path = checkpoint("gaussian")
    call(
        expert_data, monkeypatch, "--ckpt", path, "--num-sampling-steps", 3, "--cfg-scale", 1,
        "--images-per-class", 2, "--seed", 5, "--output", tmp_path / "a.npz",
    )  # fmt: skip
    counts = RoutingCounts.load(tmp_path / "a.npz")
    assert counts.labels.tolist() == list(range(10))
    labels = [label for label in range(10) for _ in range(2)]
    model = random_model()
    with RoutingRecorder(model, 3) as recorder:
        recorder.start_batch(labels)
        seeds = range(5, 25)
        generate(
            model, labels, seeds, objective="gaussian", num_steps=3, callback=recorder.end_step
        )
    assert np.array_equal(counts.by_class, recorder.by_class.transpose(0, 1))


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    "size",
    [
        dict(num_layers=1, num_experts=2, num_classes=1, num_steps=1),
        dict(num_layers=40, num_experts=64, num_classes=12, num_steps=5),
        dict(num_layers=13, num_experts=5, num_classes=150, num_steps=30),
    ],
    ids=["smallest", "deep", "many rows"],
)
def test_any_depth_experts_and_rows_are_drawn(kind, size, tmp_path, monkeypatch, recwarn):
    random_counts(**size).save(tmp_path / "counts.npz")
    suffix = ".pdf" if size["num_layers"] == 13 else ".png"
    figure, table = tmp_path / f"heat{suffix}", tmp_path / "table.csv"
    arguments = ("--data", tmp_path / "counts.npz", "--output", figure, "--csv", table)
    call(SCRIPTS[kind], monkeypatch, *arguments)
    start = figure.read_bytes()[:4]
    assert start == (b"%PDF" if suffix == ".pdf" else b"\x89PNG")
    assert len(table.read_text().splitlines()) == size["num_layers"] + 1
    assert not [str(w.message) for w in recwarn if "analysis" in str(w.filename)]


def test_layers_and_classes_can_be_chosen(tmp_path, monkeypatch, capsys):
    random_counts(num_layers=6, num_classes=20).save(tmp_path / "counts.npz")
    arguments = ("--data", tmp_path / "counts.npz", "--output", tmp_path / "heat.png")
    call(
        heatmap_class, monkeypatch, *arguments, "--layers", 5, 0, "--top-classes", 3, "--order",
        "similarity",
    )  # fmt: skip
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["5", "0"]


def test_top_classes_are_those_that_differ_most():
    table = np.full((6, 1, 2), 50)
    table[4], table[1] = [[90, 10]], [[20, 80]]
    assert heatmap_class.choose_classes(table, 2, "label").tolist() == [1, 4]


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, capsys):
    data, figure = tmp_path / "counts.npz", tmp_path / "heat.png"
    random_counts().save(data)
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (("--data", tmp_path / "absent.npz"), "absent.npz: cannot read (No such file"),
        (("--data", file), "not the counts"),
        (("--data", data, "--output", "heat.jpg"), "got heat.jpg, expected a name ending in .png"),
        (("--data", data, "--output", figure, "--layers", "2"), "got 2, expected 0 to 1"),
        (("--data", data, "--output", file / "heat.png"), "--output: cannot write"),
        (("--data", data, "--output", figure, "--csv", tmp_path), "--csv: got the folder"),
    ):
        for module in SCRIPTS.values():
            assert message in expect_error(capsys, module.__name__, *arguments)


def test_output_is_checked_before_sampling(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ("--ckpt", checkpoint("gaussian"), "--output", tmp_path)
    monkeypatch.setattr(expert_data, "open_pipeline", None)  # it does not come to that
    assert "got the folder" in expect_error(capsys, "expert_data", *arguments)


def test_a_model_that_overflows_is_not_analysed(tmp_path, tiny_vae, capsys):
    model = random_model()
    model.final_layer.linear.bias.fill_(torch.inf)
    path, output = tmp_path / "model.safetensors", tmp_path / "counts.npz"
    info = {"objective": "rectified_flow", "vae_path": str(tiny_vae)}
    save_model(path, model.state_dict(), Record(config=model.config, **info))
    arguments = ("--ckpt", path, "--output", output, "--class-labels", 1, "--images-per-class", 1)
    assert "not finite" in expect_error(capsys, "expert_data", *arguments)
    assert not output.exists()
