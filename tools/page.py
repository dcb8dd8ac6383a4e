"""The web page of app.py: controls, images and maps of experts.

`draw` needs no gradio. `launch` serves the page from threads of this process.
"""

import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor
from torchvision.io import encode_png

from analysis.pictures import ExpertPicture, Trajectory, expert_colours
from checkpoints import averages_of
from runtime.errors import UserError, did_you_mean, printable, reported_as
from sampling.generate import objective_of
from sampling.pipeline import SamplingPipeline, check_same_task, open_pipeline
from sampling.sampling_config import MODEL_FLAGS, SamplingConfig

# Arguments of gr.HTML. The `value` in the view is the result of `draw`; Handlebars escapes it.
PAGE = {"html_template": "view.html", "css_template": "style.css", "js_on_load": "script.js"}
# On a narrow screen, the first controls stand above the pictures, and the others below.
LAYOUT = """
#first { gap: 0.5rem }
#waiting { height: 1rem; margin: -0.5rem 0 -1rem; padding: 0 }  /* in the gap below the buttons */
#waiting .html-container, #waiting .error, #waiting .clear-status { display: none }
#waiting .wrap { overflow: visible }
#waiting .progress-text { margin: 0; padding: 0; font-size: 0.75rem; line-height: 1rem }
@media (max-width: 700px) {
  #page { flex-direction: column; gap: 1rem } #left { display: contents }
  #left > * { order: 2 } #left > #first { order: 0 } #right { order: 1 }
  #right:has(.empty) { display: none }
}
"""
FOLDER = Path(__file__).parent.parent / "assets" / "page"
# Flags that describe --ckpt and are reset for --compare.
ABOUT_CKPT = dict.fromkeys(
    (*MODEL_FLAGS, "router", "ema", "model", "vae_path", "image_size", "guide_ckpt")
)
INTRODUCTION = (
    "Choose a class and press Draw: an image forms out of noise, and its patches go to experts."
)
FIRST_CLASS = "face-smiling"  # class that the page shows first; without it, the model's first class
FEW_STEPS = 8  # up to this number of steps, the page by default draws while a control moves
MOST_IMAGES = 64  # largest number of images in a grid
MOST_STEPS = 250  # largest value of the slider, unless the page was started with more steps
MOST_WAITING = 16  # requests in the queue; more are rejected
PREVIEW_SECONDS, PREVIEW_SHARE = 0.4, 0.2  # time between previews, and share of the time for them
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")  # names of this machine for itself
MOST_BYTES = 1_000_000  # of a request
UNREAD_SECONDS = 5.0  # a browser that leaves messages unread for longer is considered closed
NAMES = {  # names of the controls, by the names that errors use
    "labels": "Class", "seeds": "Seed", "--seed": "Seed", "sampler": "Sampler",
    "--sampler": "Sampler", "num_sampling_steps": "Steps", "--num-sampling-steps": "Steps",
    "cfg_scale": "Guidance", "--cfg-scale": "Guidance", "ema": "EMA", "--ema": "EMA",
    "guidance_interval": "Guide from t, to t", "--guidance-interval": "Guide from t, to t",
}  # fmt: skip

# Called after each step of a sampler, with None or a function that returns what there is to show.
AfterStep = Callable[[Callable | None], None]

opened = lru_cache(maxsize=2)(open_pipeline)  # two, for both sides, or for two EMAs


class Stopped(Exception):
    """Raised in a sampler when the visitor presses Stop or leaves the page."""


def png(image: Tensor) -> str:
    """Encodes an image (3, H, W) uint8 as a data URL."""
    return "data:image/png;base64," + b64encode(encode_png(image).numpy().tobytes()).decode()


def describe(pipeline: SamplingPipeline, path: str) -> dict:
    """Returns title and subtitle of one side."""
    config, title = pipeline.model.config, pipeline.checkpoint.record.model_name
    experts = f"-{config.num_experts}E{config.num_experts_per_tok}A, {config.router.name}"
    title += experts if config.num_experts else ", dense"
    return {"title": title, "about": f"{path}: {pipeline.describe()}"}


