"""The web page of app.py: controls, images and maps of experts.

`draw` needs no gradio. `launch` serves the page from threads of this process.
"""

import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import encode_png

from analysis.pictures import ExpertPicture, Trajectory, expert_colours
from checkpoints import averages_of
from diffusion import OBJECTIVES
from runtime.errors import UserError, printable, reported_as
from sampling.config import MODEL_FLAGS, ROUTER_FLAGS, SamplingConfig
from sampling.pipeline import SamplingPipeline, check_same_task, open_pipeline

# Arguments of gr.HTML. The `value` in the view is the result of `draw`; Handlebars escapes it.
PAGE = {"html_template": "view.html", "css_template": "style.css", "js_on_load": "script.js"}
FOLDER = Path(__file__).parent.parent / "assets" / "page"
# Flags that describe --ckpt and are reset for --compare.
ABOUT_CKPT = dict.fromkeys(
    (*MODEL_FLAGS, *ROUTER_FLAGS, "ema", "model", "vae_path", "image_size", "guide_ckpt")
)
INTRODUCTION = (
    "An image forms out of noise, and its patches go to experts. Choose a class and press Draw."
)
FIRST_CLASS = "person-role"  # class that the page shows first; without it, the model's first class
FEW_STEPS = 8  # up to this number of steps, the page by default draws while a control moves
MOST_IMAGES = 64  # largest number of images in a grid
MOST_STEPS = 250  # largest value of the slider, unless the page was started with more steps
MOST_WAITING = 16  # requests in the queue; more are rejected
UNREAD_SECONDS = 5.0  # a browser that leaves messages unread for longer is considered closed
NAMES = {  # names of the controls, by the names that errors use
    "labels": "Class", "seeds": "Seed", "--seed": "Seed", "sampler": "Sampler",
    "--sampler": "Sampler", "num_sampling_steps": "Steps", "--num-sampling-steps": "Steps",
    "cfg_scale": "Guidance", "--cfg-scale": "Guidance", "ema": "EMA", "--ema": "EMA",
    "guidance_interval": "Guide from t, to t", "--guidance-interval": "Guide from t, to t",
}  # fmt: skip

opened = lru_cache(maxsize=2)(open_pipeline)  # two, for both sides, or for two EMAs


class Stopped(Exception):
    """Raised in a sampler when the visitor presses Stop or leaves the page."""


def png(image: Tensor) -> str:
    """Encodes an image (3, H, W) uint8 as a data URL."""
    return "data:image/png;base64," + b64encode(encode_png(image).numpy().tobytes()).decode()


def describe(pipeline: SamplingPipeline, path: str) -> dict:
    """Returns title and subtitle of one side."""
    config, title = pipeline.model.config, pipeline.checkpoint.record.model_name
    experts = f"-{config.num_experts}E{config.num_experts_per_tok}A, {config.router}"
    title += experts if config.router else ", dense"
    return {"title": title, "about": f"{path}: {pipeline.describe()}"}


def draw_cell(pipeline: SamplingPipeline, image: Tensor, label: int, seed: int) -> dict:
    """Returns an image (3, H, W) with its caption and file name, for the view."""
    return {
        "caption": f"{pipeline.class_names[label]}, seed {seed}", "png": png(image),
        "file": f"{seed:06d}-class-{label:04d}.png",
        "pixels": "pixels" if image.shape[-1] <= 128 else "",
    }  # fmt: skip


