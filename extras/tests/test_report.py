"""The page of expert_report.py: its tables, the size of its pictures, and a real browser."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, open_browser
from PIL import Image
from test_analysis import random_counts

from analysis.counts import RoutingCounts
from analysis.gallery import Gallery
from extras import report
from extras.ablation import Ablation, save_ablation

ROUTER = "topk:input=modulated,gating=softmax,renormalize=False"


def data_of(page: Path, number: int = 0) -> dict:
    """The data of a model in a page."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )
    return json.loads(text)[number]


def table_of(data: dict, name: str) -> np.ndarray:
    table = data["tables"][name]
    values = np.frombuffer(base64.b64decode(table["data"]), "<f4")
    return values.reshape(table["shape"])


pytestmark = pytest.mark.filterwarnings("error:divide by zero:RuntimeWarning")


def counts_with_gallery(**sizes) -> RoutingCounts:
    counts = random_counts(**sizes)
    torch.manual_seed(0)
    layers, images = counts.num_layers, len(counts.labels)
    gallery = Gallery(layers, counts.num_experts)
    weights = list(torch.rand(layers, images, 4, counts.num_experts))
    pictures = torch.randint(0, 256, (images, 3, 32, 32)).byte()
    gallery.add(weights, (2, 2), 0, lambda chosen: pictures[chosen])
    return replace(counts, **gallery.arrays())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, RoutingCounts]:
    """The page of a model with 70 classes and 64 experts, one of them dead."""
    folder = tmp_path_factory.mktemp("report")
    counts = counts_with_gallery(num_layers=3, num_experts=64, num_classes=70)
    for name in ("by_class", "by_step", "by_position"):
        getattr(counts, name)[:, 1, 5] = 0
    counts = replace(counts, class_names=np.array([f"</script>{i}" for i in range(70)]))
    counts.settings.update(run="my-run", router=ROUTER, step=1200)
    counts.save(folder / "expert_data.npz")
    rows = [Ablation(i, j, 0.01 * j, 0.001, 0.02) for i in range(3) for j in range(60)]
    save_ablation(folder / "expert_ablation.jsonl", {}, rows)
    call_main("expert_report.py", "--data", folder)
    return folder / "expert_report.html", counts


def test_the_page_has_the_tables_and_the_crops(page):
    path, counts = page
    data = data_of(path)
    for name, table in (
        ("byClass", counts.by_class), ("together", counts.together),
        ("byPlace", counts.by_position),
        ("kept", counts.kept[:-1].sum(1) / counts.by_step_and_position[:-1].sum(1)),
    ):  # fmt: skip
        np.testing.assert_allclose(table_of(data, name), table, rtol=1e-6)
    damage = table_of(data, "damage")
    assert damage[1, 2, 59] == np.float32(0.59) and np.isnan(damage[:, :, 60:]).all()
    crop, weight, image, label, frame = data["gallery"][2][63][0]
    row, column = divmod(int(counts.gallery_place[2, 63, 0]), 2)  # the crop is the image
    assert frame == [50 * row, 50 * (1 - column), 50 * (1 - row), 50 * column]
    assert image == label == counts.gallery_image[2, 63, 0]
    assert weight == round(float(counts.gallery_weight[2, 63, 0]), 4)
    crops, ends = base64.b64decode(data["crops"]), [0, *data["cropEnds"]]
    picture = Image.open(io.BytesIO(crops[ends[crop] : ends[crop + 1]]))
    assert picture.format == "WEBP" and picture.size == (32, 32)
    assert f"router {ROUTER}, step 1,200, {counts.settings['sampler']}" in data["about"]
    assert "<h1>Experts of my-run</h1>" in path.read_text()