def draw_cell(pipeline: SamplingPipeline, image: Tensor, label: int, seed: int) -> dict:
    """Returns an image (3, H, W) with its caption and file name, for the view."""
    return {
        "caption": f"{pipeline.class_names[label]}, seed {seed}", "png": png(image),
        "file": f"{seed:06d}-class-{label:04d}.png",
        "pixels": "pixels" if image.shape[-1] <= 128 else "",
    }  # fmt: skip


def draw_image(
    pipeline: SamplingPipeline, label: int, seed: int, after_step: AfterStep
) -> tuple[dict, list[list[str]], list[str]]:
    """Generates one image; returns its description, its pictures at each step, and step names.

    The pictures of a step are the predicted image and a map of experts for each layer. After a step
    with pictures, `after_step` gets a function that returns the same for this step only.
    """
    config, num_steps = pipeline.model.config, pipeline.settings.num_steps
    layers, hooks = config.sparse_blocks, ExitStack()
    pictures = [trajectory := Trajectory(num_steps)]
    if layers:
        pictures.append(experts := ExpertPicture(pipeline.model, num_steps, range(len(layers))))
        hooks = experts.hooks
    recorded = sorted(trajectory.recorded_steps)

    def shown(latents: Tensor) -> tuple[dict, list[list[str]], list[str]]:
        """Shows the newest of the recorded steps, given their predictions (F, C, h, w)."""
        newest, legend = slice(-len(latents), None), []
        images = pipeline.decode(latents)
        frames = [[png(image)] for image in images]
        if layers:
            chosen = torch.stack([frame[2][:, 0] for frame in experts.frames[newest]])  # (F, L, T)
            for frame, maps in zip(frames, experts.maps(chosen), strict=True):
                frame += map(png, maps)
            colours = ["#" + bytes(colour).hex() for colour in expert_colours(experts.num_experts)]
            legend = [{"name": str(i), "colour": colour} for i, colour in enumerate(colours[:-1])]
            legend += [{"name": "none", "colour": colours[-1]}] if -1 in chosen else []
        about = {"legend": legend, "layers": list(layers)}
        steps = zip(recorded[: len(trajectory.frames)], trajectory.frames, strict=True)
        names = [f"step {i + 1} of {num_steps}, t = {t:.3g}" for i, (t, _) in steps]
        return draw_cell(pipeline, images[-1], label, seed) | about, frames, names[newest]

    def watch(state: dict) -> None:
        for picture in pictures:
            picture(state)
        is_recorded = state["step"] in trajectory.recorded_steps
        after_step(partial(shown, trajectory.frames[-1][1]) if is_recorded else None)

    with hooks:
        latents = pipeline.latents([label], [seed], watch)
    about, frames, names = shown(torch.cat([*(x for _, x in trajectory.frames[:-1]), latents]))
    return about, frames, [*names[:-1], f"step {num_steps} of {num_steps}: the image"]


def draw_grid(
    pipeline: SamplingPipeline, labels: list[int], seeds: list[int], after_step: AfterStep
) -> list[dict]:
    """Generates images of each class from the same seeds; returns the cells, ordered by class.

    After each step, `after_step` gets a function that returns the cells so far.
    """
    cells: list[dict] = []

    def with_images(images: Tensor, label: int) -> list[dict]:
        pairs = zip(images, seeds, strict=True)
        return cells + [draw_cell(pipeline, image, label, seed) for image, seed in pairs]

    for label in labels:

        def watch(state: dict, label: int = label) -> None:
            x = state["pred_xstart"]
            after_step(lambda: with_images(pipeline.decode(x), label))

        images = pipeline.images([label] * len(seeds), seeds, watch)
        cells = with_images(images, label)
    return cells


