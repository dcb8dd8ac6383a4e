"""Writes a checkpoint for others: each writer fills a folder, `model_card` describes it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import MODEL_FILE, Checkpoint, save_model
from checkpoints.published import to_published
from checkpoints.record import settings_of
from checkpoints.weights import write_pickle
from models import count_macs, count_parameters
from runtime.errors import printable

ROOT = Path(__file__).parent.parent
PRIVATE = re.compile(  # settings that say where things are, or whose
    "path$|_dir$|_config$|^run_name$|^resume$|^finetune$|^wandb$"
)


def public_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without what its record says of the machine that it was trained on."""
    record = checkpoint.record
    vae_is_local = record.vae_path is not None and Path(record.vae_path).exists()
    origin = record.initialized_from
    record = replace(
        record,
        vae_path=None if vae_is_local else record.vae_path,
        settings={
            name: {k: v for k, v in section.items() if not PRIVATE.search(k)}
            for name, section in record.settings.items()
        },
        facts={},
        initialized_from=origin and {**origin, "path": Path(origin["path"]).name},
        micro_batch=None,
        images=None,
    )
    return replace(checkpoint, record=record)


def write_safetensors(checkpoint: Checkpoint, folder: Path) -> None:
    """model.safetensors, as a run's checkpoints have it."""
    save_model(folder / MODEL_FILE, checkpoint.state_dict, checkpoint.record)


def write_published(checkpoint: Checkpoint, folder: Path) -> None:
    """model.pt in the layout that the published code, or the official DiT's, loads."""
    config = checkpoint.in_full_precision().config
    args = {
        **typed_facts(checkpoint),
        **{n: getattr(config, n) for n in ("num_heads", "num_classes", "num_experts_per_tok")},
        "rf": checkpoint.record.objective == "rectified_flow",
    }
    state_dict = to_published(checkpoint.state_dict, checkpoint.config)
    write_pickle(folder / "model.pt", {"ema": state_dict, "args": args})


def typed_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a record says beside its settings, for files with metadata of their own."""
    facts = {k: v for k, v in vars(checkpoint.record).items() if k not in ("config", "settings")}
    return {k: v for k, v in facts.items() if v not in (None, (), {})}


def write_pipeline(checkpoint: Checkpoint, folder: Path) -> None:
    """A pipeline of diffusers, code included; the folder has the autoencoder as vae/ already."""
    from sampling.diffusers_pipeline import DiTMoETransformer, write_index

    model = {k: v for k, v in checkpoint.config.flat().items() if k != "expert_backend"}
    with torch.device("meta"):
        transformer = DiTMoETransformer(model, typed_facts(checkpoint), checkpoint.quantization)
    transformer.model.load_state_dict(checkpoint.state_dict, assign=True)
    transformer.save_pretrained(folder / "transformer")
    copy_code("sampling.diffusers_pipeline", folder)
    write_index(folder)


FORMATS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "safetensors": write_safetensors,
    "published": write_published,
    "pipeline": write_pipeline,
}


# Of an import from this repository: indentation, module, the first name.
OWN_IMPORT = re.compile(
    r"^( *)from ((?:conditions|cpu|models|moe|layouts|parts|routers|moe_kernels|diffusion|runtime|"
    r"latents|sampling)\b[\w.]*)"
    r" import (\w*)",
    re.MULTILINE,
)


def copy_code(entry: str, folder: Path) -> None:
    """Copies a module, and what it imports of this repository, as diffusers loads code.

    Of code diffusers takes pipeline.py, the files beside it that it names in a `from .NAME import`,
    and one file in a component's folder: from the hub it downloads no others. So module a.b becomes
    dit_moe_a_b.py beside pipeline.py, which names them all (see `write_index`).
    """
    found, texts = [entry], {}

    def rewrite(match: re.Match) -> str:
        indent, module, name = match.groups()
        if (ROOT / module.replace(".", "/") / f"{name}.py").is_file():  # a module of a package
            found.append(f"{module}.{name}")
            return f"{indent}from . import {flat_name(found[-1])} as {name}"
        found.append(module)
        return f"{indent}from .{flat_name(module)} import {name}"

    while found:
        module = found.pop()
        if module not in texts:
            path = ROOT / module.replace(".", "/")
            file = path.with_suffix(".py")
            source = file if file.is_file() else path / "__init__.py"
            text = OWN_IMPORT.sub(rewrite, source.read_text())
            # In one process with this repository, the operators need names of their own.
            texts[module] = text.replace('"dit_moe::', '"dit_moe_exported::')
    for module, text in texts.items():
        (folder / f"{flat_name(module)}.py").write_text(text)


def flat_name(module: str) -> str:
    return "dit_moe_" + module.replace(".", "_")


LOAD = """from checkpoints import load_model  # of the DiT-MoE repository

model = load_model("{name}")"""
USAGE = {
    "safetensors": LOAD,
    "published": LOAD,
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
images = pipeline(class_labels=[{label!r}], seed=0).images""",
}


def model_card(checkpoint: Checkpoint, name: str, format: str, scores: dict, samples: str) -> str:
    """README.md of an exported model: what it is, how it was trained, what was measured.

    samples: how samples.png was drawn, or nothing if there is none
    """
    config, record = checkpoint.config, checkpoint.record
    total, active = count_parameters(config)
    experts = "none, a dense model"
    if config.num_experts:
        layers = f"{len(config.sparse_layers)} of {config.depth} layers"
        experts = f"{config.num_experts}, {config.num_experts_per_tok} a token, in {layers}"
        experts += f", stored in {kind}" if (kind := checkpoint.quantization) else ""
    facts = {
        "model": record.model_name,
        "experts": experts,
        "parameters": f"{total:,}, {active:,} active for a token",
        "multiply-adds": f"{count_macs(config):,} a forward pass on an image",
        "objective": record.objective or "not recorded",
        "image size": record.image_size or "not recorded",
        "classes": config.num_classes,
        "class names": ", ".join(record.class_names[:20]) or "not recorded",
        "steps trained": record.step or "not recorded",
        **settings_of(record.settings),
        **{f"started from {key}": value for key, value in (record.initialized_from or {}).items()},
    }
    library = "diffusers" if format == "pipeline" else "pytorch"
    text = f"---\nlibrary_name: {library}\ntags:\n- dit-moe\n---\n\n# {plain(name)}\n\n"
    if samples:
        text += f"![Samples](samples.png)\n\n*{plain(samples)}*\n\n"
    text += table({"": "", **facts})
    if scores:
        text += "\n## Measured\n\n" + table({"measure": "value", **scores})
    usage = USAGE[format].format(name=name, label=(*record.class_names, 0)[0])
    return text + f"\n## Use\n\n```python\n{usage}\n```\n"


def table(values: dict) -> str:
    """A Markdown table of two columns, the first pair its head."""
    head, *rows = (f"| {plain(key)} | {plain(value)} |\n" for key, value in values.items())
    return "".join([head, "| --- | --- |\n", *rows])


def plain(value: object) -> str:
    """A value as one line that Markdown shows as it is: no HTML, link, column or control code."""
    return re.sub(r"[\\`*\[\]<>|&~$]", lambda sign: f"&#{ord(sign[0])};", printable(str(value)))
