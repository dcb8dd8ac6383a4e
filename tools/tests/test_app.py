"""The demo page in a real browser: it shows the images and steps that a visitor chooses."""

import gc
import io
import json
import socket
import sys
import time
from base64 import b64decode
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers import ROOT, expect_error, free_port, open_browser, save_checkpoint
from PIL import Image
from test_models import randomised

from app import AppConfig
from runtime.errors import UserError
from sampling.pipeline import open_pipeline
from tools import page
from tools.page import launch, opened

NAMES = ("ape", "Bee", "cat", "<b>dog</b>")
STEPS = 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_vae) -> dict[str, str]:
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    facts = dict(image_size=16, vae_path=str(tiny_vae), class_names=NAMES)
    for name in ("topk", "expert_choice", "gaussian"):
        router = "topk" if name == "gaussian" else name
        objective = "gaussian" if name == "gaussian" else "rectified_flow"
        model = randomised(num_classes=4, class_dropout_prob=0.1, router=router)
        path = folder / f"{name}.safetensors"
        paths[name] = str(save_checkpoint(model, path, objective=objective, **facts))
    return paths


@pytest.fixture(scope="module")
def config(checkpoints) -> AppConfig:
    pytest.importorskip("gradio")
    sides = dict(ckpt=checkpoints["topk"], compare=checkpoints["expert_choice"])
    return AppConfig(**sides, port=free_port(), num_sampling_steps=STEPS)


@pytest.fixture(scope="module")
def server(config):
    """The demo page, served."""
    pytest.importorskip("gradio")
    page = launch(config)
    yield page
    page.close()


@pytest.fixture(scope="module")
def browser(server):
    """Browser on an empty page, while the demo page is served."""
    with open_browser() as driver:
        yield driver


DARK = """
return [...arguments[0].getContext("2d").getImageData(0, 0, 4, 4).data].filter((_, i) => i % 4 == 3)
"""