def draw(
    configs: list[SamplingConfig], given: dict, after_step: Callable[[Callable | None], None]
) -> dict:
    """Generates the requested images with each checkpoint; returns the data of assets/page.

    given: values of the controls, by name
    after_step: called after each step, with None or a function that returns the data so far
    """
    most_steps = max(MOST_STEPS, *(opened(config).settings.num_steps for config in configs))
    classes = shared_classes(configs)
    labels, seeds = requested_images(given, most_steps, classes)
    sides, drawn = [], []
    is_grid = len(labels) * len(seeds) > 1

    def data(side: dict, frames: list, steps: list[str], live: bool) -> dict:
        """Combines a side with the finished ones, of which earlier frames may be left out."""
        parts = [earlier[-len(frames) :] for earlier in drawn] + [frames]
        frames = [sum(pictures, []) for pictures in zip(*parts, strict=True)]
        return {
            "sides": [*sides, side], "frames": frames, "steps": steps, "last": len(frames) - 1,
            "grid": is_grid, "live": live,
        }  # fmt: skip

    for number, config in enumerate(configs):
        pipeline = opened(config)
        changes = {"cfg_scale": given["scale"], "guidance_interval": (given["low"], given["high"])}
        sampler = {"sampler": given["sampler"], "steps": int(given["steps"])}
        if tuple(sampler.values()) != (pipeline.settings.sampler, pipeline.settings.num_steps):
            changes |= sampler
        pipeline = pipeline.with_settings(**changes)
        about = describe(pipeline, config.ckpt)
        chosen = [classes[label][1][number] for label in labels]

        def complete(found, live: bool, about: dict = about) -> dict:
            if is_grid:
                return data({**about, "cells": found, "columns": len(seeds)}, [], [], live)
            side, frames, steps = found
            return data(about | side, frames, steps, live)

        def step(preview: Callable | None, complete=complete) -> None:
            after_step(preview and (lambda: complete(preview(), live=True)))

        if is_grid:
            found = draw_grid(pipeline, chosen, seeds, step)
        else:
            found = draw_image(pipeline, chosen[0], seeds[0], step)
            frames = found[1]
        shown = complete(found, live=bool(given["live"]))
        sides.append(shown["sides"][-1])
        drawn.append([] if is_grid else frames)
    return shown


def shared_classes(configs: list[SamplingConfig]) -> list[tuple[str, list[int]]]:
    """Returns the classes that all checkpoints have: name, and the label in each checkpoint.

    Checkpoints with the same list of classes share them by number, as names may occur twice.
    """
    first, *others = names = [opened(config).class_names for config in configs]
    if all(other == first for other in others):
        return [(name, [label] * len(names)) for label, name in enumerate(first)]
    return [
        (name, [each.index(name) for each in names])
        for name in dict.fromkeys(first)
        if all(name in other for other in others)
    ]


def requested_images(
    given: dict, most_steps: int, classes: list[tuple[str, list[int]]]
) -> tuple[list[int], list[int]]:
    """Returns the requested classes, as places in `shared_classes`, and seeds."""
    seed, number = given["seed"], given["images"]
    for name, value, least, most in (
        ("Seed", seed, 0, 2**32 - 1),
        ("Images", number, 1, 8),
        ("Steps", given["steps"], 1, most_steps),  # a request may exceed the slider's range
    ):
        is_number = isinstance(value, int | float)
        if not is_number or not least <= value <= most or value != int(value):
            got = "nothing" if value in (None, "") else value
            raise UserError(f"{name}: got {got!s:.80}, expected an integer from {least} to {most}")
    more = given["more"] or []
    if not isinstance(more, list):
        raise UserError(f"Also draw: got {more!s:.80}, expected a list of classes")
    labels = [given["label"], *more]
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < len(classes):
            names = {name: name for name, _ in classes}
            hint = did_you_mean(str(label), names) or f", such as {classes[0][0]}"
            raise UserError(f"Class: got {label!s:.80}, expected a class of the model{hint}")
    labels = list(dict.fromkeys(labels))
    seeds = list(range(int(seed), min(int(seed + number), 2**32)))
    if (total := len(labels) * len(seeds)) > MOST_IMAGES:
        raise UserError(f"Also draw: got {total} images, expected at most {MOST_IMAGES}")
    return labels, seeds


def raw(component):
    """Disables gradio's checks of a control, which print a traceback and do not name the control.

    `answer` then receives the values as the browser sends them.
    """
    component.preprocess = lambda value: value
    return component