def draw_image(
    pipeline: SamplingPipeline, label: int, seed: int, after_step: Callable[[], None]
) -> tuple[dict, list[list[str]], list[str]]:
    """Generates one image; returns its description, its pictures at each step, and step names.

    The pictures of a step are the predicted image and a map of experts for each layer.
    """
    config, num_steps = pipeline.model.config, pipeline.settings.num_steps
    layers, legend, hooks = config.sparse_layers, [], ExitStack()
    pictures = [trajectory := Trajectory(num_steps)]
    if layers:
        pictures.append(experts := ExpertPicture(pipeline.model, num_steps, range(len(layers))))
        hooks = experts.hooks

    def watch(state: dict) -> None:
        for picture in pictures:
            picture(state)
        after_step()

    with hooks:
        latents = pipeline.latents([label], [seed], watch)
    predictions = torch.cat([*(x for _, x in trajectory.frames[:-1]), latents])  # (F, C, h, w)
    images = pipeline.decode(predictions)
    frames = [[png(image)] for image in images]
    if layers:
        chosen = torch.stack([frame[2][:, 0] for frame in experts.frames])  # (F, L, T)
        for frame, maps in zip(frames, experts.maps(chosen), strict=True):
            frame += map(png, maps)
        colours = ["#" + bytes(colour).hex() for colour in expert_colours(experts.num_experts)]
        legend = [{"name": str(i), "colour": colour} for i, colour in enumerate(colours[:-1])]
        legend += [{"name": "none", "colour": colours[-1]}] if -1 in chosen else []
    kept = zip(sorted(trajectory.recorded_steps), trajectory.frames, strict=True)
    side = draw_cell(pipeline, images[-1], label, seed) | {"legend": legend, "layers": list(layers)}
    return side, frames, [f"step {i + 1} of {num_steps}, t = {t:.3g}" for i, (t, _) in kept]


def draw_grid(
    pipeline: SamplingPipeline, labels: list[int], seeds: list[int], after_step: Callable[[], None]
) -> list[dict]:
    """Generates images of each class from the same seeds; returns the cells, ordered by class."""
    cells = []
    for label in labels:
        images = pipeline.images([label] * len(seeds), seeds, lambda _: after_step())
        pairs = zip(images, seeds, strict=True)
        cells += [draw_cell(pipeline, image, label, seed) for image, seed in pairs]
    return cells


def draw(
    configs: list[SamplingConfig], given: dict, after_step: Callable[[int, int], None]
) -> dict:
    """Generates the requested images with each checkpoint; returns the data of assets/page.

    given: values of the controls, by name
    after_step: called after each step with the number of finished steps and of all steps
    """
    most_steps = max(MOST_STEPS, *(opened(config).settings.num_steps for config in configs))
    labels, seeds = requested_images(given, most_steps)
    sides, drawn, steps, done = [], [], [], count(1)
    is_grid = len(labels) * len(seeds) > 1
    for config in configs:
        pipeline = opened(config)
        changes = {"cfg_scale": given["scale"], "guidance_interval": (given["low"], given["high"])}
        sampler = {"sampler": given["sampler"], "steps": int(given["steps"])}
        if tuple(sampler.values()) != (pipeline.settings.sampler, pipeline.settings.num_steps):
            changes |= sampler
        pipeline = pipeline.with_settings(**changes)
        total = pipeline.settings.num_steps * len(configs) * (len(labels) if is_grid else 1)
        step = lambda total=total: after_step(next(done), total)  # noqa: E731
        about = describe(pipeline, config.ckpt)
        if is_grid:
            cells = draw_grid(pipeline, labels, seeds, step)
            sides.append({**about, "cells": cells, "columns": len(seeds)})
            continue
        side, frames, steps = draw_image(pipeline, labels[0], seeds[0], step)
        sides.append(about | side)
        drawn.append(frames)
    frames = [sum(parts, []) for parts in zip(*drawn, strict=True)]
    return {
        "sides": sides, "frames": frames, "steps": steps, "last": len(frames) - 1,
        "grid": is_grid, "live": bool(given["live"]),
    }  # fmt: skip


def requested_images(given: dict, most_steps: int) -> tuple[list[int], list[int]]:
    """Returns the requested classes and seeds. Raises UserError for invalid values."""
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
    if wrong := [label for label in labels if not isinstance(label, int)]:
        raise UserError(f"Class: got {wrong[0]!s:.80}, expected a class")
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


def make_controls(gr, config: SamplingConfig) -> dict:
    """Creates the controls, by the names that `draw` uses."""
    s, names = opened(config).settings, opened(config).class_names
    found = list(averages_of(Path(config.ckpt)) if Path(config.ckpt).is_dir() else ()) or ["first"]
    emas = list(zip(found, ["", *found[1:]], strict=True))  # without --ema the first one is used
    samplers = OBJECTIVES[s.objective].samplers
    classes = [(name, i) for i, name in enumerate(names)]
    first = names.index(FIRST_CLASS) if FIRST_CLASS in names else 0
    label = gr.Dropdown(classes, value=first, label="Class")
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
        ema = gr.Dropdown(emas, value="", visible=len(emas) > 1, label=f"EMA of {config.ckpt}")
        ema.value = config.ema if config.ema in dict(emas).values() else ""
    sampler.input(lambda name: samplers[name].default_steps, sampler, steps)
    inputs = dict(label=label, seed=seed, scale=scale, steps=steps, live=live, images=images)
    inputs |= dict(more=more, sampler=sampler, low=low, high=high, ema=ema)
    return {name: raw(component) for name, component in inputs.items()}