class Visitor:
    """Visitor of the page in a separate browser tab."""

    def __init__(self, browser, config: AppConfig):
        browser.switch_to.new_window("tab")
        self.browser, self.tab = browser, browser.current_window_handle
        browser.get(f"http://127.0.0.1:{config.port}")

    def all(self, selector: str) -> list:
        self.browser.switch_to.window(self.tab)
        return self.browser.find_elements("css selector", selector)

    def wait(self, selector: str, text: str = ""):
        """Waits for an element that contains the text, and returns the first one."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        def find(_):
            return next((e for e in self.all(selector) if text in e.text), None)

        redrawn = [StaleElementReferenceException]  # between finding an element and its text
        wait = WebDriverWait(self.browser, 60, ignored_exceptions=redrawn)
        return wait.until(find, f"no {text!r} in {selector}")

    def choose(self, class_name: str, control: str = "Class") -> None:
        self.wait(f"input[aria-label='{control}']").click()
        self.wait("[role=option]", class_name).click()

    def set(self, control: str, value: object) -> None:
        """Types a number into a control."""
        number = self.wait(f"input[aria-label='{control}']")
        number.send_keys("\ue009" + "a")  # Control-A
        number.send_keys("\ue017" if value == "" else f"{value}\n")  # Delete

    def top_of_image(self) -> float:
        """Distance in pixels between the upper edges of the row of steps and of the image."""
        return self.browser.execute_script(
            "const [a, b] = ['.steps', '.image'].map((one) => document.querySelector(one));"
            "return b.getBoundingClientRect().top - a.getBoundingClientRect().top"
        )

    def pictures(self) -> list[str]:
        return [image.get_attribute("src") for image in self.all(".sides img")]


@pytest.fixture
def visit(browser, config):
    """Function that opens a tab. The tabs are closed after the test, to free their connections."""
    yield lambda: Visitor(browser, config)
    for tab in browser.window_handles[1:]:
        browser.switch_to.window(tab)
        browser.close()
    browser.switch_to.window(browser.window_handles[0])


def pixels(address: str) -> np.ndarray:
    image = Image.open(io.BytesIO(b64decode(address.removeprefix("data:image/png;base64,"))))
    return np.asarray(image.convert("RGB")).astype(int)


def assert_draws(address: str, ckpt: str, label: int, seed: int, **settings) -> None:
    """Asserts that an image equals the one that sample.py generates."""
    pipeline = open_pipeline(AppConfig(ckpt=ckpt, num_sampling_steps=STEPS))
    want = pipeline.images([label], [seed], **settings)[0].permute(1, 2, 0).int().numpy()
    assert np.abs(pixels(address) - want).max() <= 1


def test_a_visitor_generates_an_image_of_a_class_and_views_its_steps(visit, config):
    visitor = visit()
    visitor.choose(NAMES[3])
    visitor.wait("figcaption", f"{NAMES[3]}, seed 0")  # appears without a click on Draw
    visitor.wait("button", "Next seed").click()
    visitor.wait("figcaption", f"{NAMES[3]}, seed 1")
    visitor.wait("output", f"step {STEPS} of {STEPS}: the image")
    last = visitor.pictures()
    assert len(last) == 2 * (1 + 2)  # the image and two layers, on both sides
    saved = visitor.all("a[download]")
    assert saved[0].get_attribute("download") == "000001-class-0003.png"
    for link, ckpt, picture in zip(saved, (config.ckpt, config.compare), last[::3], strict=True):
        assert link.get_attribute("href") == picture
        assert_draws(picture, ckpt, label=3, seed=1)
    assert pixels(last[1]).shape == (4, 4, 3)  # one pixel per patch; the page enlarges the pixels
    assert last[0] in visitor.all("section")[0].get_attribute("style")  # below the maps of experts
    slider = visitor.wait("input[aria-label=Step]")
    slider.send_keys("\ue011")  # Home
    visitor.wait("output", f"step 1 of {STEPS}, t = 1")
    first = visitor.pictures()
    assert first[0] != last[0] and first[3] != last[3]
    slider.send_keys("\ue010")  # End
    visitor.wait("output", f"step {STEPS} of")
    assert visitor.pictures() == last
    chip, *others = visitor.all("section:first-child .legend button")
    assert {other.rect["y"] for other in others} == {chip.rect["y"]}
    colour = [int(chip.get_attribute("data-colour")[i : i + 2], 16) for i in (1, 3, 5)]
    chip.click()  # marks the expert in the layers of its side
    maps = [visitor.browser.execute_script(DARK, canvas) for canvas in visitor.all(".map canvas")]
    assert len(maps) == 2
    for dark, picture in zip(maps, last[1:3], strict=True):
        of_others = (pixels(picture) != colour).any(-1)
        assert np.array_equal(np.array(dark).reshape(of_others.shape) > 0, of_others)
    chip.click()
    assert not visitor.all(".map canvas")


def test_a_grid_has_one_row_per_class_and_one_column_per_seed(config):
    configs = [replace(config, ckpt=ckpt) for ckpt in (config.ckpt, config.compare)]
    controls = dict(label=0, seed=0, images=2, more=[2], sampler="euler", steps=STEPS, live=True)
    shown = page.draw(configs, controls | dict(scale=3.0, low=0.0, high=1.0), lambda _: None)
    cells = [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert shown["grid"] and not shown["frames"]
    for side, ckpt in zip(shown["sides"], (config.ckpt, config.compare), strict=True):
        assert side["columns"] == 2
        for cell, (label, seed) in zip(side["cells"], cells, strict=True):
            assert cell["caption"] == f"{NAMES[label]}, seed {seed}"
            assert_draws(cell["png"], ckpt, label, seed, cfg_scale=3.0)


@pytest.fixture
def calls(config):
    """Times of the forward passes of the model on the left side."""
    seen = []

    def note(*_) -> None:
        seen.append(time.monotonic())
        time.sleep(0.1)  # so that 250 steps take longer than a click on a busy machine

    hook = opened(config).model.register_forward_hook(note)
    yield seen
    hook.remove()


def wait_for_an_end(calls: list) -> None:
    while time.monotonic() - calls[-1] < 1:
        time.sleep(0.1)


def test_the_stop_button_and_closing_the_tab_end_the_sampling(visit, browser, calls):
    for leave in (False, True):
        visitor = visit()
        visitor.wait("figcaption", f"{NAMES[0]}, seed 0")
        wait_for_an_end(calls)
        before, top = len(calls), visitor.top_of_image()
        visitor.wait("label", "Draw while controls move").click()
        visitor.set("number input for Steps", 250)
        visitor.wait("button", "Draw").click()
        visitor.wait("output", " of 250, t = 0.9")  # the image is shown while it forms
        assert visitor.top_of_image() == top  # where it was, below the slider
        if leave:
            browser.close()
            browser.switch_to.window(browser.window_handles[0])
        else:
            visitor.wait("button", "Stop").click()
        wait_for_an_end(calls)
        assert len(calls) < before + 249
        if not leave:  # the unfinished image stays
            visitor.wait("output", " of 250")
            assert len(visitor.all(".image")) == 1 and len(visitor.all(".map")) == 2
    visitor = visit()
    visitor.wait("figcaption", f"{NAMES[0]}, seed 0")  # the page still draws


WRONG = {
    ("Seed", "1.5"): "Seed: got 1.5, expected an integer from 0 to 4294967295",
    ("Seed", ""): "Seed: got nothing, expected an integer",
    ("number input for Guide from t", "1"): "Guide from t, to t: got 1 1, expected 0 <= low < high",
}


def test_a_wrong_value_on_the_page_is_a_one_line_error_that_names_the_control(visit, config, capfd):
    for changes, message in (({"steps": 0}, "Steps: got 0"), ({"cfg_scale": -1}, "Guidance: got")):
        with pytest.raises(UserError) as wrong:  # values that the browser never sends
            opened(config).with_settings(**changes)
        assert page.page_error(wrong.value).startswith(message)
    for changes, message in (
        ({"label": "bee"}, "Class: got bee"),
        ({"label": 4}, "Class: got 4, expected a class of the model, such as ape"),
        ({"steps": 10**7}, "Steps: got 10000000, expected an integer from 1 to 250"),
        ({"more": 5}, "Also draw: got 5, expected a list of classes"),
    ):
        controls = dict(label=0, seed=0, images=1, more=[], steps=2) | changes
        with pytest.raises(UserError, match=message):
            page.draw([config], controls, lambda *_: None)
    with pytest.raises(UserError) as wrong:
        page.draw([replace(config, ema="nope")], controls, lambda *_: None)
    assert page.page_error(wrong.value).startswith("EMA: got nope")
    visitor = visit()
    visitor.wait("figcaption", f"{NAMES[0]}, seed 0")
    visitor.wait("label", "Draw while controls move").click()
    visitor.wait("button", "Sampler").click()
    for (control, value), message in WRONG.items():
        visitor.set("Seed", 0)
        visitor.set(control, value)
        visitor.wait("button", "Draw").click()
        visitor.wait("body", f"\n{message}")
        assert visitor.all("figcaption")[0].text.startswith(f"{NAMES[0]}, seed 0")
    assert "Traceback" not in capfd.readouterr().err


def post(config, path: str, content: bytes, kind: str, **headers) -> int:
    """Status code of the server's response to a POST request."""
    url = f"http://127.0.0.1:{config.port}/gradio_api/{path}"
    try:
        headers = {"Content-Type": kind, **headers}
        return urlopen(Request(url, content, headers), timeout=60).status
    except HTTPError as error:
        return error.code


