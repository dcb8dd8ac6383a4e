r"""Leaves the experts out one by one, and measures how loss and pictures change.

    python expert_ablation.py --ckpt results/RUN --latents-path data/val-latents
    python expert_report.py --data results/RUN

The rows of the expert that is left out add nothing; the noise stays the same. The file has a JSON
line for each expert of each layer. After an interruption, run the same command again to resume.
Without held-out images only the pictures are compared. With --pipeline, the pictures are those of
the prompts.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.expert_config import (
    ABLATION_FILE,
    BATCH_SIZE,
    ExpertConfig,
    check_source,
    default_file,
)
from options.parts import option
from runtime.errors import UserError, print_safely, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config


@dataclass(frozen=True, kw_only=True)
class ExpertAblationConfig(ExpertConfig):
    num_pictures: int | None = option(
        None, group="comparison", ge=1, help="images to draw, of evenly spaced classes (default: 8)"
    )
    data_path: str | None = option(
        None, help="held-out images, as for train.py (default: the run's --val-share)"
    )
    latents_path: str | None = option(None, help="cached latents in place of --data-path")
    num_images: int | None = option(None, ge=20, help="held-out images to use (default: 500)")
    output: Path | None = option(
        None, suffixes=(".jsonl",),
        help=f".jsonl file of the results (default: {ABLATION_FILE}, in --ckpt if that is a run "
        "folder, otherwise in results)",
    )  # fmt: skip


def parse_args() -> ExpertAblationConfig:
    return parse_config(ExpertAblationConfig, __doc__)


def open_checkpoint(config: ExpertAblationConfig) -> tuple[Any, Callable, dict]:
    """Returns the model, what to measure and the settings."""
    from evaluation.heldout import held_out_losses, latent_batches, open_held_out
    from extras.ablation import checkpoint_outcome
    from runtime.progress import progress
    from sampling.generate import objective_of
    from sampling.pipeline import open_pipeline

    pipeline = open_pipeline(config)
    if not pipeline.model.config.num_experts:
        raise UserError(f"--ckpt: {pipeline.checkpoint.path} is a dense model, expected experts")
    losses, facts = None, {}
    batch_size, num_images = config.batch_size or BATCH_SIZE, config.num_images or 500
    data = pipeline.checkpoint.record.settings
    share = data.get("val_share") and (data.get("data_path") or data.get("latents_path"))
    if config.data_path or config.latents_path or share:
        images, indices, facts = open_held_out(
            pipeline, config.data_path, config.latents_path, num_images
        )
        batches = latent_batches(
            images, indices, pipeline.vae, pipeline.class_names, batch_size=batch_size
        )
        batches = list(progress(batches, desc="encoding", unit="batch", delay=5))
        objective = objective_of(pipeline.settings)
        losses = lambda: held_out_losses(pipeline.model, objective, batches, config.seed)[0]  # noqa: E731
        facts |= {"num_images": num_images}
    pictures = config.num_pictures or 8
    measure = checkpoint_outcome(pipeline, pictures, config.seed, batch_size, losses)
    settings = {
        "precision": pipeline.precision,
        "num_pictures": pictures,
        "seed": config.seed, **asdict(pipeline.settings), **facts, **pipeline.digests,
    }  # fmt: skip
    return pipeline.model, measure, settings


def open_text_pipeline(config: ExpertAblationConfig) -> tuple[Any, Callable, dict]:
    """The same, for --pipeline."""
    from extras.prompts import open_prompts, prompts_outcome

    pipeline, prompts, settings = open_prompts(config)
    facts = asdict(settings) | {"pipeline": config.pipeline, "prompts": [p for _, p in prompts]}
    facts |= {name: str(getattr(config, name)) for name in ("precision", "quantize")}
    return pipeline.transformer, prompts_outcome(pipeline, prompts, settings), facts


def main(config: ExpertAblationConfig) -> None:
    check_source(config, ("num_pictures", "data_path", "latents_path", "num_images"))
    if config.compile:
        raise UserError("--compile: got True, but a compiled block cannot leave out an expert")
    output = config.output or default_file(config.ckpt, ABLATION_FILE)
    prepare_output("--output", output)
    print_safely(f"loading {config.ckpt or config.pipeline}")
    from analysis.sparse_layers import sparse_layers
    from extras.ablation import leave_one_out, load_ablation, save_ablation

    model, measure, settings = (open_checkpoint if config.ckpt else open_text_pipeline)(config)
    rows = load_ablation(output, settings)[1] if output.exists() else []
    for row in leave_one_out(sparse_layers(model), measure, list(rows)):
        rows.append(row)
        save_ablation(output, settings, rows)
    worst = max(rows, key=lambda row: row.pictures)
    print(f"largest change of pictures: layer {worst.layer}, expert {worst.expert}: {output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
