"""A checkpoint made ready to sample from, as the sampling flags ask: what sample.py, evaluation and
analysis share, so that they cannot diverge."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from checkpoints.checkpoint import Checkpoint, build_model, config_of, read_checkpoint
from diffusion import objective_of
from latents.autoencoder import (
    DEFAULT_VAE,
    decode,
    downsampling_of,
    latent_geometry,
    load_autoencoder,
)
from models import DiT, DiTConfig
from runtime.devices import DTYPES, keep_freed_memory
from runtime.errors import UserError
from sampling.generate import choose_sampler, generate


@dataclass
class SamplingPipeline:
    """A model in the precision it samples in, its autoencoder, and how to sample."""

    model: DiT
    vae: AutoencoderKL
    checkpoint: Checkpoint
    objective: str
    sampler: str
    num_steps: int
    cfg_scale: float
    guided_channels: int | None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: str = "constant"

    @property
    def class_names(self) -> list[str]:
        names = list(self.checkpoint.record.class_names)
        return names or [str(label) for label in range(self.model.config.num_classes)]

    def latents(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        callback: Callable[[dict], None] | None = None,
    ) -> Tensor:
        """Samples one latent (C, h, w) for each label and seed; see `sampling.generate`."""
        return generate(
            self.model,
            labels,
            seeds,
            objective=self.objective,
            sampler=self.sampler,
            num_steps=self.num_steps,
            cfg_scale=self.cfg_scale,
            guided_channels=self.guided_channels,
            guidance_interval=self.guidance_interval,
            guidance_shape=self.guidance_schedule,
            callback=callback,
            progress=sys.stderr.isatty(),
        )

    def images(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        callback: Callable[[dict], None] | None = None,
    ) -> Tensor:
        """Samples one image for each label and seed; returns (N, 3, H, W) uint8 on the CPU.

        Raises UserError when the model's output is not finite.
        """
        latents = self.latents(labels, seeds, callback)  # (N, C, h, w)
        if not latents.isfinite().all():
            raise UserError("the model's output is not finite: try --precision bf16 or fp32")
        return decode(self.vae, latents).cpu()


def open_pipeline(args: argparse.Namespace) -> SamplingPipeline:
    """Loads what --ckpt names and checks the flags against it; UserError where they disagree."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = read_checkpoint(args.ckpt, hints_of(args))
    check_model_flags(args, checkpoint)
    objective = choose_objective(args.rf, checkpoint)
    sampler, num_steps = choose_sampler(objective, args.sampler, args.num_sampling_steps)
    vae = open_autoencoder(args, checkpoint, device)
    precision = choose_precision(args.precision, checkpoint.config.hidden_size, device)
    model = build_model(checkpoint, device, DTYPES[precision])
    if args.compile:
        model.compile_blocks()
    checkpoint.state_dict.clear()  # or the fp32 weights would stay in memory beside the model's
    keep_freed_memory(device)
    return SamplingPipeline(
        model=model,
        vae=vae,
        checkpoint=checkpoint,
        objective=objective,
        sampler=sampler,
        num_steps=num_steps,
        cfg_scale=choose_guidance(args.cfg_scale, checkpoint.config),
        guided_channels=getattr(args, "guided_channels", 3 if objective == "gaussian" else None),
        guidance_interval=tuple(args.guidance_interval),
        guidance_schedule=args.guidance_schedule,
    )


def choose_objective(rf: bool | None, checkpoint: Checkpoint) -> str:
    """The objective that a checkpoint was trained for, which --rf may only say or confirm."""
    objective = checkpoint.record.objective
    if rf is not None:
        if objective not in (None, objective_of(rf)):
            raise UserError(f"--rf: got {rf}, but {checkpoint.path} was trained with {objective}")
        return objective_of(rf)
    if objective is None:
        print("the checkpoint does not say its objective: taking Gaussian diffusion (else --rf)")
        return "gaussian"
    return objective


def open_autoencoder(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device
) -> AutoencoderKL:
    """Loads --vae-path or the checkpoint's own; UserError when its latents are not the model's."""
    record, config = checkpoint.record, checkpoint.config
    vae_path = args.vae_path or record.vae_path
    if vae_path is None:
        vae_path = DEFAULT_VAE
        print(f"the checkpoint names no autoencoder: taking {vae_path} (else --vae-path)")
    vae = load_autoencoder(vae_path, device, torch.float32)
    image_size = args.image_size or record.image_size
    if image_size and latent_geometry(vae.config, image_size)[0] != config.input_size:
        expected = config.input_size * downsampling_of(vae.config)
        raise UserError(
            f"--image-size: got {image_size}, expected {expected}, which is what "
            f"{checkpoint.path} and the autoencoder make"
        )
    if vae.config.latent_channels != config.in_channels:
        raise UserError(
            f"--vae-path {vae_path}: got {vae.config.latent_channels} latent channels, expected "
            f"{config.in_channels}"
        )
    return vae


def model_fields(args: argparse.Namespace) -> dict:
    """The fields of DiTConfig that the flags give."""
    names = ("num_experts", "num_experts_per_tok", "num_classes")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def hints_of(args: argparse.Namespace) -> dict:
    """What the flags tell of a model whose file may not tell it."""
    heads = {"num_heads": config_of(args.model).num_heads} if args.model else {}
    return {**model_fields(args), **heads}


def check_model_flags(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError when a flag says something else of the model than the checkpoint."""
    config = checkpoint.config
    wanted = model_fields(args)
    if args.model:
        preset = config_of(args.model)
        for name in ("patch_size", "hidden_size", "depth", "num_heads", "dense_mlp_ratio"):
            wanted[name] = getattr(preset, name)
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{checkpoint.path}: another model: the flags say {name} {value}, "
                f"the checkpoint {getattr(config, name)}"
            )


def choose_guidance(wanted: float | None, config: DiTConfig) -> float:
    """1.5, but 1, which is none, for a model that has no label for "no class"."""
    if wanted is not None:
        return wanted
    return 1.5 if config.class_dropout_prob else 1.0


def choose_precision(wanted: str | None, hidden_size: int, device: torch.device) -> str:
    """fp32, or half for the big models (XL, G); on a CPU, where fp16 is slow, half means bf16."""
    half = hidden_size >= 1152
    precision = wanted or ("fp16" if half else "fp32")
    if precision == "fp16" and device.type == "cpu":
        print("fp16 is slow on a CPU: sampling in bf16 (--precision fp32 for full precision)")
        return "bf16"
    return precision


def parse_labels(names: Sequence[str], class_names: list[str]) -> list[int]:
    """Turns labels given by number or by name into numbers; UserError for an unknown one."""
    labels = []
    for name in names:
        if name in class_names:
            labels.append(class_names.index(name))
        elif name.isdigit() and int(name) < len(class_names):
            labels.append(int(name))
        else:
            known = f"0 to {len(class_names) - 1}"
            if not class_names[0].isdigit():
                known += f" or one of {', '.join(class_names[:20])}"
            raise UserError(f"--class-labels: got {name}, expected {known}")
    return labels


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