def request_of(config, **changed) -> dict:
    """The request of the Draw button, with other values of the controls of these labels."""
    served = json.load(urlopen(f"http://127.0.0.1:{config.port}/config", timeout=60))
    values = {c["id"]: c["props"].get("value") for c in served["components"]}
    labels = {c["id"]: str(c["props"].get("label")).split()[0] for c in served["components"]}
    draw = next(d for d in served["dependencies"] if d["api_name"] == "answer")
    data = [changed.get(labels[i], values[i]) for i in draw["inputs"]]
    return {"data": data, "fn_index": draw["id"], "session_hash": "nobody"}


def test_a_site_whose_name_leads_here_reaches_nothing(server, config):
    """DNS rebinding: the request of another site's page names that site."""
    content = json.dumps(request_of(config)).encode()
    for host, status in (("evil.example:7860", 400), ("localhost", 200)):
        assert post(config, "queue/join", content, "application/json", Host=host) == status
    assert page.hosts_of(replace(config, host="0.0.0.0")) == ["*"]


def test_a_value_without_a_hash_is_an_error_that_names_its_control(server, config):
    content = json.dumps(request_of(config, EMA={"a": 1})).encode()
    assert post(config, "queue/join", content, "application/json") == 200
    address = f"http://127.0.0.1:{config.port}/gradio_api/queue/data?session_hash=nobody"
    with urlopen(address, timeout=60) as events:
        assert any(b"EMA: got {'a': 1}" in line for line in events)


def test_the_server_keeps_no_pictures_of_earlier_drawings(server, config):
    from gradio import HTML

    numbers, address = [], f"http://127.0.0.1:{config.port}/gradio_api/queue/data?session_hash="
    for seed in range(4):
        content = json.dumps(request_of(config, Seed=seed)).encode()
        assert post(config, "queue/join", content, "application/json") == 200
        with urlopen(f"{address}nobody", timeout=60) as events:
            assert any(b"process_completed" in line for line in events)
        gc.collect()
        numbers.append(sum(isinstance(one, HTML) for one in gc.get_objects()))
    assert numbers[1:] == numbers[:1] * 3