def make_controls(gr, configs: list[SamplingConfig]) -> dict:
    """Creates the controls, by the names that `draw` uses."""
    config = configs[0]
    s, names = opened(config).settings, [name for name, _ in shared_classes(configs)]
    found = averages_of(Path(config.ckpt)) if Path(config.ckpt).is_dir() else ()
    # Without --ema the first one is used.
    emas = [(name, name if number else "") for number, name in enumerate(found)]
    emas = emas or [(config.ema or "first", config.ema or "")]
    samplers = objective_of(s).samplers
    classes = [(name, i) for i, name in enumerate(names)]
    first = names.index(FIRST_CLASS) if FIRST_CLASS in names else 0
    # With custom values, `answer` gets the name of an unknown class, and says that it is unknown.
    label = gr.Dropdown(classes, value=first, label="Class", allow_custom_value=True, render=False)
    seed = gr.Number(config.seed, label="Seed", info="determines the initial noise", precision=0)
    scale = gr.Slider(0, max(10, s.cfg_scale), s.cfg_scale, step=0.1, label="Guidance")
    scale.info = "strength of the class; 1 is no guidance"
    steps = gr.Slider(1, max(MOST_STEPS, s.num_steps), s.num_steps, step=1, label="Steps")
    live = gr.Checkbox(
        s.num_steps <= FEW_STEPS, label="Draw while controls move",
        info="for few steps",
    )  # fmt: skip
    with gr.Accordion("Several images", open=False):
        images = gr.Slider(1, 8, 1, step=1, label="Images per class")
        images.info = "with consecutive seeds"
        more = gr.Dropdown(classes, value=[], multiselect=True, label="Also draw")
    title = "Sampler, guidance interval, EMA" if len(emas) > 1 else "Sampler, guidance interval"
    with gr.Accordion(title, open=False):
        sampler = gr.Dropdown(list(samplers), value=s.sampler, label="Sampler")
        low, high = (gr.Slider(0, 1, value, step=0.05) for value in s.guidance_interval)
        low.label, low.info = "Guide from t", "0 is the image, 1 is noise"
        high.label = "to t"
        chosen = config.ema if config.ema in dict(emas).values() else emas[0][1]
        ema = gr.Dropdown(emas, value=chosen, visible=len(emas) > 1, label=f"EMA of {config.ckpt}")
    sampler.input(lambda name: samplers[name].default_steps, sampler, steps)
    inputs = dict(label=label, seed=seed, scale=scale, steps=steps, live=live, images=images)
    inputs |= dict(more=more, sampler=sampler, low=low, high=high, ema=ema)
    return {name: raw(component) for name, component in inputs.items()}


def forming(
    draw: Callable[[AfterStep], dict], stopping: threading.Event, is_read: Callable[[], bool]
) -> Iterator[dict]:
    """Yields the data of an image while it forms, at last the complete ones.

    Ends early if `stopping` is set, or if the browser does not read for UNREAD_SECONDS. The sampler
    runs in a thread, because it calls back after each step. Re-raises its errors.
    """
    found: Queue = Queue()
    start = heard = shown = time.monotonic()
    spent = 0.0  # seconds

    def after_step(preview: Callable | None) -> None:
        nonlocal heard, shown, spent
        now = time.monotonic()
        heard = now if is_read() else heard
        if stopping.is_set() or now - heard > UNREAD_SECONDS:
            raise Stopped
        is_due = now - shown > PREVIEW_SECONDS and spent < PREVIEW_SHARE * (now - start)
        if preview and is_due and heard == now:
            found.put(preview())
            shown = time.monotonic()
            spent += shown - now

    def work() -> None:
        try:
            found.put(draw(after_step))
            found.put(Stopped())
        except BaseException as error:
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(one := found.get(), Stopped):
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:  # also if gradio closes this generator
        stopping.set()
        thread.join()


def page_error(error: UserError) -> str:
    """Returns the message of an error, with the control's name on the page in place of the flag."""
    line = printable(str(error))
    name = next((name for name in NAMES if line.startswith(f"{name}:")), None)
    return line if name is None else NAMES[name] + line.removeprefix(name)