def page_error(error: UserError) -> str:
    """Returns the message of an error, with the control's name on the page in place of the flag."""
    line = printable(str(error))
    name = next((name for name in NAMES if line.startswith(f"{name}:")), None)
    return line if name is None else NAMES[name] + line.removeprefix(name)


def launch(config: SamplingConfig):
    """Serves the page from threads of this process until the page is closed; returns the page.

    config: an AppConfig of app.py
    """
    configs = [config]
    opened(config)  # before gradio, which takes seconds to import
    if config.compare:
        configs.append(replace(config, **ABOUT_CKPT, ckpt=config.compare))
        first, second = (opened(side).checkpoint for side in configs)
        check_same_task(f"--compare {second.path}: cannot be shown with", config, second, first)
    missing = "the page requires gradio; run: pip install -r requirements-extras.txt"
    with reported_as(missing, ImportError):
        import gradio as gr
    stops: dict[str, threading.Event] = {}  # by session, while a request of it is running

    def stop(request: gr.Request) -> None:
        if event := stops.get(request.session_hash):
            event.set()

    def answer(values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008
        given = {name: values[control] for name, control in controls.items()}
        session = request.session_hash
        stopping = stops[session] = threading.Event()
        heard = time.monotonic()

        def after_step(done: int, total: int) -> None:
            nonlocal heard
            messages = page._queue.pending_messages_per_session.get(session)
            heard = time.monotonic() if messages is None or messages.empty() else heard
            if stopping.is_set() or time.monotonic() - heard > UNREAD_SECONDS:
                raise Stopped
            progress((done, total), unit="steps")

        try:
            sides = [replace(config, ema=given["ema"] or None), *configs[1:]]
            return draw(sides, given, after_step)
        except Stopped:
            return gr.skip()
        except UserError as error:
            raise gr.Error(page_error(error), print_exception=False) from None
        finally:
            stops.pop(session, None)

    def answer_live(values: dict, request: gr.Request):
        is_live = values[controls["live"]]
        return answer(values, request, lambda *_, **__: None) if is_live else gr.skip()

    with gr.Blocks(title="DiT-MoE", analytics_enabled=False) as page:
        gr.Markdown(f"# DiT-MoE\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                with gr.Row():
                    draw_button = gr.Button("Draw", variant="primary", min_width=70, size="sm")
                    next_button = gr.Button("Next seed", min_width=70, size="sm")
                    stop_button = gr.Button("Stop", min_width=70, size="sm")
                controls = make_controls(gr, config)
            with gr.Column(scale=3, min_width=300):
                parts = {part: (FOLDER / name).read_text() for part, name in PAGE.items()}
                view = gr.HTML(**parts)
        event = dict(inputs=set(controls.values()), outputs=view)
        event |= dict(concurrency_id="draw", concurrency_limit=1)  # requests share model and hooks
        running = [draw_button.click(answer, **event)]
        seed = controls["seed"]
        one_more = next_button.click(lambda seed: int(seed or 0) + 1, seed, seed)
        running.append(one_more.then(answer, **event))
        moved = [
            controls[name].input for name in ("label", "seed", "scale", "steps", "images", "more")
        ]
        running.append(
            gr.on(moved, answer_live, **event, trigger_mode="always_last", show_progress="hidden")
        )
        if controls["live"].value:
            running.append(page.load(answer_live, **event))
        stop_button.click(stop, cancels=running, queue=False)
        page.unload(stop)
    page.queue(max_size=MOST_WAITING)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=config.host, server_port=config.port, share=config.share, theme=theme,
            quiet=True, prevent_thread_lock=True, footer_links=[], max_file_size=1,
        )  # fmt: skip
    except OSError:
        raise UserError(
            f"--host {config.host} --port {config.port}: cannot listen there: the port is in use, "
            "or the host is not an address of this machine"
        ) from None
    return page
