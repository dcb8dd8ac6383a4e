"""A checkpoint made ready to sample from: sample.py, evaluation, export and analysis share this."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import Checkpoint, build_model, config_of, read_checkpoint
from checkpoints.quantized import describe, quantize_state_dict
from checkpoints.record import NOTED_SHARE
from cpu import keep_freed_memory
from latents.autoencoder import DEFAULT_VAE, Autoencoder, load_autoencoder
from models import DiT, DiT_models
from parts import as_size, sides
from runtime.devices import DTYPES
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from sampling.config import MODEL_FLAGS, ROUTER_FLAGS, SamplingConfig
from sampling.generate import SamplerSettings, generate, parse_labels, seeds_of, settle
from sampling.offload import offload_blocks

Labels = Sequence[int | str] | Tensor
Seeds = Sequence[int] | Tensor | torch.Generator
# The fields of SamplingConfig that a call may change.
CALL_SETTINGS = (
    "sampler", "num_sampling_steps", "time_shift", "cfg_scale", "guided_channels",
    "guidance_interval",
)  # fmt: skip
Callback = Callable[[dict], None] | None


@dataclass
class SamplingPipeline:
    """A model in the precision it samples in, its autoencoder, and how to sample."""

    model: DiT
    vae: Autoencoder
    checkpoint: Checkpoint
    settings: SamplerSettings  # with every default filled in
    guide: DiT | None = None  # a lesser model to guide by
    guide_path: Path | None = None

    @property
    def class_names(self) -> list[str]:
        names = self.checkpoint.record.class_names
        return list(names) or [str(label) for label in range(self.model.config.num_classes)]

    def describe(self) -> str:
        """How images are drawn, in a few words."""
        s, weight = self.settings, next(self.model.parameters())
        spec = f" ({s.respacing})" if s.respacing else ""
        how = f"{s.sampler} {s.num_steps} steps{spec}, guidance {s.cfg_scale:g}"
        if s.time_shift:
            how += f", time shift {s.time_shift:g}"
        if self.guide_path:
            how += f" by {self.guide_path}"
        return f"{how}, {weight.dtype} on {weight.device.type}"

    def with_settings(self, **changes: Any) -> "SamplingPipeline":
        """The same model with changed settings: sampler, steps, time_shift, cfg_scale,
        guided_channels or guidance_interval. A changed sampler has its own default steps.

        Raises UserError for unknown names and wrong values.
        """
        if "steps" in changes:
            changes["num_sampling_steps"] = changes.pop("steps")
        if unknown := changes.keys() - set(CALL_SETTINGS):
            names = ", ".join(["steps", *CALL_SETTINGS])
            raise UserError(f"{min(unknown)}: unknown setting, expected one of {names}")
        SamplingConfig(ckpt="", **changes)  # checks types and ranges
        if changes.get("sampler") not in (None, self.settings.sampler):
            changes = {"num_sampling_steps": None, **changes}
        if "num_sampling_steps" in changes:
            changes |= {"num_steps": changes.pop("num_sampling_steps"), "respacing": None}
        settings = replace(self.settings, **changes)
        guide = self.guide and self.guide.config
        return replace(self, settings=settle(settings, self.model.config, guide))

    def latents(
        self, labels: Labels, seeds: Seeds, callback: Callback = None,
        conditions: Mapping[str, Tensor] | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """Samples one latent for each label and seed; returns (N, C, h, w) fp32.

        labels: classes by number or name
        seeds: one for each image, or a generator that draws them
        callback: called after each step, see diffusion/samplers.py
        conditions: those beside the labels, by name (N, ...); see `generate`
        settings: for this call only, see `with_settings`

        Raises UserError for wrong arguments, and when the model's output is not finite.
        """
        pipeline = self.with_settings(**settings) if settings else self
        numbers = parse_labels(labels, self.class_names, "labels")
        if not numbers:
            raise UserError("labels: got none, expected at least one")
        return pipeline.sample(numbers, seeds_of(seeds, len(numbers)), callback, conditions)

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], callback: Callback = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """`latents` for labels and seeds that are integers, as scripts parse them from flags."""
        latents = generate(
            self.model, labels, seeds, self.settings, conditions=conditions, guide=self.guide,
            callback=callback, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if not latents.isfinite().all():
            raise UserError("the model's output is not finite: try --precision bf16 or fp32")
        return latents

    def images(
        self, labels: Labels, seeds: Seeds, callback: Callback = None,
        conditions: Mapping[str, Tensor] | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """Samples images as `latents` does; returns (N, 3, H, W) uint8 on the CPU."""
        return self.decode(self.latents(labels, seeds, callback, conditions, **settings))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 on the CPU."""
        return self.vae.decode(latents).cpu()


def open_pipeline(config: SamplingConfig) -> SamplingPipeline:
    """Loads what --ckpt names and checks the flags against it; UserError where they disagree."""
    return make_pipeline(config, open_checkpoint(config))


