"""Writes a checkpoint for others: each writer fills a folder, `model_card` describes it.

write_safetensors(checkpoint, folder)
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from checkpoints.checkpoint import MODEL_FILE, Checkpoint, save_model
from checkpoints.layouts import to_published
from checkpoints.record import Record
from latents.autoencoder import load_autoencoder
from models import count_macs, count_parameters
from runtime.errors import UserError
from sampling.bundle import ROOT, bundle

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSION_SOURCES = (
    "diffusion/noise.py", "diffusion/guidance.py", "diffusion/samplers.py", "diffusion/respace.py",
    "diffusion/gaussian_diffusion.py", "diffusion/rectified_flow.py", "diffusion/__init__.py",
)  # fmt: skip


def write_safetensors(checkpoint: Checkpoint, folder: Path) -> None:
    """model.safetensors, as a run's checkpoints have it, and config.json with the same facts."""
    record = public_record(checkpoint.record)
    save_model(folder / MODEL_FILE, checkpoint.state_dict, record)
    write_json(folder / "config.json", record.to_dict())


def write_published(checkpoint: Checkpoint, folder: Path) -> None:
    """model.pt in the layout that the published code, or the official DiT's, loads."""
    args = {
        **public_facts(checkpoint.record),
        **{name: getattr(checkpoint.config, name) for name in ("num_heads", "num_classes")},
        "num_experts_per_tok": checkpoint.config.num_experts_per_tok,
        "rf": checkpoint.record.objective == "rectified_flow",
    }
    state_dict = to_published(checkpoint.state_dict, checkpoint.config)
    torch.save({"ema": state_dict, "args": args}, folder / "model.pt")


