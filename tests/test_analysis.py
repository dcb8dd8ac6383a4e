"""Routing analysis: the recorder, the count tables, the statistics, the figures and the scripts."""

import csv

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, call_main, expect_error, needs_gpu, run_script
from matplotlib.image import imread
from PIL import Image

from analysis.counts import RoutingCounts
from analysis.expert_picture import strongest_experts
from analysis.recorder import RoutingRecorder
from analysis.statistics import (
    choose_rows,
    load_entropy,
    max_over_mean_load,
    mutual_information,
    row_information,
    spending_statistics,
)
from checkpoints import Record, save_model
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate
from sampling.grid import LONGEST, class_caption, enlarge

STEPS, TOKENS, K = 3, 16, 2


def random_model(seed: int = 0, **overrides) -> DiT:
    """A tiny DiT whose routing depends on class, time and position: no weight is left at zero."""
    torch.manual_seed(seed)
    model = DiT(**{**TINY_MODEL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def record(model: DiT, batches: list[list[int]], **changes) -> RoutingRecorder:
    """Samples images of the labels in each batch under a recorder."""
    values = dict(objective="rectified_flow", num_steps=STEPS, cfg_scale=2.0) | changes
    settings = SamplerSettings(**values)
    seeds = iter(range(1000))
    with RoutingRecorder(model, settings.num_steps) as recorder:
        for labels in batches:
            recorder.start_batch(labels)
            batch_seeds = [next(seeds) for _ in labels]
            generate(model, labels, batch_seeds, settings, callback=recorder.end_step)
    return recorder


def tables(recorder: RoutingRecorder) -> list[np.ndarray]:
    names = ("by_class", "by_step", "by_position", "spent")
    return [getattr(recorder, name).numpy() for name in names]


@pytest.mark.parametrize("router", ["topk", "race", "expert_choice", "batch_pool"])
@pytest.mark.parametrize(
    "objective, cfg_scale", [("rectified_flow", 1.0), ("rectified_flow", 2.0), ("gaussian", 2.0)]
)
def test_recorder_counts_what_a_brute_force_count_of_the_routing_gives(
    objective, cfg_scale, router
):
    model, labels, routings = random_model(router=router), [3, 7, 3], []  # of each step and layer
    for name, state in model.named_buffers():
        if name.endswith("threshold"):
            state.fill_(0.5)
    hooks = [
        block.moe.gate.register_forward_hook(lambda gate, x, out: routings.append(out))
        for block in model.blocks
    ]
    got = tables(record(model, [labels], objective=objective, cfg_scale=cfg_scale))
    for hook in hooks:
        hook.remove()
    want = [np.zeros_like(table) for table in got]
    for call, routing in enumerate(routings):
        step, layer = divmod(call, len(model.blocks))
        for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
            if token < len(labels) * TOKENS:  # the conditional half
                want[0][labels[token // TOKENS], layer, expert] += 1
                want[1][step, layer, expert] += 1
                want[2][token % TOKENS, layer, expert] += 1
                want[3][step, token % TOKENS, layer] += 1
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    assert (len(np.unique(got[3])) == 1) == (router == "topk")


def test_counts_do_not_depend_on_the_batches():
    model = random_model()
    together, apart = record(model, [[1, 2, 3, 4]]), record(model, [[1], [2, 3], [4]])
    for one, other in zip(tables(together), tables(apart), strict=True):
        assert np.array_equal(one, other)


def test_recorder_notes_the_time_of_each_step():
    flow = record(random_model(), [[0], [1]], num_steps=4)
    assert flow.times.tolist() == [1, 0.75, 0.5, 0.25]
    gaussian = record(random_model(), [[0]], objective="gaussian", num_steps=2)
    assert gaussian.times.tolist() == [999, 0]


def test_recorder_leaves_nothing_behind_also_after_an_exception():
    model = random_model()
    x, t, y = torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0])
    want = model(x, t, y)[0]
    with pytest.raises(KeyboardInterrupt), RoutingRecorder(model, 1) as recorder:
        recorder.start_batch([0])
        assert torch.equal(model(x, t, y)[0], want)
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    counted = recorder.by_class.clone()
    assert counted.sum() == 2 * TOKENS * K
    model(x, t, y)
    assert torch.equal(recorder.by_class, counted)


def test_recorder_counts_compiled_blocks():
    model, compiled = random_model(), random_model()
    for block in compiled.blocks:
        block.compile(backend="eager")
    generate(compiled, [1], [0], SamplerSettings("rectified_flow", num_steps=2))
    steps = 12  # more than the graphs that torch.compile would build for one function
    want = record(model, [[1, 2]], num_steps=steps)
    got = record(compiled, [[1, 2]], num_steps=steps)
    for one, other in zip(tables(want), tables(got), strict=True):
        assert np.array_equal(one, other)


@needs_gpu
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


def test_information_is_entropy_less_conditional_entropy():
    table = np.array([[[3, 1]], [[1, 3]]])
    binary = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert np.allclose(mutual_information(table), 1 - binary)
    lopsided = np.array([[[30, 10]], [[1, 3]]])  # rows of different weight
    p = lopsided[:, 0] / lopsided.sum()
    direct = (p * np.log2(p / (p.sum(0) * p.sum(1, keepdims=True)))).sum()
    assert np.allclose(mutual_information(lopsided), direct)


def test_similarity_order_puts_like_next_to_like():
    table = np.array([[[9, 1]], [[1, 9]], [[8, 2]], [[2, 8]]])
    order = choose_rows(table, None, "similarity").tolist()
    assert order in ([0, 2, 3, 1], [1, 3, 2, 0])


def test_top_classes_are_those_that_differ_most():
    table = np.full((6, 1, 2), 50)
    table[4], table[1] = [[90, 10]], [[20, 80]]
    assert choose_rows(table, 2, "label").tolist() == [1, 4]


def random_counts(
    num_layers=2, num_experts=4, num_classes=5, num_steps=3, grid_size=2, seed=0
) -> RoutingCounts:
    """Counts of random choices."""
    shape = (num_classes, num_steps, grid_size**2, num_layers, num_experts)
    chosen = np.random.default_rng(seed).integers(0, 9, shape)
    return RoutingCounts(
        by_class=chosen.sum((1, 2)),
        by_step=chosen.sum((0, 2)),
        by_position=chosen.sum((0, 1)),
        spent=chosen.sum((0, 4)),
        labels=np.arange(num_classes),
        class_names=np.array([f"class ${label}_" for label in range(num_classes)]),
        times=np.linspace(999, 0, num_steps),
        settings=dict(
            model="DiT-T/2", sampler="ddpm", num_steps=3, cfg_scale=1.5, images_per_class=1
        ),
    )


def test_counts_come_back_from_the_file_as_they_were(tmp_path):
    counts = random_counts()
    counts.save(tmp_path / "counts.npz")
    loaded = RoutingCounts.load(tmp_path / "counts.npz")
    for name, want in vars(counts).items():
        got = getattr(loaded, name)
        assert got == want if name == "settings" else np.array_equal(got, want)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_a_file_that_holds_no_counts_is_refused_in_one_line(tmp_path):
    whole = tmp_path / "whole.npz"
    random_counts().save(whole)
    pickled = {"by_class": np.array([{}], dtype=object)}
    for name, write in {
        "text.npz": lambda path: path.write_text("not a zip"),
        "array.npz": lambda path: np.save(path.open("wb"), np.arange(3)),
        "missing.npz": lambda path: np.savez(path, by_class=np.zeros((3, 2, 5))),
        "pickled.npz": lambda path: np.savez(path, **{**np.load(whole), **pickled}),
        "folder.npz": lambda path: path.mkdir(),
        "short.npz": lambda path: path.write_bytes(whole.read_bytes()[:300]),
        "flipped.npz": lambda path: path.write_bytes(whole.read_bytes().replace(b"\x00", b"\x01")),
    }.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not the counts of expert_data.py"):
            RoutingCounts.load(tmp_path / name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_vae):
    """A function: saves a random tiny model of an objective and returns its path."""

    def save(objective: str, **overrides):
        path, model = tmp_path_factory.mktemp("model") / "model.safetensors", random_model()
        names = tuple(f"class {label}" for label in range(10))
        record = Record(
            config=model.config, objective=objective, vae_path=str(tiny_vae), class_names=names
        )
        state_dict = {**model.state_dict(), **overrides}
        save_model(path, state_dict, record)
        return path

    return save


def test_from_a_checkpoint_to_a_figure(checkpoint, tmp_path):
    data, figure = tmp_path / "made" / "counts.npz", tmp_path / "figures" / "heat.png"
    said = run_script(
        "expert_data.py", "--ckpt", checkpoint("rectified_flow"), "--images-per-class", 2,
        "--class-labels", "class 8", 3, 3, "--num-sampling-steps", STEPS, "--batch-size", 3,
        "--output", data,
    ).stdout  # fmt: skip
    total = 4 * STEPS * TOKENS * K * 2
    assert f"{total} assignments" in said
    counts = RoutingCounts.load(data)
    assert counts.labels.tolist() == [8, 3] and counts.by_class.sum() == total
    assert counts.class_names.tolist() == ["class 8", "class 3"]
    said = run_script("heatmap_class.py", "--data", data, "--output", figure).stdout
    assert imread(figure).std() > 0.1
    rows = list(csv.DictReader(figure.with_suffix(".csv").open()))
    assert [row["layer"] for row in rows] == ["0", "1"]
    assert 0 <= float(rows[0]["load_entropy_bits"]) <= 2
    assert figure.with_suffix(".csv").read_text() in said


def test_counts_are_those_of_the_images_that_sampling_draws(checkpoint, tmp_path):
    call_main(
        "expert_data.py", "--ckpt", checkpoint("gaussian"), "--num-sampling-steps", 3,
        "--cfg-scale", 1, "--images-per-class", 2, "--seed", 5, "--output", tmp_path / "a.npz",
    )  # fmt: skip
    counts = RoutingCounts.load(tmp_path / "a.npz")
    labels = [label for label in range(10) for _ in range(2)]
    model = random_model()
    with RoutingRecorder(model, 3) as recorder:
        recorder.start_batch(labels)
        settings = SamplerSettings("gaussian", num_steps=3, cfg_scale=1.0)
        generate(model, labels, range(5, 25), settings, callback=recorder.end_step)
    assert np.array_equal(counts.by_class, recorder.by_class)


@pytest.mark.parametrize("kind", ["class", "timestep", "patch", "spending"])
@pytest.mark.parametrize(
    "size",
    [
        dict(num_layers=1, num_experts=2, num_classes=1, num_steps=1),
        dict(num_layers=40, num_experts=64, num_classes=12, num_steps=5),
        dict(num_layers=13, num_experts=5, num_classes=150, num_steps=30),
    ],
    ids=["smallest", "deep", "many rows"],
)
def test_any_depth_experts_and_rows_are_drawn(kind, size, tmp_path, recwarn):
    random_counts(**size).save(tmp_path / "counts.npz")
    suffix = ".pdf" if size["num_layers"] == 13 else ".png"
    figure = tmp_path / f"heat{suffix}"
    arguments = ("--data", tmp_path / "counts.npz", "--output", figure)
    call_main(f"heatmap_{kind}.py", *arguments, "--layers", *range(size["num_layers"]))
    assert figure.read_bytes()[:4] == (b"%PDF" if suffix == ".pdf" else b"\x89PNG")
    assert len(figure.with_suffix(".csv").read_text().splitlines()) == size["num_layers"] + 1
    assert not [str(w.message) for w in recwarn if "analysis" in str(w.filename)]


def test_spending_is_of_a_token_and_its_least_and_most_are_of_steps_and_positions():
    counts = random_counts(num_steps=2, num_layers=1)
    counts.spent[:] = np.array([[10, 20, 30, 40], [20, 20, 20, 20]])[..., None]  # of 5 images
    table = spending_statistics(counts.experts_per_token, layers=[0])
    (row,) = csv.DictReader(table.splitlines())
    assert [float(value) for value in row.values()] == [0, 4.5, 4, 5, 3, 6]


def test_the_first_middle_and_last_layer_are_shown_unless_others_are_chosen(tmp_path, capsys):
    random_counts(num_layers=6, num_classes=20).save(tmp_path / "counts.npz")
    options = ("--top-classes", 3, "--order", "similarity")
    for flags, layers in (((), ["0", "3", "5"]), (("--layers", 5, 0, *options), ["5", "0"])):
        call_main("heatmap_class.py", "--data", tmp_path / "counts.npz", *flags)
        assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == layers
    assert (tmp_path / "heatmap_class.png").is_file()


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, capsys):
    data, file = tmp_path / "counts.npz", tmp_path / "file"
    random_counts().save(data)
    file.touch()
    for arguments, message in (
        (("--data", tmp_path / "absent.npz"), "absent.npz: not the counts"),
        (("--data", file), "not the counts"),
        (("--data", data, "--layers", "2"), "got 2, expected 0 to 1"),
        (("--data", data, "--output", file / "heat.png"), "--output: cannot write"),
        (("--data", data, "--output", tmp_path / "heat.xyz"), "--output: got"),
    ):
        assert message in expect_error(capsys, "heatmap_patch.py", *arguments)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_sample_py_draws_the_experts_of_the_patches(suffix, checkpoint, tmp_path):
    call_main(
        "sample.py", "--ckpt", checkpoint("rectified_flow"), "--num-sampling-steps", 3,
        "--output", tmp_path / "grid.png", "--experts", tmp_path / f"experts.{suffix}",
    )  # fmt: skip
    picture = Image.open(tmp_path / f"experts.{suffix}")
    assert getattr(picture, "n_frames", 1) == (3 if suffix == "gif" else 1)
    assert len(picture.convert("RGB").getcolors(2**20)) > 4  # experts
    assert (tmp_path / "grid.png").is_file()


def test_the_picture_shows_a_tokens_strongest_expert_and_none_where_there_is_none():
    token, expert = torch.tensor([2, 0, 2, 3]), torch.tensor([1, 0, 3, 2])
    weight = torch.tensor([0.2, 0.5, 0.4, 0.1])
    routing = Routing(token, expert, weight, 0, torch.zeros(()), torch.ones(4))
    assert strongest_experts(routing, num_tokens=4).tolist() == [0, -1, 3, 2]


def test_a_class_has_its_name_on_one_line_or_its_number_where_the_font_lacks_a_letter():
    assert class_caption("  ankle\nboot é", 3) == "ankle boot é"
    assert class_caption("猫", 3) == class_caption(" ", 3) == "3"
    assert len(class_caption("word " * 100, 3)) == LONGEST


def test_small_images_are_enlarged_by_whole_pixels_and_large_ones_stay():
    small, large = torch.arange(3 * 30 * 30).view(1, 3, 30, 30), torch.zeros(1, 3, 112, 112)
    assert enlarge(small).shape == (1, 3, 120, 120) and enlarge(large).shape == large.shape
    assert torch.equal(enlarge(small)[..., 3::4, ::4], small)


def test_a_model_that_overflows_is_not_analysed(checkpoint, tmp_path, capsys):
    size = random_model().final_layer.linear.bias.shape
    path = checkpoint("rectified_flow", **{"final_layer.linear.bias": torch.full(size, 1e38)})
    flags = ("--class-labels", 1, "--images-per-class", 1, "--output", tmp_path / "c.npz")
    assert "not finite" in expect_error(capsys, "expert_data", "--ckpt", path, *flags)
    assert not (tmp_path / "c.npz").exists()
