"""Routing analysis: the recorder, the count tables, the statistics, the figures and the scripts."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import call_main, expect_error, needs_gpu
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from test_models import randomised

from analysis.counts import (
    RoutingCounts,
    choose_rows,
    experts_per_token_statistics,
    load_entropy,
    max_over_mean_load,
    mutual_information,
    row_information,
)
from analysis.gallery import Gallery, crop
from analysis.heatmap import VIEWS, class_map, name_cells, step_map
from analysis.pictures import DARKEST, ExpertPicture, expert_colours, strongest_experts
from analysis.recorder import RoutingRecorder
from checkpoints import Record, save_model
from latents.fonts import FONT, font_with
from latents.image_grid import class_caption, image_grid
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate

STEPS, TOKENS, K = 3, 16, 2


def random_model(**fields) -> DiT:
    """Tiny DiT whose routing depends on class, time and position."""
    return randomised(0.2, class_dropout_prob=0.1, **fields).eval().requires_grad_(False)


def record(model: DiT, batches: list[list[int]], first_seed: int = 0, **changes) -> RoutingRecorder:
    """Samples one image per label, batch by batch, under a routing recorder."""
    values = dict(objective="rectified_flow", num_steps=STEPS, cfg_scale=2.0) | changes
    settings, seeds = SamplerSettings(**values), itertools.count(first_seed)
    with RoutingRecorder(model, settings.num_steps) as recorder:
        for labels in batches:
            recorder.start_batch(labels)
            batch_seeds = [next(seeds) for _ in labels]
            generate(model, labels, batch_seeds, settings, callback=recorder.end_step)
    return recorder


TABLES = (
    "by_class", "by_step", "by_position", "by_step_and_position", "weight_by_class",
    "weight_by_step", "weight_by_position", "kept", "together",
)  # fmt: skip


def tables(recorder: RoutingRecorder) -> list[torch.Tensor]:
    return [recorder.tables[name] for name in TABLES]


def brute_force_tables(routings: list[Routing], like: RoutingRecorder, labels: list[int]) -> list:
    """The tables of a list of routings, one of each layer and step, counted row by row."""
    want = {name: torch.zeros_like(like.tables[name]) for name in TABLES}
    experts = {}  # by step and layer: the set of pairs of a patch (of an image) and an expert
    for call, routing in enumerate(routings):
        step, layer = divmod(call, len(like.layers))
        chosen = experts[step, layer] = set()
        rows = zip(*(x.tolist() for x in routing[:3]), strict=True)
        for token, expert, weight in rows:
            if token < len(labels) * TOKENS:  # the conditional half
                chosen.add((token, expert))
                row = {"class": labels[token // TOKENS], "step": step, "position": token % TOKENS}
                for name, i in row.items():
                    want[f"by_{name}"][i, layer, expert] += 1
                    want[f"weight_by_{name}"][i, layer, expert] += weight
                want["by_step_and_position"][step, token % TOKENS, layer] += 1
        for token, _ in chosen & experts.get((step - 1, layer), set()):
            want["kept"][step - 1, token % TOKENS, layer] += 1
        for token, expert in chosen:
            for other, before in experts.get((step, layer - 1), ()):
                want["together"][layer - 1, before, expert] += other == token
    return list(want.values())


@pytest.mark.parametrize(
    "router, objective, cfg_scale",
    [("topk", "rectified_flow", 1.0), ("topk", "gaussian", 2.0), ("race", "rectified_flow", 2.0),
     ("expert_choice", "gaussian", 1.0), ("batch_pool", "rectified_flow", 2.0)],
)  # fmt: skip
def test_recorder_counts_equal_a_brute_force_count_of_the_routing(router, objective, cfg_scale):
    model, labels = random_model(router=router), [3, 7, 3]
    routings = []  # one entry per step and layer
    for block in model.blocks:
        if hasattr(block.moe.gate, "threshold"):
            block.moe.gate.threshold.fill_(0.5)
        block.moe.gate.register_forward_hook(lambda gate, x, out: routings.append(out))
    recorder = record(model, [labels], objective=objective, cfg_scale=cfg_scale)
    got, want = tables(recorder), brute_force_tables(routings, recorder, labels)
    for name, a, b in zip(TABLES, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    assert (len(got[3].unique()) == 1) == (router == "topk")


def test_counts_leave_out_the_extra_expert_of_images_without_a_class():
    recorder = record(random_model(router="prototype"), [[3, 7]])
    counts, (weights, _) = recorder.counts([3, 7]), recorder.mean_weights()
    assert recorder.tables["by_class"].shape == (10, 2, 5) and weights.shape == (2, TOKENS, 4)
    assert counts["by_class"].shape == (2, 2, 4) and counts["similarity"].shape == (2, 4, 4)
    assert (counts["by_class"].sum((1, 2)) == STEPS * 2 * TOKENS * K).all()


def test_recorder_stores_the_time_of_each_step():
    flow = record(random_model(), [[0], [1]], num_steps=4)
    assert flow.tables["times"].tolist() == [1, 0.75, 0.5, 0.25]
    gaussian = record(random_model(), [[0]], objective="gaussian", num_steps=2)
    assert gaussian.tables["times"].tolist() == [999, 0]


def test_recorder_removes_its_hooks_even_after_an_exception():
    model = random_model()
    x, t, y = torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0])
    want = model(x, t, y)[0]
    with pytest.raises(KeyboardInterrupt), RoutingRecorder(model, 1) as recorder:
        recorder.start_batch([0])
        assert torch.equal(model(x, t, y)[0], want)
        raise KeyboardInterrupt
    counted = recorder.tables["by_class"].clone()
    assert counted.sum() == 2 * TOKENS * K
    model(x, t, y)
    assert torch.equal(recorder.tables["by_class"], counted)


def test_recorder_counts_the_routing_of_compiled_blocks():
    model, compiled = random_model(), random_model()
    for block in compiled.blocks:
        block.compile(backend="eager")
    generate(compiled, [1], [0], SamplerSettings("rectified_flow", num_steps=2))
    steps = 12  # more than the graphs that torch.compile would build for one function
    want, got = (tables(record(each, [[1, 2]], num_steps=steps)) for each in (model, compiled))
    assert all(map(torch.equal, got, want))


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
    assert want.tables["by_class"].is_cuda
    assert (recorder.tables["by_step"].sum(-1) == 2 * TOKENS * K).all()


def test_routing_information_is_zero_for_uniform_choice_and_maximal_for_one_expert_per_class():
    uniform = np.full((10, 3, 8), 5)
    single = 7 * np.eye(8, dtype=int)[:, None, :]  # (8, 1, 8)
    assert np.allclose(max_over_mean_load(uniform), 1)
    assert np.allclose(load_entropy(uniform), 3) and np.allclose(load_entropy(single), 3)
    assert np.allclose(mutual_information(uniform), 0)
    assert np.allclose(mutual_information(single), 3) and np.allclose(row_information(single), 3)
    lopsided = np.array([[[30, 10]], [[1, 3]]])  # rows of different weight
    p = lopsided[:, 0] / lopsided.sum()
    direct = (p * np.log2(p / (p.sum(0) * p.sum(1, keepdims=True)))).sum()
    assert np.allclose(mutual_information(lopsided), direct)


def test_heat_map_rows_are_the_most_distinct_classes_with_similar_ones_adjacent():
    table = np.full((6, 1, 2), 50)
    table[4], table[1] = [[90, 10]], [[20, 80]]
    assert choose_rows(table, 2, "label").tolist() == [1, 4]
    table = np.array([[[9, 1]], [[1, 9]], [[8, 2]], [[2, 8]]])
    assert choose_rows(table, None, "similarity").tolist() in ([0, 2, 3, 1], [1, 3, 2, 0])


def test_layers_of_two_kinds_of_blocks_are_numbered_one_after_another():
    counts = random_counts(num_layers=3)
    counts.settings["layers"] = ["double.0.ff", "double.1.ff", "single.0.ff"]
    assert counts.layer_numbers == [0, 1, 2]


def random_counts(num_layers=2, num_experts=4, num_classes=5, num_steps=3) -> RoutingCounts:
    """Routing counts of random choices."""
    rng, (layers, experts) = np.random.default_rng(0), (num_layers, num_experts)
    chosen = rng.integers(0, 9, (num_classes, num_steps, 4, layers, experts))
    by = {"class": (1, 2), "step": (0, 2), "position": (0, 1)}
    tables = {f"by_{name}": chosen.sum(axes) for name, axes in by.items()}
    tables |= {f"weight_{name}": table / 3 for name, table in tables.items()}
    gallery = (layers, experts, 16)
    return RoutingCounts(
        **tables,
        by_step_and_position=chosen.sum((0, 4)), kept=chosen.sum((0, 4)) // 2,
        together=rng.integers(0, 9, (layers - 1, experts, experts)),
        other_by_step=np.zeros((num_steps, layers, experts), np.int64),
        similarity=rng.uniform(-1, 1, (layers, experts, experts)).astype(np.float32),
        gallery_weight=rng.random(gallery), gallery_image=np.full(gallery, -1),
        gallery_place=np.zeros(gallery, np.int64), gallery_crop=np.full(gallery, -1),
        crops=np.zeros(0, np.uint8), crop_ends=np.zeros(0, np.int64),
        labels=np.arange(num_classes), times=np.linspace(999, 0, num_steps),
        class_names=np.array([f"class ${label}_" for label in range(num_classes)]),
        settings=dict(
            model="DiT", sampler="ddpm", num_steps=3, cfg_scale=1.5, images_per_class=1,
            images=num_classes, grid=(2, 2), layers=[f"block {i}" for i in range(layers)],
        ),
    )  # fmt: skip


def test_routing_counts_survive_saving_and_loading(tmp_path):
    random_counts().save(tmp_path / "counts.npz")
    np.testing.assert_equal(
        vars(RoutingCounts.load(tmp_path / "counts.npz")), vars(random_counts())
    )
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npz"]


def test_a_file_without_routing_counts_is_a_one_line_error(tmp_path):
    whole = tmp_path / "whole.npz"
    random_counts().save(whole)
    pickled = {"by_class": np.array([{}], dtype=object)}
    for name, write in {
        "text.npz": lambda path: path.write_text("not a zip"),
        "missing.npz": lambda path: np.savez(path, by_class=np.zeros((3, 2, 5))),
        "pickled.npz": lambda path: np.savez(path, **{**np.load(whole), **pickled}),
        "flipped.npz": lambda path: path.write_bytes(whole.read_bytes().replace(b"\x00", b"\x01")),
    }.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not the counts of expert_data.py"):
            RoutingCounts.load(tmp_path / name)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_vae):
    """Function that saves a random tiny model for an objective and returns its run folder."""

    def save(objective: str, **overrides):
        model, folder = random_model(), tmp_path_factory.mktemp("run") / "checkpoints" / "0000001"
        facts = dict(vae_path=str(tiny_vae), class_names=tuple(f"class {i}" for i in range(10)))
        record = Record(config=model.config, objective=objective, **facts)
        folder.mkdir(parents=True)
        save_model(folder / "model.safetensors", {**model.state_dict(), **overrides}, record)
        return folder.parents[1]

    return save


def test_heat_maps_and_tables_are_made_from_a_checkpoint(checkpoint, tmp_path, capsys):
    """The counts are written to the run folder and equal those of the same sampled images."""
    run, figure = checkpoint("rectified_flow"), tmp_path / "figures" / "heat.png"
    call_main(
        "expert_data.py", "--ckpt", run, "--images-per-class", 2, "--class-labels", "class 8", 3, 3,
        "--num-sampling-steps", STEPS, "--batch-size", 3, "--cfg-scale", 2, "--seed", 5,
    )  # fmt: skip
    total = 4 * STEPS * TOKENS * K * 2
    assert f"{total} assignments" in capsys.readouterr().out
    counts = RoutingCounts.load(run / "expert_data.npz")
    names = dict(zip(counts.labels, counts.class_names, strict=True))
    assert names == {8: "class 8", 3: "class 3"} and counts.by_class.sum() == total
    drawn = record(random_model(), [[8, 8, 3, 3]], first_seed=5)
    assert np.array_equal(counts.by_class, drawn.tables["by_class"][counts.labels])
    call_main("heatmap_class.py", "--data", run, "--output", figure)
    assert imread(figure).std() > 0.1
    numbers = figure.with_suffix(".csv").read_text()
    assert numbers.count("\n") == 3 and numbers in capsys.readouterr().out


def test_a_gallery_has_the_images_with_the_largest_weights_in_any_batches():
    torch.manual_seed(0)
    weights, pictures = torch.rand(2, 40, 4, 3), torch.randint(0, 256, (40, 3, 8, 8)).byte()
    whole, parts, decoded = Gallery(2, 3), Gallery(2, 3), []

    def decode(first: int):
        return lambda chosen: decoded.extend(chosen) or pictures[[first + i for i in chosen]]

    whole.add(list(weights), (2, 2), 0, decode(0))
    for first in range(0, 40, 7):
        parts.add([x[first : first + 7] for x in weights], (2, 2), first, decode(first))
    for name, value in whole.arrays().items():
        if name not in ("gallery_crop", "crops", "crop_ends"):  # in another order
            assert np.array_equal(parts.arrays()[name], value), name
    assert parts.crops == whole.crops and len(whole.crops) <= 2 * 3 * 16
    best = weights.amax(2).topk(16, dim=1)
    assert torch.equal(whole.weight, best.values.mT) and torch.equal(whole.image, best.indices.mT)
    assert len(decoded) < 80  # only images that enter a gallery are decoded


def test_a_crop_shows_five_by_five_patches_inside_the_image():
    image = torch.arange(3 * 16 * 18).reshape(3, 16, 18).byte()  # 8 x 6 patches of 2 x 3 pixels
    pixels = image.permute(1, 2, 0).numpy()
    for place, top, left in ((0, 0, 0), (47, 6, 3), (8, 0, 0), (26, 4, 0), (27, 4, 3)):
        assert np.array_equal(np.array(crop(image, place, (8, 6))), pixels[top:, left:][:10, :15])
    assert np.array_equal(np.array(crop(image, 3, (2, 2))), pixels)  # of fewer patches


@pytest.mark.parametrize("size", [(1, 2, 1, 1), (40, 64, 6, 5), (13, 5, 150, 30)])
def test_heat_maps_of_any_size_fit_a_page_and_label_every_column(size, recwarn):
    counts = random_counts(*size)
    for map_of in (class_map, step_map, *VIEWS.values()):
        if size[3] == 1 and map_of in (VIEWS["flow"], VIEWS["persistence"]):
            continue  # a single layer, and a single step
        most = {class_map: 13, VIEWS["flow"]: 2}.get(map_of, 40)  # step_map has all layers too
        layers = min(counts.num_layers, most)
        heatmap = map_of(counts, range(layers))
        figure = heatmap.draw()
        figure.draw_without_rendering()
        *panels, scale = figure.axes
        assert len(panels) == len(heatmap.panels) and scale.get_xlabel() == heatmap.unit
        for ax in panels[-panels[0].get_gridspec().ncols :]:  # the lowest panel of each column
            assert ax.get_xticklabels()[0].get_text() == f"{heatmap.across[1][0]:g}"
        assert (figure.get_size_inches() <= (7, 9.01)).all()
    assert not [str(w.message) for w in recwarn if "analysis" in str(w.filename)]


def test_a_step_in_which_a_layer_has_no_assignments_is_an_empty_cell():
    """A router with a threshold may choose no expert."""
    counts = random_counts(num_steps=3, num_layers=2)
    whole = VIEWS["persistence"](counts, range(2))
    for assigned in (counts.by_step_and_position, counts.kept):
        assigned[1, ..., 0] = 0
    heatmap = VIEWS["persistence"](counts, range(2))
    is_empty = np.isnan(heatmap.panels)
    assert is_empty.sum() == 1 and np.isfinite(heatmap.statistics["persistence"]).all()
    assert np.array_equal(heatmap.panels[~is_empty], whole.panels[~is_empty])
    texts = [text.get_text() for axes in heatmap.draw().axes for text in axes.texts]
    assert np.isfinite(heatmap.center) and "nan" not in texts


def test_experts_per_token_has_min_and_max_and_no_map_if_it_is_constant(tmp_path, capsys):
    counts = random_counts(num_steps=2, num_layers=1)
    assignments = np.array([[10, 20, 30, 40], [20, 20, 20, 20]])[..., None]  # over 5 images
    counts.by_step_and_position[:] = assignments
    statistics = experts_per_token_statistics(counts.experts_per_token)
    numbers = [value.item() for value in statistics.values()]
    assert numbers == [4.5, 4, 5, 3, 6]  # mean; min and max over steps; min and max over positions
    counts.by_step_and_position[:] = 10
    counts.save(tmp_path / "expert_data.npz")
    call_main("expert_report.py", "--data", tmp_path, "--only", "spending")
    assert "2 everywhere" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["expert_data.npz"]


def test_heat_maps_show_the_first_middle_and_last_layer_unless_layers_are_given(tmp_path, capsys):
    """Layers have the numbers of their blocks, as in the pictures of experts."""
    counts = random_counts(num_layers=6, num_classes=20)
    counts.settings["layers"] = [f"blocks.{2 * i + 1}" for i in range(6)]
    counts.save(tmp_path / "counts.npz")
    options = ("--top-classes", 3, "--order", "similarity", "--output", tmp_path / "map.pdf")
    assert counts.layer_numbers == [1, 3, 5, 7, 9, 11]
    for flags, layers in (((), ["1", "7", "11"]), (("--layers", 11, 1, *options), ["11", "1"])):
        call_main("heatmap_class.py", "--data", tmp_path / "counts.npz", *flags)
        assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == layers
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".png", ".pdf", ".csv"}


def test_the_title_of_a_heat_map_is_not_cut_off():
    counts = random_counts()
    router = "topk:input=modulated,gating=softmax,renormalize=False"
    counts.settings.update(model="DiT-Ti/2-8E2A", router=router, step=640_000, num_steps=250)
    figure = step_map(counts, [0]).draw()
    (title,) = figure.texts
    assert router in title.get_text()
    box = title.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.width


def test_wrong_heat_map_arguments_are_one_line_errors(tmp_path, capsys):
    data, file, old = (tmp_path / name for name in ("counts.npz", "file", "old.npz"))
    random_counts().save(data)
    file.touch()
    np.savez(old, by_class=np.ones((3, 2, 4)))
    for arguments, message in (
        (("--data", file), "not the counts of expert_data.py (it is not an .npz file"),
        (("--data", data, "--layers", "2"), "got 2, expected some of 0, 1, the blocks"),
        (("--data", old), "got format 1, expected 3: run expert_data.py again"),
        (("--data", data, "--output", file / "heat.png"), "--output: cannot write"),
        (("--data", data, "--output", tmp_path / "heat.xyz"), "--output: got"),
    ):
        assert message in expect_error(capsys, "heatmap_timestep.py", *arguments)
    line = expect_error(capsys, "expert_data.py", "--ckpt", "x", "--output", "counts.txt")
    assert "--output: got" in line and ".npz" in line


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_sample_py_writes_a_picture_of_the_experts_of_the_patches(suffix, checkpoint, tmp_path):
    call_main(
        "sample.py", "--ckpt", checkpoint("rectified_flow"), "--num-sampling-steps", 3,
        "--output", tmp_path / "grid.png", "--experts", tmp_path / f"experts.{suffix}",
    )  # fmt: skip
    picture = Image.open(tmp_path / f"experts.{suffix}")
    assert getattr(picture, "n_frames", 1) == (1 if suffix == "png" else 3)
    assert len(picture.convert("RGB").getcolors(2**20)) > 4  # the 4 colours of the experts


def test_expert_pictures_show_the_strongest_expert_of_each_token_or_none():
    token, expert = torch.tensor([2, 0, 2, 3]), torch.tensor([1, 0, 3, 2])
    weight = torch.tensor([0.2, 0.5, 0.4, 0.1])
    routing = Routing(token, expert, weight, 0, torch.zeros(()), torch.ones(4))
    assert strongest_experts(routing, num_tokens=4).tolist() == [0, -1, 3, 2]


def test_an_expert_picture_shows_the_image_in_the_brightness_of_the_experts_colours():
    picture = ExpertPicture(random_model(), num_steps=1)
    image = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    image[..., :8] = 0  # the left half is black
    experts = torch.arange(TOKENS).view(1, 1, TOKENS) % picture.num_experts
    shown, (tinted,) = picture.tiles(image, experts)[0, 0], picture.tiles(image, experts)[1]
    side = tinted.shape[-1] // 4  # pixels of a patch, enlarged
    colours = torch.from_numpy(expert_colours(picture.num_experts))[experts[0, 0]]
    brightness = torch.tensor([DARKEST, DARKEST, 1, 1])
    expected = (colours.T.view(3, 4, 4) * brightness).byte()
    torch.testing.assert_close(tinted[:, ::side, ::side], expected, atol=1, rtol=0)
    assert torch.equal(shown[:, ::7, ::7], image[0])


def test_a_class_caption_is_its_name_on_one_line_or_its_number_if_no_font_has_the_letters():
    assert class_caption("  ankle\nboot é", 3) == "ankle boot é"
    assert class_caption("\U0010fffd", 3) == class_caption(" ", 3) == "3"


def test_pictures_use_an_installed_font_that_has_the_letters_of_a_name(tmp_path, monkeypatch):
    letter = "\U0010fffc"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 800)), pen.lineTo((800, 800)), pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "letter"])
    font.setupCharacterMap({ord(letter): "letter"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "letter": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "letter": (1000, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Script", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "script.ttf")
    own = [one for one in font_manager.fontManager.ttflist if one.fname == str(FONT)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    gone = tmp_path / "gone.ttf"  # deleted since matplotlib listed the fonts
    gone = font_manager.FontEntry(fname=str(gone), name="Gone", style="normal", weight=400)
    font_manager.fontManager.ttflist.append(gone)
    font_manager.fontManager.addfont(tmp_path / "script.ttf")
    font_with.cache_clear()
    assert class_caption(letter, 3) == letter
    assert class_caption("\uff21bc", 3) == "Abc"  # a wide A, which this font lacks
    grid = image_grid(torch.zeros(2, 3, 112, 112, dtype=torch.uint8), [letter, "a"])
    drawn = grid[0, 114:, 2:114] > 128
    assert drawn.sum() == pytest.approx(12**2 * 0.8**2 / 2, rel=0.3)  # the triangle, 12 pixels high
    figure = Figure()
    name_cells(figure.add_subplot().yaxis, "class", [letter, "a"], 1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns about a missing letter
        figure.savefig(tmp_path / "figure.png")
    font_with.cache_clear()


def test_expert_data_rejects_a_model_with_outputs_that_are_not_finite(checkpoint, tmp_path, capsys):
    path = checkpoint("rectified_flow", **{"final_layer.linear.bias": torch.full((32,), 1e38)})
    flags = ("--class-labels", 1, "--images-per-class", 1, "--output", tmp_path / "c.npz")
    assert "not finite" in expect_error(capsys, "expert_data", "--ckpt", path, *flags)
    assert not (tmp_path / "c.npz").exists()