def open_checkpoint(config: SamplingConfig) -> Checkpoint:
    """Reads --ckpt; UserError when a flag says something else of the model than the file."""
    wanted, options = (
        {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        for names in (MODEL_FLAGS, ROUTER_FLAGS)
    )
    if config.model:
        if config.model not in DiT_models:
            raise UserError(f"--model: got {config.model}, expected one of {', '.join(DiT_models)}")
        preset = config_of(config.model)
        for name in ("patch_size", "hidden_size", "depth", "num_heads", "dense_mlp_ratio"):
            wanted.setdefault(name, getattr(preset, name))
    hints = wanted | ({"objective": config.objective} if config.objective else {})
    # Published files do not say all.
    checkpoint = read_checkpoint(
        config.ckpt, hints, ema=config.ema, quantize=config.quantize, **options
    )
    if options and not checkpoint.config.num_experts:
        raise UserError(f"{spelling(next(iter(options)))}: given for a model without experts")
    record = checkpoint.record
    if (share := record.ema_start_share) is not None and share >= NOTED_SHARE:
        print(
            f"note: after {record.step} steps {share:.0%} of EMA {record.ema} are still the run's "
            "first weights, which samples show"
        )
    stored = {name: getattr(checkpoint.config, name) for name in wanted}
    check_same(f"{checkpoint.path}: the flags say another model", wanted, stored)
    return checkpoint


def make_pipeline(config: SamplingConfig, checkpoint: Checkpoint) -> SamplingPipeline:
    """Makes the pipeline of a checkpoint, whose weights it takes: the state dict is empty then."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = SamplerSettings(
        choose_objective(config, checkpoint),
        config.sampler,
        config.num_sampling_steps,
        config.cfg_scale,
        config.guided_channels,
        config.guidance_interval,
        checkpoint.record.objective_options,
        config.time_shift,
    )
    guide = None
    if config.guide_ckpt:
        guide = read_checkpoint(config.guide_ckpt)
        if config.quantize and guide.config.num_experts:
            quantize_state_dict(guide.state_dict, config.quantize)
            guide.model = None  # that of the weights before
        check_same_task(f"--guide-ckpt {guide.path}: cannot guide", config, guide, checkpoint)
    settings = settle(settings, checkpoint.config, guide and guide.config)
    vae = open_autoencoder(config, checkpoint, device)
    precision = choose_precision(config.precision, checkpoint.config.hidden_size, device)
    build = build_offloaded if config.offload else build_model
    model = build(checkpoint, device, DTYPES[precision])
    if kind := checkpoint.quantization:
        print(describe(model, kind))
    if config.compile:
        model.compile_blocks()
    checkpoint.state_dict.clear()  # or the fp32 weights would stay in memory beside the model's
    keep_freed_memory(device)
    if guide is None:
        return SamplingPipeline(model, vae, checkpoint, settings)
    guide_model = build(guide, device, DTYPES[precision])
    return SamplingPipeline(model, vae, checkpoint, settings, guide_model, guide.path)


def build_offloaded(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DiT:
    """`build_model`, with blocks that wait in host memory."""
    model, checkpoint.model = checkpoint.model, None
    model.eval()
    offload_blocks(model, device, dtype)
    return model


def check_same_task(
    message: str, config: SamplingConfig, other: Checkpoint, checkpoint: Checkpoint
) -> None:
    """UserError, MESSAGE PATH: ..., unless both have the same latents, classes and objective."""
    facts = [
        {
            "latents": " x ".join(map(str, c.config.latent_shape)),
            "classes": c.config.num_classes,
            "objective": c.record.objective or choose_objective(config, checkpoint),
        }
        for c in (other, checkpoint)
    ]
    check_same(f"{message} {checkpoint.path}", *facts)


def choose_objective(config: SamplingConfig, checkpoint: Checkpoint) -> str:
    """The objective that a checkpoint was trained for, which flags may only say or confirm."""
    wanted, trained = config.objective, checkpoint.record.objective
    if trained is None and wanted is None:
        print("the checkpoint does not say its objective: taking gaussian (else --objective)")
    if None not in (trained, wanted) and trained != wanted:
        raise UserError(
            f"--objective: got {wanted}, expected {trained}, which {checkpoint.path} was trained "
            "with"
        )
    return trained or wanted or "gaussian"


def open_autoencoder(
    config: SamplingConfig, checkpoint: Checkpoint, device: torch.device
) -> Autoencoder:
    """Loads the autoencoder; UserError when its latents are not those of the model."""
    path, wanted = config.vae_path or checkpoint.record.vae_path, checkpoint.config
    if path is None:
        path = DEFAULT_VAE
        print(f"the checkpoint names no autoencoder: taking {path} (else --vae-path)")
    vae = load_autoencoder(path, device, torch.float32, checkpoint.record.norm)
    if (trained := checkpoint.record.vae_sha256) and vae.weights_sha256 != trained:
        print(f"note: {path} has other weights than the autoencoder of the training")
    image_size = as_size(config.image_size or checkpoint.record.image_size)
    if image_size and (got := vae.latent_size(image_size)) != wanted.input_size:
        got, expected = (" x ".join(map(str, sides(size))) for size in (got, wanted.input_size))
        raise UserError(
            f"--image-size {image_size}: got latents of {got}, expected {expected}, those of "
            f"{checkpoint.path}"
        )
    if (got := vae.channels) != wanted.in_channels:
        raise UserError(
            f"--vae-path {path}: got {got} latent channels, expected {wanted.in_channels}"
        )
    return vae


def choose_precision(wanted: str | None, hidden_size: int, device: torch.device) -> str:
    """fp32, or half for the big models (XL, G); on a CPU, where fp16 is slow, half means bf16."""
    precision = wanted or ("fp16" if hidden_size >= 1152 else "fp32")
    if precision == "fp16" and device.type == "cpu":
        print("fp16 is slow on a CPU: sampling in bf16 (--precision fp32 for full precision)")
        return "bf16"
    return precision


def batches(
    labels: Sequence[int], images_per_class: int, seed: int, batch_size: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(labels, seeds) of at most batch_size images at a time; image i has the seed seed + i."""
    labels = [label for label in labels for _ in range(images_per_class)]
    seeds = range(seed, seed + len(labels))
    parts = [slice(start, start + batch_size) for start in range(0, len(labels), batch_size)]
    return [(labels[part], seeds[part]) for part in parts]
