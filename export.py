"""Writes a checkpoint's EMA weights for others, with a model card, and pushes them on request.

    python export.py --ckpt results/RUN --output results/exported
    python export.py --ckpt results/RUN --output results/pipeline --format pipeline
    python export.py --ckpt results/RUN --output results/exported --push-to OWNER/NAME

Formats: safetensors (model.safetensors and config.json), published (model.pt as the published
DiT-MoE code, or for a dense model the official DiT's, loads it), pipeline (a folder for diffusers'
DiffusionPipeline.from_pretrained, its code included). A local autoencoder goes with them as vae/.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.errors import UserError, exit_on_user_error
from runtime.files import check_new_folder, read_json
from runtime.flags import flag, natural, parse_config
from sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SamplingConfig):
    output: Path = flag(group="export", help="a new or empty folder")
    format: str = flag(
        "safetensors", choices=("safetensors", "published", "pipeline"), help="see above"
    )
    samples: int = flag(8, type=natural, help="images in the model card, one a class; 0 for none")
    scores: Path | None = flag(None, help="JSON of measured scores, {name: value}, for the card")
    license: str = flag("", help="of the weights, for the model card")
    push_to: str | None = flag(None, metavar="OWNER/NAME", help="hub repository to push to")
    private: bool = flag(False, help="make the hub repository a private one")
    dry_run: bool = flag(True, help="say what would be pushed, and push nothing")


def read_scores(path: Path | None) -> dict:
    """Numbers and strings of a JSON file, nested ones by "outer.inner"."""
    try:
        content = read_json(path) if path else {}
    except (OSError, ValueError) as error:
        raise UserError(f"--scores: cannot read {path} ({error})") from None
    scores = {}
    for name, value in content.items():
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float | str):
                scores[f"{name}.{key}".rstrip(".")] = number
    return scores


def draw_samples(config: ExportConfig, checkpoint) -> str:
    """Writes samples.png into the exported folder; returns how it was drawn."""
    from torchvision.io import write_png

    from sampling.grid import image_grid
    from sampling.pipeline import make_pipeline

    pipeline = make_pipeline(config, checkpoint)
    labels = list(range(min(config.samples, len(pipeline.class_names))))
    print(f"drawing {len(labels)} images for the card: {pipeline.describe()}", flush=True)
    images = pipeline.images(labels, [config.seed + i for i in labels])
    names = [pipeline.class_names[label] for label in labels]
    write_png(image_grid(images, names), str(config.output / "samples.png"))
    return f"{pipeline.describe()}, seeds from {config.seed}"


def push(folder: Path, repository: str, *, private: bool, dry_run: bool) -> None:
    """Uploads a folder, or with dry_run says what it would upload."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
    if dry_run:
        names = ", ".join(str(path.relative_to(folder)) for path in files)
        print(f"dry run: would push {size}, to {repository} (--dry-run False pushes): {names}")
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        result = api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # huggingface_hub, its transport and the system each raise their own
        raise UserError(
            f"--push-to {repository}: not pushed, the files are in {folder} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from None
    print(f"pushed {size}: {result}")


def parse_args() -> ExportConfig:
    return parse_config(ExportConfig, __doc__)


@exit_on_user_error
def main(config: ExportConfig) -> None:
    scores = read_scores(config.scores)
    check_new_folder("--output", config.output)
    if config.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.push_to):
        raise UserError(f"--push-to: got {config.push_to!r}, expected OWNER/NAME")
    import torch

    from latents.autoencoder import load_autoencoder
    from sampling import export, pipeline

    checkpoint = pipeline.open_checkpoint(config)
    vae_path = pipeline.find_autoencoder(config, checkpoint)
    if vae_path is None and config.format == "pipeline":
        raise UserError("--vae-path: got nothing, expected one, since the checkpoint names none")
    record = replace(checkpoint.record, vae_path=vae_path)
    if config.rf is not None:
        record = replace(record, objective=pipeline.choose_objective(config.rf, checkpoint))
    if config.image_size:
        record = replace(record, image_size=config.image_size)
    checkpoint = replace(checkpoint, record=record)
    public = export.public_checkpoint(checkpoint)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        if vae_path and (config.format == "pipeline" or public.record.vae_path is None):
            vae = load_autoencoder(vae_path, "cpu", torch.float32)
            vae.save_pretrained(config.output / "vae")
        export.FORMATS[config.format](public, config.output)
        samples = draw_samples(config, checkpoint) if config.samples and vae_path else ""
        card = export.model_card(
            public, config.push_to or config.output.resolve().name, config.format,
            scores=scores, license=config.license, samples=samples,
        )  # fmt: skip
        (config.output / "README.md").write_text(card)
    except ValueError as error:
        raise UserError(f"--format {config.format}: {error}") from None
    except OSError as error:
        raise UserError(f"--output: cannot write to {config.output} ({error})") from None
    print(f"{config.output}: {config.format} of {checkpoint.path}")
    if config.push_to:
        push(config.output, config.push_to, private=config.private, dry_run=config.dry_run)


if __name__ == "__main__":
    main(parse_args())
