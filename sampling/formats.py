"""Exports checkpoints for publication, one writer function per format, with a model card."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints import MODEL_FILE, Checkpoint, save_model
from checkpoints.costs import count_macs, count_parameters
from checkpoints.published import to_published
from checkpoints.weights import write_pickle
from conditions import CONDITIONS, split_condition
from diffusion import OBJECTIVES
from latents.autoencoder import AUTOENCODERS, CONFIG_FILE, PIXELS
from options.parts import options_of
from options.settings import stored
from routers import ROUTERS
from runtime.errors import printable
from runtime.files import read_json

ROOT = Path(__file__).parent.parent
OF_TRAINING = ("times", "mean", "std")  # options of an objective that sampling does not read
PRIVATE = re.compile(  # settings with paths or names of the user
    "path$|_dir$|_config$|^run_name$|^resume$|^finetune$|^wandb$"
)


def public_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint without information about the machine that it was trained on."""
    record = checkpoint.record
    vae_path = Path(record.vae_path or PIXELS).expanduser()
    is_local = vae_path != Path(PIXELS) and (vae_path.is_absolute() or vae_path.exists())
    origin = record.initialized_from
    record = replace(
        record,
        vae_path=None if is_local else record.vae_path,
        settings={k: v for k, v in record.settings.items() if not PRIVATE.search(k)},
        facts={},
        initialized_from=origin and {**origin, "path": Path(origin["path"]).name},
        images=None,
    )
    return replace(checkpoint, record=record, state_dict=dict(checkpoint.state_dict))


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
    """Writes a pipeline of diffusers, including code.

    vae/ must already be in the folder, except for a model of pixels.
    """
    from sampling.diffusers_pipeline import DiTMoETransformer, write_index

    config, objective = checkpoint.config, checkpoint.record.objective
    kinds = {config.router.name: ROUTERS[config.router.name]}
    kinds |= {objective.name: OBJECTIVES[objective.name]} if objective else {}
    kinds |= {n: CONDITIONS[n] for n, _ in map(split_condition, config.conditions)}
    if (described := folder / "vae" / CONFIG_FILE).exists():
        name = read_json(described)["_class_name"]
        kinds[name] = AUTOENCODERS[name]
    copied = copy_code("sampling.diffusers_pipeline", folder)
    for name, kind in kinds.items():
        if kind.__module__ not in copied:
            raise ValueError(f"got {name} of a --plugin, which a pipeline does not contain")
    model = {k: v for k, v in stored(checkpoint.config).items() if k != "expert_backend"}
    with torch.device("meta"):
        transformer = DiTMoETransformer(model, typed_facts(checkpoint), checkpoint.quantization)
    transformer.model.load_state_dict(checkpoint.state_dict, assign=True)
    transformer.save_pretrained(folder / "transformer")
    write_index(folder)


FORMATS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "safetensors": write_safetensors,
    "published": write_published,
    "pipeline": write_pipeline,
}


# Matches an import: (indentation, module, first imported name).
IMPORT = re.compile(r"^( *)from (\w[\w.]*) import (\w*)", re.MULTILINE)
# Of the custom operators of an exported module: PyTorch destroys an operator when another one gets
# its name, and a process may import several exports and this repository.
NAMESPACE = '"".join(c if c.isalnum() else "_" for c in __name__)'


def copy_code(entry: str, folder: Path) -> Collection[str]:
    """Copies a module, and all modules of this repository that it imports, for diffusers.

    From the hub, diffusers downloads only pipeline.py, the files that pipeline.py names in
    `from .NAME import`, and one file per component folder. Module a.b is therefore copied to
    dit_moe_a_b.py next to pipeline.py, which names all copies (see `write_index`). Returns the
    names of the modules.
    """
    found, texts = [entry], {}

    def rewrite(match: re.Match) -> str:
        indent, module, name = match.groups()
        path = ROOT / module.replace(".", "/")
        if not path.is_dir() and not path.with_suffix(".py").is_file():  # of another package
            return match[0]
        if (path / f"{name}.py").is_file():  # a module of a package
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
            text = IMPORT.sub(rewrite, source.read_text())
            texts[module] = text.replace('"dit_moe::', f'{NAMESPACE} + "::')
    for module, text in texts.items():
        (folder / f"{flat_name(module)}.py").write_text(text)
    return texts


def flat_name(module: str) -> str:
    return "dit_moe_" + module.replace(".", "_")


LOAD = """from checkpoints import load_model  # from the DiT-MoE repository

model = load_model("{name}")"""
USAGE = {
    "safetensors": LOAD,
    "published": LOAD,
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
images = pipeline(class_labels=[{label!r}], seed=0).images""",
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
