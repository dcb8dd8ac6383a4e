"""Exports checkpoints for publication, one writer function per format, with a model card."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import MODEL_FILE, Checkpoint, save_model
from checkpoints.costs import count_macs, count_parameters
from checkpoints.diffusers_layout import to_exported
from checkpoints.published import to_published
from checkpoints.weights import write_pickle
from diffusion import OBJECTIVES
from latents.autoencoder import PIXELS, VAE_FOLDER, LatentNorm, load_autoencoder
from options.parts import Word, options_of
from runtime.errors import printable
from sampling.generate import SamplerSettings, resolve_settings

OF_TRAINING = ("times", "mean", "std")  # options of an objective that sampling does not read
OF_TEXT = ("text_encoder", "features_sha256")  # without them, no prompt can be encoded
PRIVATE = re.compile(  # settings with paths or names of the user
    "path$|_dir$|_config$|^run_name$|^resume$|^finetune$|^wandb$"
)


def public_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint without information about the machine that it was trained on."""
    record = checkpoint.record
    vae_path, origin = record.vae_path or PIXELS, record.initialized_from
    facts = {name: record.facts[name] for name in OF_TEXT if name in record.facts}
    model, _, length = facts.get("text_encoder", "").rpartition("@")
    if is_local(model):  # the name of the folder, which may lie where the model is used
        facts["text_encoder"] = f"{Path(model).name}@{length}"
    record = replace(
        record,
        vae_path=None if vae_path != PIXELS and is_local(vae_path) else record.vae_path,
        settings={k: v for k, v in record.settings.items() if not PRIVATE.search(k)},
        facts=facts,
        initialized_from=origin and {**origin, "path": Path(origin["path"]).name},
        images=None,
    )
    return replace(checkpoint, record=record, state_dict=dict(checkpoint.state_dict))


def is_local(path: str) -> bool:
    """Returns whether the path of a network is a folder of this machine, and not a hub id."""
    folder = Path(path).expanduser()
    return bool(path) and (folder.is_absolute() or folder.exists())


def write_safetensors(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes model.safetensors, as training does."""
    save_model(folder / MODEL_FILE, checkpoint.state_dict, checkpoint.record)


def write_published(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes model.pt in the layout of the published DiT-MoE code or the official DiT code."""
    config, record = checkpoint.in_full_precision().config, checkpoint.record
    args = typed_facts(checkpoint)
    args |= {n: getattr(config, n) for n in ("num_heads", "num_classes", "num_experts_per_tok")}
    if objective := record.objective:
        if objective.name not in ("gaussian", "rectified_flow"):
            expected = "gaussian or rectified_flow"
            raise ValueError(f"objective: got {objective.name}, expected {expected}")
        for name, option in options_of(OBJECTIVES[objective.name]).items():
            got = objective.options[name]
            if name not in OF_TRAINING and got != option.default:
                raise ValueError(f"objective: got {name}={got}, expected {option.default}")
        args["rf"] = objective.name == "rectified_flow"
    state_dict = to_published(checkpoint.state_dict, checkpoint.config)
    write_pickle(folder / "model.pt", {"ema": state_dict, "args": args})


def typed_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the facts of a record without config and settings, omitting empty values."""
    facts = checkpoint.record.to_dict()
    return {k: v for k, v in facts.items() if k not in ("config", "settings")}


def write_pipeline(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a pipeline of diffusers with its code, two files that need no other of ours.

    vae/ must already be in the folder, except for a model of pixels.
    """
    from sampling.exported.pipeline_dit_moe import DiTMoEPipeline
    from sampling.exported.transformer_dit_moe import DiTMoETransformer2DModel

    weights, fields = to_exported(checkpoint.state_dict, checkpoint.config)
    with torch.device("meta"):
        transformer = DiTMoETransformer2DModel(**fields)
    transformer.load_state_dict(weights, assign=True)
    record, config = checkpoint.record, checkpoint.config
    objective = record.objective or Word("gaussian").complete(OBJECTIVES)
    found = resolve_settings(SamplerSettings(str(objective)), config)
    vae, norm = None, record.norm or LatentNorm()
    if (folder / VAE_FOLDER).exists():
        autoencoder = load_autoencoder(str(folder / VAE_FOLDER), "cpu", torch.float32, record.norm)
        vae, norm = autoencoder.model, autoencoder.norm
    facts = {k: v for k, v in typed_facts(checkpoint).items() if k not in ("class_names", "words")}
    of_training = {"class_dropout_prob": config.dropout, "aux_loss_alpha": config.aux_loss_alpha}
    DiTMoEPipeline(
        transformer, scheduler_of(objective, config.learn_sigma), vae,
        id2label=dict(enumerate(record.class_names)) or None,
        words=list(record.words) or None,
        objective=objective.name,
        guidance_scale=found.cfg_scale,
        num_inference_steps=found.num_steps,
        guidance_channels=found.guided_channels,
        guidance_interval=list(found.guidance_interval),
        noise_scale=objective.options.get("noise_scale", 1.0),
        velocity_clamp=objective.options.get("clamp", 0.05),
        latents_shift=norm.to_dict()["shift"],
        latents_scale=norm.to_dict()["scale"],
        record={**facts, "config": of_training},
    ).save_pretrained(folder)  # fmt: skip


def scheduler_of(objective: Word, learn_sigma: bool):
    """Returns diffusers' scheduler that computes the objective's first sampler."""
    import diffusers

    options = objective.options
    if objective.name in ("rectified_flow", "flow_x", "mean_flow"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=options["shift"])
    if objective.name not in ("gaussian", "gaussian_v"):
        raise ValueError(f"objective: got {objective.name}, which the pipeline cannot sample")
    return diffusers.DDPMScheduler(
        beta_schedule=options["schedule"],
        variance_type="learned_range" if learn_sigma else "fixed_large",
        prediction_type="v_prediction" if objective.name == "gaussian_v" else "epsilon",
        timestep_spacing="linspace",
        clip_sample=False,
    )


FORMATS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "safetensors": write_safetensors,
    "published": write_published,
    "pipeline": write_pipeline,
}


