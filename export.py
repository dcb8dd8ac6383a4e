"""Exports the EMA weights of a checkpoint for publication, with a model card.

    python export.py --ckpt results/RUN --output results/exported
    python export.py --ckpt results/RUN --output results/pipeline --format pipeline
    hf upload OWNER/NAME results/exported

Formats:
    safetensors   model.safetensors, for this repository
    published     model.pt in the layout of the published DiT-MoE code or, for a dense model, of the
                  official DiT code
    pipeline      a folder for diffusers' DiffusionPipeline.from_pretrained, including code

--precision bf16 halves the size of the weights. --quantize int8 or int4 stores quantised experts,
in the safetensors format only. A local autoencoder is included as vae/.

--drop-experts N leaves out N experts of each layer: those whose removal raises the held-out loss
least, as expert_ablation.py measured it. train.py --finetune trains the smaller model further.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.expert_config import ABLATION_FILE, default_file
from options.parts import option
from runtime.errors import UserError, print_safely, reported_as, run_main
from runtime.files import atomic_folder, check_new_folder, read_json
from runtime.flags import parse_config
from sampling.sampling_config import SamplingConfig

KEPT = re.compile(r"^pos_embed$|\.moe\.gate\.|_scale$")  # stay fp32, which routers need


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SamplingConfig):
    output: Path = option(group="export", help="new or empty folder")
    format: str = option(
        "safetensors",
        choices=("safetensors", "published", "pipeline"),
        help="format of the export, see above",
    )
    samples: int = option(
        8, ge=0, help="number of images in the model card, one per class; 0 for none"
    )
    precision: str | None = option(
        None, choices=("fp32", "bf16", "fp16"),
        help="precision of the weights except routers (default: unchanged), and of sampling the "
        "images of the model card",
    )  # fmt: skip
    drop_experts: int = option(0, ge=0, help="number of experts to leave out of each layer")
    ablation: Path | None = option(
        None, metavar="FILE",
        help="file of expert_ablation.py for --drop-experts (default: its default --output)",
    )  # fmt: skip
    scores: Path | None = option(
        None, help="results.json of evaluate.py, to include in the model card"
    )


def draw_samples(config: ExportConfig, checkpoint, folder: Path) -> str:
    """Writes samples.png to a folder; returns a description of the sampler settings."""
    import torch

    from latents.image_grid import class_captions, image_grid, write_png
    from sampling.pipeline import batches, make_pipeline

    pipeline = make_pipeline(config, checkpoint)
    pipeline.guide_path = pipeline.guide_path and Path(pipeline.guide_path.name)  # no local path
    labels = list(range(min(config.samples, len(pipeline.class_names))))
    print_safely(f"sampling {len(labels)} images for the card: {pipeline.describe()}")
    parts = batches(labels, 1, config.seed, config.batch_size)
    images = torch.cat([pipeline.images(*part) for part in parts])
    captions = class_captions(pipeline.model, pipeline.class_names, labels)
    grid = image_grid(images, captions)
    write_png(grid, folder / "samples.png")
    return f"{pipeline.describe()}, seeds from {config.seed}"


def without_experts(config: ExportConfig, checkpoint):
    """Returns the checkpoint without the experts that --drop-experts leaves out."""
    import torch

    from checkpoints import build_model
    from extras.ablation import drop_experts, least_damage, load_ablation
    from latents.autoencoder import weights_digest
    from runtime.devices import DTYPES

    if not checkpoint.config.num_experts:
        raise UserError("--drop-experts: has no effect on a dense model")
    most = checkpoint.config.num_experts - checkpoint.config.num_experts_per_tok
    if (number := config.drop_experts) > most:
        expected = f"at most {most}, which leaves one token's experts"
        raise UserError(f"--drop-experts: got {number}, expected {expected}")
    path = config.ablation or default_file(config.ckpt, ABLATION_FILE)
    if not path.exists():
        raise UserError(
            f"--drop-experts: {path} does not exist; measure it with python expert_ablation.py "
            f"--ckpt {config.ckpt} --latents-path HELD_OUT, or name another file (--ablation FILE)"
        )
    settings, rows = load_ablation(path)
    dtype = DTYPES.get(settings.get("precision"), torch.float32)  # of the weights that it measured
    model = build_model(checkpoint, dtype=dtype)
    if settings.get("checkpoint_sha256") != weights_digest(model):
        raise UserError(f"{path}: was measured with other weights than {checkpoint.path}")
    shape = len(checkpoint.config.sparse_blocks), checkpoint.config.num_experts
    with reported_as("--drop-experts", ValueError):
        return drop_experts(checkpoint, least_damage(rows, number, shape))


def parse_args() -> ExportConfig:
    return parse_config(ExportConfig, __doc__)


def main(config: ExportConfig) -> None:
    expected = f"--scores: got {config.scores}, expected results.json of evaluate.py"
    with reported_as(expected, OSError, ValueError, KeyError):
        metrics = read_json(config.scores)["metrics"] if config.scores else {}
    scores = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    check_new_folder("--output", config.output)
    if config.ablation and not config.drop_experts:
        raise UserError("--ablation: has no effect without --drop-experts N")
    import torch
    from safetensors import SafetensorError

    from checkpoints.quantizers import quantizer
    from latents.autoencoder import PIXELS, load_autoencoder
    from runtime.devices import DTYPES
    from sampling import formats, pipeline

    # expert_ablation.py measures the weights before they are quantised.
    checkpoint = pipeline.open_checkpoint(
        replace(config, quantize=None) if config.drop_experts else config
    )
    if config.drop_experts:
        checkpoint = without_experts(config, checkpoint)
        if config.quantize:
            quantizer(config.quantize).convert(checkpoint.state_dict, checkpoint.config)
    if config.format == "pipeline" and checkpoint.quantization:
        raise UserError(
            f"--format pipeline: got experts in {checkpoint.quantization}, expected weights of 16 "
            "or 32 bits; diffusers quantises what it loads (quantization_config)"
        )
    record = checkpoint.record
    vae_path = config.vae_path or record.vae_path
    vae_path = vae_path and os.path.expanduser(vae_path)
    if vae_path is None and config.format == "pipeline":
        raise UserError(
            "--vae-path: is required, because the checkpoint does not record its autoencoder"
        )
    if record.objective or config.objective or config.rf is not None:
        record = replace(record, objective=pipeline.choose_objective(config, checkpoint))
    record = replace(record, vae_path=vae_path, image_size=config.image_size or record.image_size)
    checkpoint = replace(checkpoint, record=record)
    public = formats.public_checkpoint(checkpoint)
    if vae_path and Path(vae_path).is_absolute() and not Path(vae_path).exists():
        if config.format == "pipeline" or config.vae_path:
            raise UserError(f"--vae-path: {vae_path} does not exist")
        print_safely(
            f"note: {vae_path} does not exist, so the export has no autoencoder (--vae-path)"
        )
        vae_path = None
    if config.precision:
        dtype = DTYPES[config.precision]
        weights = {
            name: value.to(dtype) if value.is_floating_point() and not KEPT.search(name) else value
            for name, value in public.state_dict.items()
        }
        public = replace(public, state_dict=weights)

    message = f"--output: cannot write {config.output}"
    with reported_as(message, OSError), atomic_folder(config.output) as folder:
        with reported_as(f"--format {config.format}", ValueError, OSError, SafetensorError):
            needs_copy = config.format == "pipeline" or public.record.vae_path is None
            if vae_path and vae_path != PIXELS and needs_copy:
                vae = load_autoencoder(vae_path, "cpu", torch.float32)
                vae.model.register_to_config(_name_or_path="")  # may be a local path
                vae.model.save_pretrained(folder / "vae")
            formats.FORMATS[config.format](public, folder)
        samples = draw_samples(config, checkpoint, folder) if config.samples and vae_path else ""
        name = config.output.resolve().name
        readme = folder / "README.md"
        readme.write_text(formats.model_card(public, name, config.format, scores, samples))
        for path in folder.rglob("*.safetensors"):  # diffusers makes them readable by owners only
            path.chmod(readme.stat().st_mode)
    print_safely(f"{config.output}: {checkpoint.path} in format {config.format}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
