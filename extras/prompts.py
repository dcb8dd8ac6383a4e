"""Counts the experts of a text-to-image pipeline of diffusers, such as HiDream-I1's.

Weights are read from safetensors files only, and no code of the pipeline's repository is run.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.counts import RoutingCounts
from analysis.expert_config import ExpertConfig
from analysis.recorder import RoutingRecorder
from analysis.sparse_layers import TRANSFORMERS, sparse_layers
from extras.ablation import Outcome
from options.parts import sides
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, reported_as
from runtime.files import hub_folder, read_json
from runtime.progress import progress
from sampling.pipeline import batches

INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a pipeline draws the images; None: as the pipeline does by default."""

    num_steps: int | None = None
    cfg_scale: float | None = None
    image_size: tuple[int, int] | None = None  # height and width in pixels
    images_per_prompt: int = 1
    batch_size: int = 1
    seed: int = 0  # the seed of image i is seed + i


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Reads a file with one prompt per line, optionally after its group and a tab; returns (group,
    prompt) pairs. Without a group, the prompt is its own. Empty lines are skipped.
    """
    with reported_as(f"--prompts: cannot read {path}", OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").splitlines()
    pairs = []
    for number, line in enumerate(lines, 1):
        group, tab, prompt = line.partition("\t")
        group, prompt = group.strip(), prompt.strip()
        if tab and not (group and prompt):
            raise UserError(f"--prompts: {path}, line {number}: expected GROUP, a tab and PROMPT")
        if group:
            pairs.append((group, prompt or group))
    if not pairs:
        raise UserError(f"--prompts: {path} has no prompts, expected one a line")
    return pairs


def open_prompt_pipeline(
    path: str, precision: str, *, text_encoder: str | None = None, quantize: str | None = None,
    offload: bool = False,
) -> Any:  # fmt: skip
    """Loads a pipeline of diffusers with a sparse transformer, from a folder or the hub.

    text_encoder: folder or hub id of the Llama model that HiDream-I1's repository lacks
    quantize: int8 or int4, for the experts
    offload: move each part to the GPU only while it computes
    """
    message = f"--pipeline {path}"
    check_index(path, message, text_encoder)
    needs = f"{message}: needs transformers; run pip install -r requirements-extras.txt"
    with reported_as(needs, ImportError):
        import transformers
        from diffusers import DiffusionPipeline
    options: dict[str, Any] = {"use_safetensors": True, "dtype": DTYPES[precision]}
    options["low_cpu_mem_usage"] = find_spec("accelerate") is not None
    if text_encoder:
        with reported_as(f"--text-encoder {text_encoder}: cannot be loaded", Exception):
            options["tokenizer_4"] = transformers.AutoTokenizer.from_pretrained(text_encoder)
            options["text_encoder_4"] = transformers.AutoModelForCausalLM.from_pretrained(
                text_encoder, use_safetensors=True, dtype=DTYPES[precision]
            )
    with reported_as(f"{message}: cannot be loaded", Exception):
        pipeline = DiffusionPipeline.from_pretrained(path, **options)
    layers = sparse_layers(pipeline.transformer)
    if not layers:
        raise UserError(f"{message}: its transformer is dense, expected experts")
    if quantize:
        with reported_as("--quantize", ValueError):
            for layer in layers:
                layer.quantize(quantize)
    pipeline.set_progress_bar_config(disable=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if offload:
        with reported_as("--offload", ImportError, RuntimeError):
            pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(device)


def open_prompts(config: ExpertConfig, images_per_prompt: int = 1) -> tuple[Any, list, Any]:
    """Opens --prompts and --pipeline; returns pipeline, (group, prompt) pairs and settings."""
    prompts = read_prompts(config.prompts)
    pipeline = open_prompt_pipeline(
        config.pipeline, config.precision or "bf16", text_encoder=config.text_encoder,
        quantize=config.quantize, offload=config.offload,
    )  # fmt: skip
    settings = PromptSettings(
        num_steps=config.num_sampling_steps, cfg_scale=config.cfg_scale,
        image_size=config.image_size and sides(config.image_size),
        images_per_prompt=images_per_prompt, batch_size=config.batch_size or 1, seed=config.seed,
    )  # fmt: skip
    return pipeline, prompts, settings


def check_index(path: str, message: str, text_encoder: str | None) -> None:
    """Checks that a pipeline's index names a known transformer and all other parts."""
    with reported_as(f"{message}: expected a folder or hub id of a pipeline", OSError, ValueError):
        folder = Path(path) if os.path.isdir(path) else hub_folder(path, [INDEX])
        index = read_json(folder / INDEX)
    library, name = index.get("transformer") or index.get("unet") or (None, "no transformer")
    name += f" of the library {library}" if library not in ("diffusers", None) else ""
    if name not in TRANSFORMERS:
        known = " or ".join(TRANSFORMERS)
        raise UserError(f"{message}: got {name}, expected a transformer with experts: {known}")
    llama = index.get("text_encoder_4") or [None]
    if name == "HiDreamImageTransformer2DModel" and llama[0] is None and text_encoder is None:
        raise UserError(f"{message}: has no Llama, expected it in --text-encoder")


