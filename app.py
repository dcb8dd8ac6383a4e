r"""A page that draws images, and shows which expert each patch goes to while they form.

    python app.py --ckpt results/demo
    python app.py --ckpt results/demo --compare results/expert-choice --cfg-scale 2.5

It is at http://127.0.0.1:7860, for this machine only unless --host or --share says otherwise. With
--compare a second checkpoint draws from the same noise. Flags of the sampler are what the page
begins with. It needs gradio: pip install -r requirements-extras.txt
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import encode_png

from analysis.pictures import ExpertPicture, Trajectory, expert_colours
from checkpoints import averages_of
from diffusion import OBJECTIVES
from runtime.errors import UserError, printable, reported_as, run_main
from runtime.flags import flag, flags_of, parse_flags
from sampling.config import MODEL_FLAGS, ROUTER_FLAGS, SamplingConfig
from sampling.generate import settle
from sampling.pipeline import SamplingPipeline, check_same_task, open_pipeline

# What gr.HTML takes. Handlebars escapes what the view writes; its `value` is what `draw` returns.
PAGE = {"html_template": "view.html", "css_template": "style.css", "js_on_load": "script.js"}
FOLDER = Path(__file__).parent / "assets" / "page"


@dataclass(frozen=True, kw_only=True)
class AppConfig(SamplingConfig):
    ckpt: str = flag(
        "assets/demo",
        group="model (read from the checkpoint; for published weights say what they do not)",
        help="what to draw with, as sample.py's --ckpt",
    )  # fmt: skip
    compare: str | None = flag(
        None, group="page", help="a second checkpoint, drawn beside it from the same noise"
    )
    host: str = flag("127.0.0.1", help="address to listen at; 0.0.0.0 for other machines")
    port: int = flag(7860, least=1, most=65535, help="port to listen at")
    share: bool = flag(False, help="also open a public link, through gradio's servers")


# What flags say of --ckpt, and not of --compare.
ABOUT_CKPT = dict.fromkeys(
    (*MODEL_FLAGS, *ROUTER_FLAGS, "ema", "model", "vae_path", "image_size", "guide_ckpt")
)


def parse_args() -> AppConfig:
    return AppConfig(**parse_flags(flags_of((AppConfig,), ("batch_size",)), __doc__))


opened = lru_cache(maxsize=2)(open_pipeline)  # both sides, or two averages of one


def png(image: Tensor) -> str:
    """An image (3, H, W) uint8 as the address of a picture."""
    return "data:image/png;base64," + b64encode(encode_png(image).numpy().tobytes()).decode()


def draw_side(
    pipeline: SamplingPipeline, label: int, seed: int, after_step: Callable[[], None]
) -> tuple[dict, list[list[str]], list[str]]:
    """Draws an image: what the page says of it, its pictures at each step, and the steps' names.

    The pictures are the image as the model takes it to be, and a map of experts for each layer.
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
    images = [image for part in predictions.split(8) for image in pipeline.vae.decode(part).cpu()]
    frames = [[png(image)] for image in images]
    if layers:
        chosen = torch.stack([frame[2][:, 0] for frame in experts.frames])  # (F, L, T)
        for frame, maps in zip(frames, experts.maps(chosen), strict=True):
            frame += map(png, maps)
        colours = ["#" + bytes(colour).hex() for colour in expert_colours(experts.num_experts)]
        legend = [{"name": str(i), "colour": colour} for i, colour in enumerate(colours[:-1])]
        legend += [{"name": "none", "colour": colours[-1]}] if -1 in chosen else []
    kept = zip(sorted(trajectory.wanted), trajectory.frames, strict=True)
    router = f"-{config.num_experts}E{config.num_experts_per_tok}A, {config.router}"
    return {
        "title": pipeline.checkpoint.record.model_name + (router if layers else ", dense"),
        "caption": f"{pipeline.class_names[label]}, seed {seed}", "png": frames[-1][0],
        "file": f"{seed:06d}-class-{label:04d}.png", "legend": legend, "layers": list(layers),
        "pixels": "pixels" if images[0].shape[-1] <= 128 else "",
    }, frames, [f"step {i + 1} of {num_steps}, t = {t:.3g}" for i, (t, _) in kept]  # fmt: skip


