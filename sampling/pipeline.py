"""Sampling pipelines, made from checkpoints, for sample.py, evaluation, export and analysis."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import Checkpoint, build_model, config_of, read_checkpoint
from checkpoints.checkpoint import assemble
from checkpoints.quantizers import quantizer
from checkpoints.record import NOTED_SHARE, with_overrides
from diffusion import OBJECTIVES
from diffusion.samplers import Callback
from latents.autoencoder import DEFAULT_VAE, Autoencoder, load_autoencoder, weights_digest
from latents.text_encoder import TextEncoder, load_text_encoder
from latents.words import Words
from models import DiT
from options.parts import Word, sides
from options.settings import spelling
from presets import PRESETS
from runtime.devices import DTYPES, keep_freed_memory
from runtime.errors import UserError, check_same, pluralize, print_safely
from sampling.condition_rows import read_conditions, read_prompts, rows_for
from sampling.generate import SamplerSettings, generate, parse_labels, resolve_settings, seeds_of
from sampling.offload import offload_blocks
from sampling.sampling_config import MODEL_FLAGS, SamplingConfig
from wrappers import wrap_blocks

Labels = Sequence[int | str] | Sequence[None] | Tensor
Seeds = Sequence[int] | Tensor | torch.Generator
# Fields of SamplingConfig that can be changed per call.
CALL_SETTINGS = (
    "sampler", "num_sampling_steps", "time_shift", "cfg_scale", "guided_channels",
    "guidance_interval",
)  # fmt: skip


@dataclass
class SamplingPipeline:
    """A model, cast for sampling, with its autoencoder and sampler settings."""

    model: DiT
    vae: Autoencoder
    checkpoint: Checkpoint
    settings: SamplerSettings  # resolved
    guide: DiT | None = None  # weaker model for autoguidance
    guide_path: Path | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)  # see `rows_for`
    first_seed: int = 0
    prompts: Sequence[str] = ()  # of the condition text, or tokens of a text encoder
    encoders: Sequence[Words | TextEncoder] = ()  # of the prompts
    negative: Mapping[str, Tensor] = field(default_factory=dict)  # see `generate`

    def prompted(self, prompts: Sequence[str], negative: str | None = None) -> "SamplingPipeline":
        """Returns a pipeline that draws from prompts; the image i after the first gets prompt i
        modulo their number.

        negative: text in place of no text in the predictions that guide
        """
        encoders, settings = self.encoders or self.load_encoders(), self.settings
        if not encoders:
            raise UserError("prompt: the model has no condition text, expected classes")
        found = replace(self, prompts=prompts, encoders=encoders)
        if prompts:
            rows = {one.condition: one.rows(prompts).cpu() for one in encoders}
            found.conditions = {**self.conditions, **rows}
        if negative is not None:
            if self.guide or settings.cfg_scale == 1:
                with_what = "with --guide-ckpt" if self.guide else "without guidance"
                raise UserError(f"--negative-prompt: has no effect {with_what}")
            found.negative = {one.condition: one.rows([negative])[0].cpu() for one in encoders}
        return found

    def load_encoders(self) -> list[Words | TextEncoder]:
        """Returns what encodes prompts: the words of the model, and the text encoder that encoded
        the captions of its cache; nothing for a model without text."""
        record = self.checkpoint.record
        found: list[Words | TextEncoder] = [record.vocabulary] if record.words else []
        if name := record.facts.get("text_encoder"):
            digest = record.facts.get("features_sha256")
            found.append(load_text_encoder(name, self.vae.device, "--prompt", digest))
        return found

    @property
    def class_names(self) -> list[str]:
        names = self.checkpoint.record.class_names
        return list(names) or [str(label) for label in range(self.model.config.num_classes)]

    def labels_of(self, words: Sequence[str]) -> list[int]:
        """Returns the numbers of --class-labels."""
        if words and "label" not in self.model.conditions:
            raise UserError("--class-labels: has no effect on a model without the condition label")
        return parse_labels(words, self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = sides(self.model.config.input_size)
        return height * self.vae.downsampling, width * self.vae.downsampling

    @property
    def precision(self) -> str:
        dtype = next(self.model.parameters()).dtype
        return next(name for name, one in DTYPES.items() if one == dtype)

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the weights of the model, the guide and the autoencoder, and of the values of
        the conditions, by name."""
        networks = {"checkpoint": self.model} | ({"guide": self.guide} if self.guide else {})
        found = {name: weights_digest(network) for name, network in networks.items()}
        found["vae"] = self.vae.weights_sha256
        rows = {**self.conditions, **{f"negative_{n}": v for n, v in self.negative.items()}}
        found |= {
            n: hashlib.sha256(v.view(torch.uint8).numpy()).hexdigest() for n, v in rows.items()
        }
        return {f"{name}_sha256": digest for name, digest in found.items()}

    def describe(self) -> str:
        """Describes the sampler settings in one line."""
        s, weight = self.settings, next(self.model.parameters())
        spec = f" ({s.respacing})" if s.respacing else ""
        text = f"{s.sampler} {pluralize(s.num_steps, 'step')}{spec}, guidance {s.cfg_scale:g}"
        if self.guide_path:
            text += f" by {self.guide_path}"
        if s.time_shift:
            text += f", time shift {s.time_shift:g}"
        return f"{text}, {weight.dtype} on {weight.device.type}"

    def with_settings(self, **changes: Any) -> "SamplingPipeline":
        """Returns a pipeline with the same model and changed settings.

        changes: sampler, steps, time_shift, cfg_scale, guided_channels or guidance_interval; a new
            sampler gets its default steps, unless steps are given
        """
        if "steps" in changes:
            if "num_sampling_steps" in changes:
                raise UserError("steps: given twice, expected steps or num_sampling_steps")
            changes["num_sampling_steps"] = changes.pop("steps")
        if unknown := changes.keys() - set(CALL_SETTINGS):
            names = ", ".join(["steps", *CALL_SETTINGS])
            raise UserError(f"{min(unknown)}: unknown setting, expected one of {names}")
        checked = SamplingConfig(ckpt="", **changes)
        changes = {name: getattr(checked, name) for name in changes}  # converted
        if changes.get("sampler") not in (None, self.settings.sampler):
            changes = {"num_sampling_steps": None, **changes}
        if "num_sampling_steps" in changes:
            changes |= {"num_steps": changes.pop("num_sampling_steps"), "respacing": None}
        settings = replace(self.settings, **changes)
        guide = self.guide and self.guide.config
        return replace(self, settings=resolve_settings(settings, self.model.config, guide))

    def latents(
        self, labels: Labels, seeds: Seeds, callback: Callback = None,
        conditions: Mapping[str, Tensor] | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """Samples one latent for each label and seed; returns (N, C, h, w) fp32.

        labels: classes by number or name, or only None for no class
        seeds: one seed per image, or a generator that draws the seeds
        callback: called after each step, see `diffusion.samplers`
        conditions: tensors (N, ...) of further conditions, by name, see `generate`;
            None: the values of --conditions
        settings: changed settings for this call only, see `with_settings`

        Raises UserError if the model's output is not finite.
        """
        chosen = self.with_settings(**settings).settings if settings else self.settings
        is_without = isinstance(labels, list | tuple) and all(one is None for one in labels)
        numbers = labels if is_without else parse_labels(labels, self.class_names, "labels")
        if not len(numbers):
            raise UserError("labels: got none, expected at least one")
        if callback is not None and not callable(callback):
            raise UserError(f"callback: got {callback!r:.80}, expected a function of a dict")
        seeds = seeds_of(seeds, len(numbers))
        if conditions is None:
            conditions = rows_for(self.conditions, seeds, self.first_seed)
        has_text = self.checkpoint.record.has_text
        is_given = {"text", "tokens"} & {*conditions}
        if has_text and "label" not in self.model.conditions and not is_given:
            raise UserError('the model draws from text: pass --prompt TEXT ("" for no text)')
        latents = generate(
            self.model, numbers, seeds, chosen, conditions=conditions, negative=self.negative,
            guide=self.guide, callback=callback, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if not latents.isfinite().all():
            raise UserError("the model's output is not finite; try --precision bf16 or fp32")
        return latents

    def images(
        self, labels: Labels, seeds: Seeds, callback: Callback = None,
        conditions: Mapping[str, Tensor] | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """Samples images (N, 3, H, W) uint8, on the CPU. For the arguments see `latents`."""
        return self.decode(self.latents(labels, seeds, callback, conditions, **settings))

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to images (N, 3, H, W) uint8 on the CPU."""
        return self.vae.decode(latents)


def open_pipeline(config: SamplingConfig) -> SamplingPipeline:
    """Loads the checkpoint of --ckpt, which flags must not contradict."""
    pipeline = make_pipeline(config, open_checkpoint(config))
    settings = pipeline.settings
    if settings.num_steps == 1 and settings.sampler in ("ddim", "ddpm"):  # it is step 0 of 1000
        print_safely(f"note: {settings.sampler} with one step returns noise; use at least two")
    return pipeline


def open_checkpoint(config: SamplingConfig) -> Checkpoint:
    """Reads --ckpt, which flags must not contradict."""
    given = {name: getattr(config, name) for name in MODEL_FLAGS}
    expected = {name: value for name, value in given.items() if value is not None}
    changes = {"router": config.router} if config.router else {}
    if config.model:
        if config.model not in PRESETS:
            raise UserError(f"--model: got {config.model}, expected one of {', '.join(PRESETS)}")
        preset = config_of(config.model)
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            expected.setdefault(name, getattr(preset, name))
    # Flags fill gaps, because published files do not record the full config.
    hints = expected | ({"objective": config.objective} if config.objective else {})
    checkpoint = read_checkpoint(
        config.ckpt, hints, ema=config.ema, quantize=config.quantize, **changes
    )
    model = checkpoint.config
    if config.router and not model.num_experts:
        raise UserError("--router: has no effect on a dense model")
    record = checkpoint.record
    if (share := record.ema_start_share) is not None and share >= NOTED_SHARE:
        print_safely(
            f"note: at step {record.step} {share:.0%} of EMA {record.ema} are the weights that it "
            "began with; samples look like theirs, which is noise for new weights"
        )
    stored = {name: getattr(model, name) for name in expected}
    check_same(f"{checkpoint.path}: the flags describe a different model", expected, stored)
    return checkpoint


def make_pipeline(config: SamplingConfig, checkpoint: Checkpoint) -> SamplingPipeline:
    """Builds the sampling pipeline for a checkpoint.

    Empties the checkpoint's state dict, to free the fp32 weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint.record.objective is None and config.objective is None:
        print("the checkpoint does not record its objective; using gaussian (see --objective)")
    settings = SamplerSettings(
        str(choose_objective(config, checkpoint)),
        config.sampler,
        config.num_sampling_steps,
        config.cfg_scale,
        config.guided_channels,
        config.guidance_interval,
        config.time_shift,
    )
    guide = None
    if config.guide_ckpt:
        try:
            # The flags that fill gaps of a published file fill those of its guide, too.
            names = ("objective", "num_classes", "input_size")
            given = {name: getattr(config, name) for name in names}
            hints = {name: value for name, value in given.items() if value is not None}
            guide = read_checkpoint(config.guide_ckpt, hints)
        except UserError as error:
            raise UserError(f"--guide-ckpt {error}") from None
        name = guide.config.router.name
        if config.router and guide.config.num_experts and name == checkpoint.config.router.name:
            changed = with_overrides(guide.config, {"router": config.router})
            guide = replace(guide, record=replace(guide.record, config=changed))
        if config.quantize and guide.config.num_experts:
            quantizer(config.quantize).convert(guide.state_dict, guide.config)
        check_same_task(f"--guide-ckpt {guide.path}: cannot guide", config, guide, checkpoint)
    settings = resolve_settings(settings, checkpoint.config, guide and guide.config)
    for name in ("guided_channels", "guidance_interval"):
        if settings.cfg_scale == 1 and getattr(config, name) is not None:
            raise UserError(f"{spelling(name)}: has no effect without guidance (--cfg-scale is 1)")
    vae = autoencoder_of(config, checkpoint, device)
    precision = choose_precision(config.precision, checkpoint.config.hidden_size, device)
    build = build_offloaded if config.offload else build_model
    model = build(checkpoint, device, DTYPES[precision])
    if kind := checkpoint.quantization:
        print(quantizer(kind).describe(model))
    wrap_blocks(model, compiled=config.compile)
    checkpoint.state_dict.clear()  # free the fp32 weights
    keep_freed_memory(device)
    pipeline = SamplingPipeline(
        model, vae, checkpoint, settings, conditions=read_conditions(config.conditions, model),
        first_seed=config.seed,
    )  # fmt: skip
    if guide is not None:
        guide_model = build(guide, device, DTYPES[precision])
        pipeline = replace(pipeline, guide=guide_model, guide_path=guide.path)
    has_text = checkpoint.record.has_text
    prompts, negative = read_prompts(config, has_text), config.negative_prompt
    if has_text and not prompts and "label" in model.conditions:
        print("note: the model also draws from text (--prompt); without it, images have no text")
    if not prompts and negative is None:
        return pipeline
    pipeline = pipeline.prompted(prompts, negative)
    for prompt in (*prompts, negative or ""):
        words = [word for one in pipeline.encoders for word in one.unknown(prompt)]
        if unknown := dict.fromkeys(words):
            print_safely(f"note: unknown words are no words: {', '.join(unknown):.200}")
    return pipeline


def build_offloaded(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DiT:
    """Like `build_model`, with the blocks in host memory."""
    model = assemble(checkpoint.config, checkpoint.state_dict).eval()
    offload_blocks(model, device, dtype)
    return model


def check_same_task(
    message: str, config: SamplingConfig, other: Checkpoint, checkpoint: Checkpoint, *,
    same_classes: bool = True,
) -> None:  # fmt: skip
    """Refuses, with "MESSAGE PATH: ...", models of other latents, classes or predictions."""
    both = other, checkpoint
    has_norms = all(c.record.norm for c in both)
    chosen = choose_objective(config, checkpoint)
    facts = [
        {
            "latents": " x ".join(map(str, c.config.latent_shape)),
            "normalisation of latents": str(c.record.norm) if has_norms else None,
            "classes": c.config.num_classes if same_classes else None,
            "objective": one.name if (one := c.record.objective) else chosen.name,
            "schedule": one.options.get("schedule", "linear") if one else "linear",
            "scale of the noise": one.options.get("noise_scale", 1.0) if one else 1.0,
        }
        for c in both
    ]
    check_same(f"{message} {checkpoint.path}", *facts)


def choose_objective(config: SamplingConfig, checkpoint: Checkpoint) -> Word:
    """Returns the objective that the checkpoint records or, without one, the flag names."""
    flag, trained = config.objective, checkpoint.record.objective
    if None not in (trained, flag) and trained.name != flag:
        raise UserError(
            f"--objective: got {flag}, but {checkpoint.path} was trained with {trained.name}"
        )
    return trained or Word.parse(flag or "gaussian", OBJECTIVES)


def autoencoder_of(
    config: SamplingConfig, checkpoint: Checkpoint, device: torch.device
) -> Autoencoder:
    """Loads the autoencoder, whose latents have to be those of the training."""
    path, model = config.vae_path or checkpoint.record.vae_path, checkpoint.config
    if path is None:
        path = DEFAULT_VAE
        print(f"the checkpoint does not record its autoencoder; using {path} (see --vae-path)")
    vae = load_autoencoder(path, device, torch.float32, checkpoint.record.norm)
    if (trained := checkpoint.record.vae_sha256) and vae.weights_sha256 != trained:
        print_safely(f"note: the weights of {path} differ from the autoencoder used in training")
    image_size = config.image_size or checkpoint.record.image_size
    if image_size and (got := vae.latent_size(image_size)) != model.input_size:
        image_size, got, expected = (
            " x ".join(map(str, sides(size))) for size in (image_size, got, model.input_size)
        )
        flag = f"--image-size {image_size}" if config.image_size else f"--vae-path {path}"
        raise UserError(
            f"{flag}: got latents of {got}, expected {expected}, the latent size of "
            f"{checkpoint.path}"
        )
    if (got := vae.channels) != model.in_channels:
        raise UserError(
            f"--vae-path {path}: got {got} latent channels, expected {model.in_channels}"
        )
    return vae


def choose_precision(requested: str | None, hidden_size: int, device: torch.device) -> str:
    """Returns the precision for sampling: as requested, or fp32, or for XL and G fp16 (on a CPU,
    where that is slow, bf16)."""
    precision = requested or ("fp16" if hidden_size >= 1152 else "fp32")
    if precision == "fp16" and device.type == "cpu":
        print("fp16 is slow on a CPU, so sampling uses bf16 (or pass --precision fp32)")
        return "bf16"
    return precision


def batches(
    labels: Sequence[int], images_per_class: int, seed: int, batch_size: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Splits the images into batches (labels, seeds); the seed of image i is seed + i."""
    labels = [label for label in labels for _ in range(images_per_class)]
    if (largest := 2**32 - len(labels)) < seed:  # see `PerImageNoise`
        raise UserError(f"--seed: got {seed}, expected an integer from 0 to {largest}")
    seeds = range(seed, seed + len(labels))
    parts = [slice(start, start + batch_size) for start in range(0, len(labels), batch_size)]
    return [(labels[part], seeds[part]) for part in parts]
