"""The page in a real browser: what a visitor chooses is what is drawn and shown, step by step."""

import io
import shutil
import socket
import sys
from base64 import b64decode

import numpy as np
import pytest
from conftest import expect_error
from PIL import Image
from test_models import randomised

from app import AppConfig, launch
from checkpoints import Record, save_model
from sampling.pipeline import open_pipeline

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
        record = Record(config=model.config, objective=objective, **facts)
        paths[name] = str(folder / f"{name}.safetensors")
        save_model(folder / f"{name}.safetensors", model.state_dict(), record)
    return paths


@pytest.fixture(scope="module")
def config(checkpoints) -> AppConfig:
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sides = dict(ckpt=checkpoints["topk"], compare=checkpoints["expert_choice"])
    return AppConfig(**sides, port=port, num_sampling_steps=STEPS)


@pytest.fixture(scope="module")
def browser(config):
    """A browser that begins with an empty page while ours is served."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("needs the programs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    page = launch(config)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
    page.close()


class Visitor:
    """Someone in a tab of their own."""

    def __init__(self, browser, config: AppConfig):
        browser.switch_to.new_window("tab")
        self.browser, self.tab = browser, browser.current_window_handle
        browser.get(f"http://127.0.0.1:{config.port}")

    def all(self, selector: str) -> list:
        self.browser.switch_to.window(self.tab)
        return self.browser.find_elements("css selector", selector)

    def wait(self, selector: str, text: str = ""):
        """The first such element with that text, as soon as it is there."""
        from selenium.webdriver.support.ui import WebDriverWait

        def find(_):
            return next((e for e in self.all(selector) if text in e.text), None)

        return WebDriverWait(self.browser, 60).until(find, f"no {text!r} in {selector}")

    def choose(self, class_name: str) -> None:
        self.wait("input[aria-label=Class]").click()
        self.wait("[role=option]", class_name).click()

    def pictures(self) -> list[str]:
        return [image.get_attribute("src") for image in self.all(".sides img")]


def pixels(address: str) -> np.ndarray:
    image = Image.open(io.BytesIO(b64decode(address.removeprefix("data:image/png;base64,"))))
    return np.asarray(image.convert("RGB")).astype(int)


def assert_draws(address: str, ckpt: str, label: int, seed: int) -> None:
    """That a picture is what sample.py draws."""
    pipeline = open_pipeline(AppConfig(ckpt=ckpt, num_sampling_steps=STEPS))
    want = pipeline.images([label], [seed])[0].permute(1, 2, 0).int().numpy()
    assert np.abs(pixels(address) - want).max() <= 1


def test_a_visitor_draws_a_class_and_moves_through_its_steps(browser, config):
    visitor = Visitor(browser, config)
    visitor.choose(NAMES[3])
    visitor.wait("button", "Next seed").click()
    visitor.wait("output", f"step {STEPS} of {STEPS}")
    last = visitor.pictures()
    assert len(last) == 2 * (1 + 2)  # the image and two layers, on both sides
    assert f"{NAMES[3]}, seed 1" in visitor.wait("figcaption").text
    saved = visitor.all("a[download]")
    assert saved[0].get_attribute("download") == "000001-class-0003.png"
    for link, ckpt, picture in zip(saved, (config.ckpt, config.compare), last[::3], strict=True):
        assert link.get_attribute("href") == picture
        assert_draws(picture, ckpt, label=3, seed=1)
    assert pixels(last[1]).shape == (4, 4, 3)  # a pixel a patch, of which the page makes squares
    slider = visitor.wait("input[aria-label=Step]")
    slider.send_keys("\ue011")  # Home
    visitor.wait("output", f"step 1 of {STEPS}, t = 1")
    first = visitor.pictures()
    assert first[0] != last[0] and first[3] != last[3]
    slider.send_keys("\ue010")  # End
    visitor.wait("output", f"step {STEPS} of")
    assert visitor.pictures() == last


def test_two_visitors_at_once_get_each_their_own(browser, config):
    visitors = {label: Visitor(browser, config) for label in (1, 2)}
    for label, visitor in visitors.items():
        visitor.choose(NAMES[label])
    for visitor in visitors.values():
        visitor.wait("button", "Draw").click()
    for label, visitor in visitors.items():
        visitor.wait("figcaption", f"{NAMES[label]}, seed 0")
        links = visitor.all("a[download]")
        for link, ckpt in zip(links, (config.ckpt, config.compare), strict=True):
            assert_draws(link.get_attribute("href"), ckpt, label, seed=0)


def test_what_cannot_be_drawn_is_said_in_one_line(browser, config):
    visitor = Visitor(browser, config)
    visitor.wait("button", "Sampler").click()
    number = visitor.wait("input[aria-label='number input for Guide from t']")
    number.clear()
    number.send_keys("1\n")
    visitor.wait("button", "Draw").click()
    visitor.wait("body", "\n--guidance-interval (got 1 1, expected 0 <= low < high <= 1)")
    assert not visitor.pictures()


def test_without_gradio_a_line_says_how_to_get_it(checkpoints, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = expect_error(capsys, "app.py", "--ckpt", checkpoints["topk"])
    assert "pip install -r requirements-extras.txt" in line


def test_a_checkpoint_of_another_objective_is_not_drawn_beside(checkpoints, capsys):
    pytest.importorskip("gradio")
    flags = ("--ckpt", checkpoints["topk"], "--compare", checkpoints["gaussian"])
    line = expect_error(capsys, "app.py", *flags)
    assert "--compare" in line and "objective: got gaussian, expected rectified_flow" in line