LOAD = """from checkpoints import load_model  # from the DiT-MoE repository

model = load_model("{name}")"""
USAGE = {
    "safetensors": LOAD,
    "published": LOAD,
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
images = pipeline({label!r}).images""",
}


def model_card(checkpoint: Checkpoint, name: str, format: str, scores: dict, samples: str) -> str:
    """Returns README.md of an exported model: architecture, training, metrics and usage.

    samples: description of samples.png, or "" without such an image
    """
    config, record = checkpoint.config, checkpoint.record
    total, active = count_parameters(config)
    experts = "none, a dense model"
    if config.num_experts:
        layers = f"{len(config.sparse_blocks)} of {config.depth} layers"
        experts = f"{config.num_experts}, {config.num_experts_per_tok} per token, in {layers}"
        experts += f", stored in {kind}" if (kind := checkpoint.quantization) else ""
    names = record.class_names
    facts = {
        "model": record.model_name,
        "experts": experts,
        "parameters": f"{total:,} ({active:,} active per token)",
        "multiply-adds": f"{count_macs(config):,} per image in a forward pass",
        "objective": record.objective or "not recorded",
        "image size": record.image_size or "not recorded",
        "classes": config.num_classes,
        "class names": ", ".join(names[:20]) + ", ..." * (len(names) > 20) or "not recorded",
        "steps trained": record.step or "not recorded",
        **record.settings,
        **{f"started from {key}": value for key, value in (record.initialized_from or {}).items()},
    }
    library = "diffusers" if format == "pipeline" else "pytorch"
    text = f"---\nlibrary_name: {library}\ntags:\n- dit-moe\n---\n\n# {plain(name)}\n\n"
    if samples:
        text += f"![Samples](samples.png)\n\n*{plain(samples)}*\n\n"
    text += table({"": "", **facts})
    if scores:
        text += "\n## Evaluation\n\n" + table({"metric": "value", **scores})
    usage = USAGE[format].format(name=name, label=(*record.class_names, 0)[0])
    return text + f"\n## Usage\n\n```python\n{usage}\n```\n"


def table(values: dict) -> str:
    """Returns a Markdown table of two columns; the first pair is the header."""
    head, *rows = (f"| {plain(key)} | {plain(value)} |\n" for key, value in values.items())
    return "".join([head, "| --- | --- |\n", *rows])


def plain(value: object) -> str:
    """Returns a value as one line of Markdown text, with special characters escaped."""
    return re.sub(r"[\\`*\[\]<>|&~$]", lambda sign: f"&#{ord(sign[0])};", printable(str(value)))