def generate(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: PromptSettings,
    callback: Any = None,
) -> Tensor:  # fmt: skip
    """Draws an image for each prompt and seed; returns images (N, 3, H, W) uint8 on the CPU."""
    options = {
        "num_inference_steps": settings.num_steps, "guidance_scale": settings.cfg_scale,
        "callback_on_step_end": callback,
    }  # fmt: skip
    if settings.image_size:
        options |= dict(zip(("height", "width"), settings.image_size, strict=True))
    options = {name: value for name, value in options.items() if value is not None}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipeline(list(prompts), generator=generators, output_type="pt", **options).images
    if not images.isfinite().all():
        raise UserError("the pipeline's output is not finite; try --precision bf16 or fp32")
    return (images.float() * 255).round().byte().cpu()


def count_prompts(
    pipeline: Any, prompts: Sequence[tuple[str, str]], settings: PromptSettings
) -> RoutingCounts:
    """Draws images of prompts, (group, prompt) pairs, and counts the experts of their tokens.

    The groups are the classes of the counts.
    """
    groups = list(dict.fromkeys(group for group, _ in prompts))
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    steps = (settings.num_steps or default) * pipeline.scheduler.order
    requests = batches(
        range(len(prompts)), settings.images_per_prompt, settings.seed, settings.batch_size
    )
    with sparse_layers(pipeline.transformer)[0].places(pipeline) as places:
        recorder = RoutingRecorder(pipeline.transformer, steps, len(groups), places)

        def end_step(pipe: Any, step: int, time: Tensor, values: dict) -> dict:
            share = time / pipe.scheduler.config.num_train_timesteps
            recorder.end_step({"step": step, "t": [share]})
            bar.update()
            return values

        with recorder, progress(total=len(requests) * steps, unit="step") as bar:
            for chosen, seeds in requests:
                places.start_batch()
                recorder.start_batch([groups.index(prompts[i][0]) for i in chosen])
                texts = [prompts[i][1] for i in chosen]
                images = generate(pipeline, texts, seeds, settings, end_step)
                recorder.end_batch(images.__getitem__)
        return RoutingCounts(
            **recorder.counts(range(len(groups))),
            labels=np.arange(len(groups)),
            class_names=np.array(groups),
            settings=describe(pipeline, prompts, settings, recorder),
        )


def prompts_outcome(
    pipeline: Any, prompts: Sequence[tuple[str, str]], settings: PromptSettings
) -> Callable[[], Outcome]:
    """Returns a function that draws the images of the prompts, see `leave_one_out`."""
    requests = batches(range(len(prompts)), 1, settings.seed, settings.batch_size)

    def measure() -> Outcome:
        texts = [([prompts[i][1] for i in chosen], seeds) for chosen, seeds in requests]
        return Outcome(None, torch.cat([generate(pipeline, *pair, settings) for pair in texts]))

    return measure


def describe(
    pipeline: Any, prompts: Sequence[tuple[str, str]], settings: PromptSettings,
    recorder: RoutingRecorder,
) -> dict:  # fmt: skip
    """Returns the settings of the counts."""
    groups = list(dict.fromkeys(group for group, _ in prompts))
    return {
        "model": type(pipeline).__name__.removesuffix("Pipeline"),
        "sampler": type(pipeline.scheduler).__name__,
        "num_steps": int((~recorder.tables["times"].isnan()).sum()),
        "cfg_scale": pipeline.guidance_scale,
        "seed": settings.seed,
        "images_per_class": settings.images_per_prompt,
        "images": len(prompts) * settings.images_per_prompt,
        "prompts": [prompt for _, prompt in prompts],
        "groups": [groups.index(group) for group, _ in prompts],
        "grid": recorder.places.grid,
        "layers": [layer.name for layer in recorder.layers],
    }


def describe_prompts(pipeline: Any, prompts: Sequence[tuple[str, str]]) -> str:
    """Describes the work in one line."""
    groups = pluralize(len({group for group, _ in prompts}), "group")
    kind, weight = type(pipeline.transformer).__name__, next(pipeline.transformer.parameters())
    return f"{pluralize(len(prompts), 'prompt')} in {groups}: {kind}, {weight.dtype}"