class LimitedBody:
    """ASGI middleware that answers a request of more than MOST_BYTES with 413."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        read = 0

        async def receive_some() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return {"type": "http.disconnect"} if read > MOST_BYTES else message

        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and int(length) > MOST_BYTES:
            while (await receive()).get("more_body"):  # a client reads no answer before it has sent
                pass
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await self.app(scope, receive_some if scope["type"] == "http" else receive, send)


def hosts_of(config: SamplingConfig) -> list[str]:
    """Returns the hosts that requests may name, as a browser does.

    A page of another site can let its own name lead to this machine (DNS rebinding). Its requests
    name that site. With --host or --share, the names of this machine are not known.
    """
    return [*LOCAL] if config.host in LOCAL and not config.share else ["*"]


def launch(config: SamplingConfig):
    """Serves the page from threads of this process until the page is closed; returns the page.

    config: an AppConfig of app.py
    """
    configs = [config]
    opened(config)  # before gradio, which takes seconds to import
    if config.compare:
        configs.append(replace(config, **ABOUT_CKPT, ckpt=config.compare))
        first, second = (opened(side).checkpoint for side in configs)
        message = f"--compare {second.path}: cannot be shown with"
        check_same_task(message, config, second, first, same_classes=False)
        if not shared_classes(configs):
            raise UserError(f"{message} {first.path}: they have no class in common")
    missing = "the page requires gradio; run: pip install -r requirements-extras.txt"
    with reported_as(missing, ImportError):
        import gradio as gr
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    stops: dict[str, threading.Event] = {}  # by session, while a request of it is running

    def stop(request: gr.Request) -> None:
        if event := stops.get(request.session_hash):
            event.set()

    def answer(values: dict, request: gr.Request) -> Iterator[dict]:
        given = {name: values[control] for name, control in controls.items()}
        ema = str(given["ema"] or "") or None  # a request may have a dict, which has no hash
        sides = [replace(config, ema=ema), *configs[1:]]
        session = request.session_hash
        stops[session] = stopping = threading.Event()
        shown = None

        def is_read() -> bool:
            messages = page._queue.pending_messages_per_session.get(session)
            return messages is None or messages.empty()

        try:
            for shown in forming(partial(draw, sides, given), stopping, is_read):
                yield shown
        except UserError as error:
            raise gr.Error(page_error(error), print_exception=False) from None
        finally:
            stops.pop(session, None)
        if shown is None:  # stopped: gradio empties the view if a generator yields nothing
            yield gr.skip()  # not before each drawing: gradio keeps what it skips

    def answer_live(values: dict, request: gr.Request) -> Iterator[dict]:
        yield from answer(values, request) if values[controls["live"]] else [gr.skip()]

    with gr.Blocks(title="DiT-MoE", analytics_enabled=False) as page:
        gr.Markdown(f"# DiT-MoE\n{INTRODUCTION}")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=1, min_width=280, elem_id="left"):
                first = gr.Column(elem_id="first")
                controls = make_controls(gr, configs)
            with first:
                controls["label"].render()
                with gr.Row():
                    draw_button = gr.Button("Draw", variant="primary", min_width=70, size="sm")
                    next_button = gr.Button("Next seed", min_width=70, size="sm")
                    stop_button = gr.Button("Stop", min_width=70, size="sm")
                waiting = gr.HTML(elem_id="waiting")
            with gr.Column(scale=3, min_width=300, elem_id="right"):
                parts = {part: (FOLDER / name).read_text() for part, name in PAGE.items()}
                view = gr.HTML(**parts)
        event = dict(inputs=set(controls.values()), outputs=view)
        event |= dict(concurrency_id="draw", concurrency_limit=1)  # requests share model and hooks
        shown = dict(show_progress="minimal", show_progress_on=waiting)  # the place in the queue
        running = [draw_button.click(answer, **event, **shown)]
        seed = controls["seed"]
        one_more = next_button.click(lambda seed: int(seed or 0) + 1, seed, seed)
        running.append(one_more.then(answer, **event, **shown))
        moved = [
            controls[name].input for name in ("label", "seed", "scale", "steps", "images", "more")
        ]
        running.append(
            gr.on(moved, answer_live, **event, trigger_mode="always_last", show_progress="hidden")
        )
        if controls["live"].value:
            running.append(page.load(answer_live, **event, **shown))
        stop_button.click(stop, cancels=running, queue=False)
        page.unload(stop)
    page.queue(max_size=MOST_WAITING)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=config.host, server_port=config.port, share=config.share, theme=theme,
            quiet=True, prevent_thread_lock=True, footer_links=[], max_file_size=1, css=LAYOUT,
            app_kwargs={"middleware": [
                (TrustedHostMiddleware, (), {"allowed_hosts": hosts_of(config)}),
                (LimitedBody, (), {}),
            ]},
        )  # fmt: skip
    except OSError:
        raise UserError(
            f"--host {config.host} --port {config.port}: cannot listen there: the port is in use, "
            "or the host is not an address of this machine"
        ) from None
    return page