def test_the_server_rejects_uploads_and_limits_its_queue(visit, config, calls, monkeypatch):
    bound = "--b\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\n"
    upload = f"{bound}{'x' * 10_000}\r\n--b--\r\n".encode()
    assert post(config, "upload", upload, "multipart/form-data; boundary=b") == 413
    large = json.dumps({"data": "x" * 2_000_000}).encode()
    assert post(config, "queue/join", large, "application/json") == 413
    visitor = visit()
    visitor.wait("figcaption", f"{NAMES[0]}, seed 0")
    slow = request_of(config, Steps=250)
    requests = ({**slow, "session_hash": f"nobody{i}"} for i in range(40))
    with monkeypatch.context() as impatient:
        impatient.setattr(page, "UNREAD_SECONDS", 0.3)
        answers = [
            post(config, "queue/join", json.dumps(request).encode(), "application/json")
            for request in requests
        ]
        assert set(answers) == {200, 503}
        wait_for_an_end(calls)
    visitor.wait("button", "Next seed").click()
    visitor.wait("figcaption", f"{NAMES[0]}, seed 1")


def test_the_page_opens_the_emoji_model_by_default_with_a_class_that_it_samples_well(monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.chdir(ROOT)
    with gradio.Blocks():
        label = page.make_controls(gradio, [AppConfig()])["label"]
    names = dict(label.choices)
    assert len(names) == 70 and names["activities-other"] == 0
    assert label.value == names["face-smiling"]


def test_models_with_other_classes_are_compared_on_the_classes_that_both_have(tmp_path, tiny_vae):
    facts = dict(image_size=16, vae_path=str(tiny_vae), objective="rectified_flow")
    configs = []
    for names in (("ape", "cat", "dog"), ("dog", "ant", "bee", "cat")):
        model = randomised(num_classes=len(names), class_dropout_prob=0.1)
        path = save_checkpoint(
            model, tmp_path / f"{len(names)}.safetensors", class_names=names, **facts
        )
        configs.append(AppConfig(ckpt=str(path), num_sampling_steps=STEPS))
    assert page.shared_classes(configs) == [("cat", [1, 3]), ("dog", [2, 0])]
    controls = dict(label=0, seed=0, images=1, more=[], sampler="euler", steps=STEPS, live=True)
    controls |= dict(scale=1.5, low=0.0, high=1.0)
    sides = page.draw(configs, controls, lambda preview: None)["sides"]
    for side, config, label in zip(sides, configs, (1, 3), strict=True):
        assert side["caption"] == "cat, seed 0"
        assert_draws(side["png"], config.ckpt, label=label, seed=0)


def test_the_page_draws_with_a_model_of_pixels_in_its_guidance_interval(tmp_path):
    model = randomised(num_classes=2, class_dropout_prob=0.1, in_channels=3, learn_sigma=False)
    facts = dict(objective="flow_x", vae_path="pixels", image_size=8)
    path = save_checkpoint(model, tmp_path / "pixels.safetensors", **facts)
    config = AppConfig(ckpt=str(path))
    assert opened(config).settings.guidance_interval == (0.1, 0.9)
    controls = dict(label=1, seed=3, scale=2.0, steps=2, live=False, images=1, more=[],
                    sampler="heun", low=0.1, high=0.9, ema="")  # fmt: skip
    shown = page.draw([config], controls, lambda preview: None)
    want = opened(config).images([1], [3], steps=2, cfg_scale=2.0, sampler="heun")
    assert np.array_equal(pixels(shown["sides"][0]["png"]), want[0].permute(1, 2, 0).numpy())


def test_missing_gradio_is_an_error_with_the_install_command(checkpoints, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = expect_error(capsys, "app.py", "--ckpt", checkpoints["topk"])
    assert "pip install -r requirements-extras.txt" in line


def test_the_app_rejects_comparing_checkpoints_with_different_objectives(checkpoints, capsys):
    pytest.importorskip("gradio")
    flags = ("--ckpt", checkpoints["topk"], "--compare", checkpoints["gaussian"])
    line = expect_error(capsys, "app.py", *flags)
    assert "--compare" in line and "objective: got gaussian, expected rectified_flow" in line


def test_a_busy_port_is_a_one_line_error(checkpoints, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        line = expect_error(capsys, "app.py", "--ckpt", checkpoints["topk"], "--port", port)
    assert f"--port {port}" in line


def test_an_unknown_checkpoint_is_an_error_before_gradio_is_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "nowhere: no such file" in expect_error(capsys, "app.py", "--ckpt", "nowhere")