def draw(configs: list[AppConfig], given: dict, progress: Callable) -> dict:
    """Draws what the controls say with each checkpoint; returns what assets/page shows."""
    sides, drawn, done = [], [], count(1)
    for config in configs:
        pipeline = opened(config)
        settings = replace(
            pipeline.settings, sampler=given["sampler"], num_steps=given["steps"],
            cfg_scale=given["scale"], guidance_interval=(given["low"], given["high"]),
        )  # fmt: skip
        guide = pipeline.guide and pipeline.guide.config
        pipeline = replace(pipeline, settings=settle(settings, pipeline.model.config, guide))
        total = pipeline.settings.num_steps * len(configs)
        side, frames, steps = draw_side(
            pipeline, given["label"], given["seed"] or 0,
            lambda total=total: progress((next(done), total), unit="steps"),
        )  # fmt: skip
        sides.append({"about": f"{config.ckpt}: {pipeline.describe()}", **side})
        drawn.append(frames)
    frames = [sum(parts, []) for parts in zip(*drawn, strict=True)]
    return {"sides": sides, "frames": frames, "steps": steps, "last": len(frames) - 1}


def make_controls(gr, config: AppConfig) -> tuple:
    """The inputs of `draw` by name, the button that draws and the one for the next seed."""
    s, names = opened(config).settings, opened(config).class_names
    found = list(averages_of(Path(config.ckpt)) if Path(config.ckpt).is_dir() else ()) or ["first"]
    emas = list(zip(found, ["", *found[1:]], strict=True))  # the first is what no --ema asks for
    samplers = OBJECTIVES[s.objective].samplers
    label = gr.Dropdown([(name, i) for i, name in enumerate(names)], value=0, label="Class")
    limits = dict(precision=0, minimum=0, maximum=2**32 - 1)
    seed = gr.Number(config.seed, label="Seed", info="the noise to begin with", **limits)
    with gr.Row():
        draw_button = gr.Button("Draw", variant="primary", min_width=90)
        next_button = gr.Button("Next seed", min_width=90)
    scale = gr.Slider(0, max(10, s.cfg_scale), s.cfg_scale, step=0.1, label="Guidance")
    scale.info = "how much the class counts; 1 is no guidance"
    steps = gr.Slider(1, max(250, s.num_steps), s.num_steps, step=1, label="Steps")
    with gr.Accordion("Sampler, guidance interval, EMA", open=False):
        sampler = gr.Dropdown(list(samplers), value=s.sampler, label="Sampler")
        low, high = (gr.Slider(0, 1, value, step=0.05) for value in s.guidance_interval)
        low.label, low.info = "Guide from t", "0 is the image, 1 is noise"
        high.label = "to t"
        ema = gr.Dropdown(emas, value="", visible=len(emas) > 1, label=f"EMA of {config.ckpt}")
        ema.value = config.ema if config.ema in dict(emas).values() else ""
    sampler.input(lambda name: samplers[name].default_steps, sampler, steps)
    inputs = dict(label=label, seed=seed, scale=scale, steps=steps, sampler=sampler)
    return inputs | dict(low=low, high=high, ema=ema), draw_button, next_button


def launch(config: AppConfig):
    """Serves the page from threads of this process until it is closed; returns it."""
    with reported_as("expected gradio: pip install -r requirements-extras.txt", ImportError):
        import gradio as gr
    configs = [config]
    if config.compare:
        configs.append(replace(config, **ABOUT_CKPT, ckpt=config.compare))
        first, second = (opened(side).checkpoint for side in configs)
        check_same_task(f"--compare {second.path}: cannot be beside", config, second, first)

    def answer(values: dict, progress=gr.Progress()) -> dict:  # noqa: B008
        given = {name: values[control] for name, control in controls.items()}
        try:
            return draw([replace(config, ema=given["ema"] or None), *configs[1:]], given, progress)
        except UserError as error:
            raise gr.Error(printable(str(error)), print_exception=False) from None

    with gr.Blocks(title="DiT-MoE", analytics_enabled=False) as page:
        gr.Markdown("# DiT-MoE\nAn image forms out of noise, and its patches go to experts.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls, draw_button, next_button = make_controls(gr, config)
            with gr.Column(scale=3, min_width=300):
                parts = {part: (FOLDER / name).read_text() for part, name in PAGE.items()}
                view = gr.HTML(**parts)
        event = dict(fn=answer, inputs=set(controls.values()), outputs=view)
        event |= dict(concurrency_id="draw", concurrency_limit=1)  # hooks are on shared models
        draw_button.click(**event)
        one_more = dict(inputs=controls["seed"], outputs=controls["seed"])
        next_button.click(lambda seed: (seed or 0) + 1, **one_more).then(**event)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with reported_as(f"--port: cannot listen at {config.host}, port {config.port}", OSError):
        page.launch(
            server_name=config.host, server_port=config.port, share=config.share, theme=theme,
            quiet=True, prevent_thread_lock=True, footer_links=[],
        )  # fmt: skip
    return page


def main(config: AppConfig) -> None:
    page = launch(config)
    print(f"the page is at {page.share_url or page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