def write_pipeline(checkpoint: Checkpoint, folder: Path) -> None:
    """A pipeline of diffusers, code included: transformer/, vae/, pipeline.py, model_index.json."""
    vae_path = checkpoint.record.vae_path
    if vae_path is None:
        raise UserError("--vae-path: got nothing, expected one, since the checkpoint names none")
    load_autoencoder(vae_path, "cpu", torch.float32).save_pretrained(folder / "vae")
    weights = {f"model.{name}": value for name, value in checkpoint.state_dict.items()}
    config = {"dit": asdict(checkpoint.config), "info": public_facts(checkpoint.record)}
    write_component(folder / "transformer", "DiTMoETransformer", weights, config)

    source = "sampling/diffusers_pipeline.py"
    write_transformer_code(folder / "transformer", source)
    pipeline = bundle(
        ("runtime/errors.py", "UserError"),
        *DIFFUSION_SOURCES,
        "sampling/generate.py",
        ("latents/images.py", "to_uint8"),
        ("latents/autoencoder.py", "decode", "shift"),
        (source, "DiTMoEPipeline"),
    )
    (folder / "pipeline.py").write_text(
        '"""Samples a DiT-MoE, as its repository\'s sample.py does."""\n\n'
        "import torch\n\n"
        "DiT = DiTMoETransformer = torch.nn.Module  # what is annotated with; see transformer/\n\n"
        + pipeline
    )
    index = {
        "_class_name": ["pipeline", "DiTMoEPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": ["dit_moe_transformer", "DiTMoETransformer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def write_transformer_code(folder: Path, source: str) -> None:
    """dit_moe_transformer.py, and the two sets of kernels as modules beside it."""
    code = bundle(
        "routers.py", "moe_kernels/experts.py", "moe.py", "models.py",
        (source, "DiTMoETransformer"),
    )  # fmt: skip
    # Beside this repository's own in one process, the operators need a name of their own.
    code = code.replace('"dit_moe::', '"dit_moe_pipeline::')
    # Diffusers copies the files that a `from .NAME import` names.
    copied = "from .{0} import gather as _\n{1}from . import {0}"
    lazy = "from moe_kernels import triton_kernels"
    code = code.replace(lazy, copied.format("triton_kernels", " " * 8))
    (folder / "dit_moe_transformer.py").write_text(
        '"""The model of this pipeline: DiT with a mixture of experts."""\n\n'
        + copied.format("torch_kernels", "")
        + "\n"
        + code
    )
    for name in ("torch_kernels.py", "triton_kernels.py"):
        (folder / name).write_text((ROOT / "moe_kernels" / name).read_text())


FORMATS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "safetensors": write_safetensors,
    "published": write_published,
    "pipeline": write_pipeline,
}


def write_component(folder: Path, class_name: str, weights: dict, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    names = {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
    write_json(folder / "config.json", {**names, **config})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# Settings of a run that say nothing of the machine it ran on.
PUBLIC_SETTINGS = (
    "global_batch_size", "train_batch_size", "accum_iter", "lr", "warmup_steps", "weight_decay",
    "ema_decay", "grad_clip", "precision", "aux_loss_alpha", "global_seed", "freeze",
    "train_router_only",
)  # fmt: skip


def public_record(record: Record) -> Record:
    """What others should know of a record: no paths of this machine, but a hub id of the VAE."""
    vae_path, origin, settings = record.vae_path, record.initialized_from, record.settings
    return replace(
        record,
        vae_path=vae_path if vae_path and not Path(vae_path).exists() else None,
        vae_sha256=None,
        initialized_from={**origin, "path": Path(origin["path"]).name} if origin else None,
        settings={name: settings[name] for name in PUBLIC_SETTINGS if settings.get(name)},
        micro_batch=None,
        images=None,
    )


def public_facts(record: Record) -> dict:
    """The public record without the model's config, as JSON knows it."""
    return {k: v for k, v in public_record(record).to_dict().items() if k != "config"}


USAGE = {
    "safetensors": """from checkpoints.checkpoint import load_model  # of the DiT-MoE repository

model = load_model("{name}")""",
    "published": """from checkpoints.checkpoint import load_model  # of the DiT-MoE repository

model = load_model("{name}/model.pt")  # or the published code's own loader""",
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
images = pipeline(class_labels=[{label!r}], seed=0).images""",
}


def model_card(
    checkpoint: Checkpoint, *, name: str, format: str, scores: dict, license: str
) -> str:
    """README.md of an exported model: what it is, how it was trained, what was measured."""
    config, info = checkpoint.config, public_facts(checkpoint.record)
    total, active = count_parameters(config)
    names = info.get("class_names", [])
    facts = {
        "model": info.get("model", f"DiT {config.depth} x {config.hidden_size}"),
        "experts": f"{config.num_experts}, {config.num_experts_per_tok} active, in "
        f"{len(config.sparse_layers)} of {config.depth} layers ({config.mlp_type})"
        if config.num_experts
        else f"none, a dense model ({config.mlp_type})",
        "parameters": f"{total:,}, {active:,} active for a token",
        "multiply-adds": f"{count_macs(config):,} a forward pass on an image",
        "objective": info.get("objective", "not recorded"),
        "image size": info.get("image_size", "not recorded"),
        "classes": f"{config.num_classes}"
        + (f": {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" if names else ""),
        "weights": f"EMA, fp32, after {info.get('step', 'an unrecorded number of')} steps",
        **{key.replace("_", " "): value for key, value in info.get("settings", {}).items()},
    }
    if origin := info.get("initialized_from"):
        facts["started from"] = ", ".join(f"{key} {value}" for key, value in origin.items())
    head = {"library_name": "diffusers" if format != "safetensors" else "pytorch"}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items())]
    lines += [f"license: {license}"] if license else []
    lines += ["tags:", "- dit-moe", "- class-conditional-image-generation", "---", ""]
    lines += [f"# {name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    lines += ["", "## Measured", ""]
    if scores:
        lines += ["| measure | value |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in scores.items()]
    else:
        lines.append("No scores were given.")
    usage = USAGE[format].format(name=name, label=names[0] if names else 0)
    return "\n".join([*lines, "", "## Use", "", "```python", usage, "```", ""])
