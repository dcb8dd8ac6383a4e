"""Flags of the scripts that look at experts: of a checkpoint, or of a pipeline of diffusers."""

from dataclasses import dataclass
from pathlib import Path

from options.parts import option, options_of
from runtime.errors import UserError
from runtime.flags import refuse_idle
from sampling.sampling_config import CKPT_HELP, SamplingConfig

ABLATION_FILE = "expert_ablation.jsonl"  # default file name
BATCH_SIZE = 32  # default with --ckpt
# Flags of SamplingConfig that apply to a pipeline of diffusers too.
OF_PIPELINES = {
    "num_sampling_steps", "cfg_scale", "image_size", "precision", "quantize", "offload", "seed",
    "batch_size", "prompts",
}  # fmt: skip


def default_file(ckpt: str | None, name: str) -> Path:
    """Returns the default path of a file about a checkpoint, or about a pipeline (None)."""
    is_run = ckpt is not None and Path(ckpt, "checkpoints").is_dir()
    return Path(ckpt if is_run else "results", name)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(SamplingConfig):
    """A checkpoint of ours, or a text-to-image pipeline of diffusers and prompts."""

    ckpt: str | None = option(None, group="checkpoint", help=CKPT_HELP)
    batch_size: int | None = option(
        None, ge=1, help=f"images at a time (default: {BATCH_SIZE}; 1 with --pipeline)"
    )
    pipeline: str | None = option(
        None, group="pipeline of diffusers", metavar="FOLDER_OR_HUB_ID",
        help="in place of --ckpt: HiDream-I1 or Nucleus-Image. Steps, guidance and image size have "
        "the pipeline's defaults, and --precision is bf16",
    )  # fmt: skip
    prompts: Path | None = option(
        None, metavar="FILE",
        help="file with one prompt per line, optionally after the name of a group and a tab; "
        "groups take the place of classes",
    )  # fmt: skip
    text_encoder: str | None = option(
        None, metavar="FOLDER_OR_HUB_ID",
        help="text encoder that the pipeline lacks: Llama-3.1-8B-Instruct for HiDream-I1",
    )  # fmt: skip


def check_source(config: ExpertConfig, of_checkpoints: tuple[str, ...]) -> None:
    """Requires either --ckpt or --pipeline, and refuses flags without effect.

    of_checkpoints: flags of the script that have no effect with --pipeline
    """
    if (config.ckpt is None) == (config.pipeline is None):
        both = "both" if config.ckpt else "neither"
        raise UserError(f"got {both} of --ckpt and --pipeline, expected one of them")
    if config.pipeline is not None and config.prompts is None:
        raise UserError("--pipeline: got no --prompts, expected a file with a prompt a line")
    if config.pipeline is None:
        refuse_idle(config, ("text_encoder",), "with --ckpt")
        return
    of_sampling = [name for name in options_of(SamplingConfig) if name not in OF_PIPELINES]
    refuse_idle(config, (*of_sampling, *of_checkpoints), "with --pipeline")
    if isinstance(config.num_sampling_steps, str):
        got = config.num_sampling_steps
        raise UserError(f"--num-sampling-steps: got {got}, expected a number with --pipeline")