def test_damage_measured_with_other_weights_is_refused(tmp_path, capsys):
    counts = counts_with_gallery(num_layers=1)
    settings = counts.settings | {"checkpoint_sha256": "a", "precision": "fp32"}
    replace(counts, settings=settings).save(tmp_path / "expert_data.npz")
    rows = [Ablation(0, 0, 0.1, 0.001, 0.02)]
    save_ablation(tmp_path / "expert_ablation.jsonl", {"checkpoint_sha256": "b"}, rows)
    file, fault = tmp_path / "expert_ablation.jsonl", "was measured with other weights"
    assert fault in expect_error(capsys, "expert_report.py", "--data", tmp_path, "--ablation", file)
    save_ablation(file, {"checkpoint_sha256": "b", "precision": "bf16"}, rows)
    fault = "got --precision bf16, expected fp32"
    assert fault in expect_error(capsys, "expert_report.py", "--data", tmp_path, "--ablation", file)
    call_main("expert_report.py", "--data", tmp_path)  # which finds the file
    assert fault in capsys.readouterr().out and (tmp_path / "expert_report.html").exists()


def test_crops_become_smaller_if_they_would_not_fit():
    counts = counts_with_gallery(num_experts=8)
    whole = sum(map(len, report.fitting_crops(counts, report.MOST_BYTES)))
    crops = report.fitting_crops(counts, whole // 3)
    assert sum(map(len, crops)) <= whole // 3 and len(crops) == len(counts.crop_ends)
    assert Image.open(io.BytesIO(crops[0])).size[0] in report.SIDES


def test_large_grids_are_joined_in_blocks():
    table = np.arange(80 * 48).reshape(-1, 1)
    joined = report.on_small_grid(table, (80, 48), np.sum)
    assert report.small_grid((80, 48)) == (27, 16) and len(joined) == 27 * 16
    assert joined.sum() == table.sum() and joined[0] == sum(
        r * 48 + c for r in range(3) for c in range(3)
    )
    assert report.on_small_grid(table[:, :0], (80, 48), np.sum).shape[1] == 0  # K is fixed


@pytest.fixture(scope="module")
def driver():
    with open_browser(**{"goog:loggingPrefs": {"browser": "ALL"}}) as browser:
        yield browser


def show(driver, address: str, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(address)


def views(driver, name: str) -> list:
    """The elements of a view, one for each model."""
    return driver.find_elements("css selector", f"[data-view={name}]")


def assert_fits(driver, width: int) -> None:
    """Asserts that nothing is cut off, the table of numbers included."""
    driver.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    for table in views(driver, "numbers"):
        assert table.get_property("scrollWidth") == table.get_property("clientWidth")


def test_the_page_works_in_a_browser_and_fits_a_telephone(page, driver):
    show(driver, f"{page[0].as_uri()}#layer-1-expert-5", 390)
    title = driver.find_element("css selector", "#one h2")
    assert title.text == "Expert 5 of layer 1"
    assert "1·5" in views(driver, "dead")[0].text
    assert "No patch" not in views(driver, "gallery")[0].text
    views(driver, "after")[0].click()
    assert title.text == "Expert 6 of layer 1"
    assert_fits(driver, 390)
    assert driver.execute_script("return document.images.length") == 16
    assert driver.execute_script("return document.images[0].naturalWidth") == 32
    show(driver, page[0].as_uri(), 1280)
    assert_fits(driver, 1280)
    assert not driver.get_log("browser")


BARS = """return [...document.querySelectorAll(".bar")].map((bar) => [
  bar.querySelector("b").getBoundingClientRect().width, bar.lastChild.textContent])"""


def test_a_bar_is_as_long_as_its_number_says(page, driver):
    show(driver, page[0].as_uri(), 1280)
    lengths, words = zip(*driver.execute_script(BARS), strict=True)
    values = [float(word.removeprefix("×")) for word in words]
    assert min(values) < 1 < max(values) and values == sorted(values, reverse=True)
    np.testing.assert_allclose(np.array(lengths) / lengths[0], np.array(values) / values[0], 0.02)


def test_several_models_stand_side_by_side_on_the_same_scales(tmp_path, driver):
    for run, experts, classes in (("<a>", 8, 5), ("b", 4, 3)):
        counts = counts_with_gallery(num_experts=experts, num_classes=classes)
        counts.settings["run"] = run
        (folder := tmp_path / run.strip("<>")).mkdir()
        counts.save(folder / "expert_data.npz")
    save_ablation(tmp_path / "a" / "expert_ablation.jsonl", {}, [Ablation(0, 0, 0.1, 0.1, 0.1)])
    call_main("expert_report.py", "--data", tmp_path / "a", tmp_path / "b" / "expert_data.npz")
    page = tmp_path / "expert_reports.html"
    assert [data_of(page, i)["experts"] for i in (0, 1)] == [8, 4]
    show(driver, f"{page.as_uri()}#layer-1-expert-5-expert-2", 1280)
    assert driver.find_element("css selector", "h1").text == "Experts of <a> and b"
    names = views(driver, "name")
    assert [name.text for name in names] == ["5 of layer 1", "2 of layer 1"]
    views(driver, "after")[1].click()
    assert [name.text for name in names] == ["5 of layer 1", "3 of layer 1"]
    titles = driver.find_elements("css selector", "#classSection .title")
    assert [title.text for title in titles] == ["<a>", "b"]
    for name in ("load", "byClass", "byStep", "placeScale", "kept", "similarity"):
        first, second = (
            [part.text for part in view.find_elements("css selector", ".scale span")[:2]]
            for view in views(driver, name)
        )
        assert first == second and all(first)
    heights = [view.get_property("clientHeight") for view in views(driver, "byClass")]
    assert heights[0] == heights[1]  # the three classes that both have
    assert not driver.find_element("id", "damageSection").is_displayed()  # of one model only
    left, right = (view.rect for view in views(driver, "load"))
    assert left["y"] == right["y"] and right["x"] > 600
    assert_fits(driver, 1280)
    show(driver, page.as_uri(), 390)
    first, second = (view.rect for view in views(driver, "load"))
    assert first["x"] == second["x"] and second["y"] > first["y"] + first["height"]
    assert_fits(driver, 390)
    assert not driver.get_log("browser")


def test_models_that_cannot_be_compared_are_refused(tmp_path, capsys):
    files = [tmp_path / f"{layers}.npz" for layers in (2, 3)]
    for layers, file in zip((2, 3), files, strict=True):
        counts_with_gallery(num_layers=layers).save(file)
    line = expect_error(capsys, "expert_report.py", "--data", *files)
    assert f"got experts in layers 0, 1, 2 of {files[1]}, expected 0, 1 as in {files[0]}" in line
    for flags in (("--ablation", files[0]), ("--only", "patch")):
        line = expect_error(capsys, "expert_report.py", "--data", *files, *flags)
        assert f"{flags[0]}: has no effect with several --data" in line
    assert sorted(tmp_path.iterdir()) == files


def test_wrong_arguments_of_a_report_are_one_line_errors(tmp_path, capsys):
    data, file, old, other = (
        tmp_path / n for n in ("counts.npz", "file", "old.npz", "other.jsonl")
    )
    random_counts().save(data)
    file.touch()
    np.savez(old, by_class=np.ones((3, 2, 4)))
    save_ablation(other, {}, [Ablation(0, 64, None, None, 0.1)])
    for arguments, message in (
        (("--data", old), "got format 1, expected 3: run expert_data.py again"),
        (("--data", data, "--layers", "1"), "--layers: has no effect without --only"),
        (("--data", data, "--output", tmp_path / "x.pdf"), "expected .html without --only"),
        (("--data", data, "--ablation", file), "not the file of expert_ablation.py"),
        (("--data", data, "--ablation", other), "has experts of another model"),
    ):
        assert message in expect_error(capsys, "expert_report.py", *arguments)
