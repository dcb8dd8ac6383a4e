"""Weight files, configs and count tables of an attacker, made from good ones.

    files = hostile_checkpoints(folder, own_checkpoint)   # {name: path}

Every gadget, if anything executes it, makes the folder `folder / "executed"`.
"""

import argparse
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from checkpoints.checkpoint import read_checkpoint

CANARY = "executed"
FIELDS = ("by_class", "by_step", "by_position", "labels", "class_names", "times")


class Gadget:
    """Pickled, it is a call that makes the canary."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class StateGadget:
    """Pickled, it is a call too, made while the state of an allowed object is set."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return argparse.Namespace, (), {"key": Gadget(os.mkdir, str(self.canary))}


def gadgets(canary: Path) -> dict[str, object]:
    """Objects to hide in a pickle; each makes the canary, or memory of 64 GB, if it comes to it."""
    code = f"__import__('os').mkdir({str(canary)!r})"
    return {
        "system": Gadget(os.system, f"mkdir {canary}"),
        "eval": Gadget(eval, code),
        "exec": Gadget(exec, code),
        "mkdir": Gadget(os.mkdir, str(canary)),
        "open": Gadget(open, str(canary), "w"),
        "getattr": Gadget(getattr, os.mkdir, "__call__"),
        "torch-load": Gadget(torch.load, str(canary)),
        "state": StateGadget(canary),
        "bytearray": Gadget(bytearray, 2**36),
        "huge-tensor": Gadget(torch.Tensor, 2**34),
    }


def hostile_checkpoints(folder: Path, own: Path) -> dict[str, Path]:
    """All files and folders that no script may load as weights."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        **hostile_pickles(folder, own),
        **hostile_zips(folder, own),
        **hostile_headers(folder, own),
        **hostile_metadata(folder, own),
        **hostile_weights(folder, own),
        **hostile_folders(folder, own),
        **hostile_nodes(folder, own),
    }


def hostile_pickles(folder: Path, own: Path) -> dict[str, Path]:
    weights, paths = load_file(own), {}
    for name, gadget in gadgets(folder / CANARY).items():
        places = {
            "weights": {"ema": {**weights, "pos_embed": gadget}},
            "namespace": {"ema": weights, "args": argparse.Namespace(image_size=gadget)},
            "deep": {"ema": weights, "args": {"a": [(gadget, {"b": gadget})]}},
        }
        for place, content in places.items():
            paths[f"{name}-{place}.pt"] = folder / f"{name}-{place}.pt"
            torch.save(content, paths[f"{name}-{place}.pt"])
        for protocol in (0, 2, 4):
            path = paths[f"{name}-bare-{protocol}.pt"] = folder / f"{name}-bare-{protocol}.pt"
            path.write_bytes(pickle.dumps({"ema": gadget}, protocol))
        old = paths[f"{name}-old.pt"] = folder / f"{name}-old.pt"
        torch.save({"ema": gadget}, old, _use_new_zipfile_serialization=False)
    contents: dict[str, object] = {
        "arguments-no-dict": {"ema": weights, "args": 3, "model": 4},
        "weights-no-dict": {"ema": [1, 2], "args": argparse.Namespace()},
        "weights-of-numbers": {"ema": OrderedDict(a=1)},
        "keys-no-text": {"ema": {**weights, 7: torch.ones(2)}},
    }
    cycle = argparse.Namespace(num_heads=[])
    cycle.num_heads.append(cycle)
    contents["cycle"] = {"ema": {"a": torch.ones(2)}, "args": cycle}
    contents["cycle"]["ema"]["b"] = contents["cycle"]
    laughs: list = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    contents["billion-laughs"] = {"ema": {**weights, "a": laughs}, "args": {"num_heads": laughs}}
    for name, content in contents.items():
        paths[f"{name}.pt"] = folder / f"{name}.pt"
        torch.save(content, paths[f"{name}.pt"])
    paths.pop("arguments-no-dict.pt")  # its arguments tell nothing, which is no fault
    return paths


def rewrite(source: Path, target: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """Writes a zip file again, its members as change(name, content) says."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", compression, compresslevel=1) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return target


def hostile_zips(folder: Path, own: Path) -> dict[str, Path]:
    good = folder / "good" / "x.pt"
    good.parent.mkdir()
    torch.save({"ema": {"a": torch.ones(4)}}, good)
    whole = good.read_bytes()
    trillion = b"\x8a\x06" + (10**12).to_bytes(6, "little")

    def bomb(name: str, content: bytes) -> bytes:
        return bytes(2**30) if name.endswith("data/0") else content

    def huge(name: str, content: bytes) -> bytes:
        return content.replace(b"K\x04", trillion) if name.endswith("data.pkl") else content

    def huge_shape(name: str, content: bytes) -> bytes:
        return content.replace(b"K\x04\x85", trillion + b"\x85") if "data.pkl" in name else content

    def huge_pickle(name: str, content: bytes) -> bytes:
        return b"\x80\x02(" + b"]" * 2**23 + b"l." if name.endswith("data.pkl") else content

    paths = {
        "bomb.pt": rewrite(good, folder / "bomb.pt", bomb, zipfile.ZIP_DEFLATED),
        "huge-storage.pt": rewrite(good, folder / "huge-storage.pt", huge),
        "huge-shape.pt": rewrite(good, folder / "huge-shape.pt", huge_shape),
        "huge-pickle.pt": rewrite(good, folder / "huge-pickle.pt", huge_pickle),
    }
    spread = torch.ones(1).expand(2**40)  # 4 TB by its shape, one number in the file
    contents = {"spread": {"ema": {**load_file(own), "pos_embed": spread}}}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
        paths[f"{name}.pt"] = folder / f"{name}.pt"
    raw = {
        "truncated": whole[:-30],
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"these are not weights",
        "end-alone": b"PK\x05\x06" + bytes(18),
        "list-of-4-gb": whole[:-10] + b"\xf0\xff\xff\xff" + whole[-6:],
    }
    for name, content in raw.items():
        paths[f"{name}.pt"] = folder / f"{name}.pt"
        paths[f"{name}.pt"].write_bytes(content)
    twice = paths["twice.pt"] = folder / "twice.pt"
    twice.write_bytes(whole)
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Gadget(os.mkdir, str(folder / CANARY)), 2))
    return paths


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def hostile_headers(folder: Path, own: Path) -> dict[str, Path]:
    whole = own.read_bytes()
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    contents = {
        "huge-shape": safetensors_bytes(
            {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
        ),
        "overflowing-shape": safetensors_bytes(
            {"a": {"dtype": "F32", "shape": [2**62, 4, 2], "data_offsets": [0, 0]}}
        ),
        "empty-of-2-to-62": safetensors_bytes(
            {"pos_embed": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}
        ),
        "header-of-2-to-63": struct.pack("<Q", 2**63) + b"{}",
        "header-past-end": struct.pack("<Q", 10**6) + b"{}",
        "nested-header": safetensors_bytes(b"[" * 100_000),
        "twice": safetensors_bytes(
            f'{{"a": {json.dumps(one)}, "a": {json.dumps(one)}}}'.encode(), b"1234"
        ),
        "truncated": whole[: len(whole) // 2],
        "short-by-a-byte": whole[:-1],
        "empty": b"",
        "text": b"these are not weights",
    }
    paths = {f"{name}.safetensors": folder / f"{name}.safetensors" for name in contents}
    for name, content in contents.items():
        paths[f"{name}.safetensors"].write_bytes(content)
    gigabyte = paths["header-of-1-gb.safetensors"] = folder / "header-of-1-gb.safetensors"
    with gigabyte.open("wb") as file:  # a gigabyte of nothing, that takes no space on the disk
        file.write(struct.pack("<Q", 2**30) + b'{"a": ')
        file.truncate(2**30 + 8)
    return paths


BAD_FIELDS = {
    "depth": [10**9, 2**63, 10**400, -1, 0, 2.0, True, "many", None, [1], {"a": 1}],
    "input_size": [10**9, 0, "8"],
    "patch_size": [0, 10**6, 1.5],
    "hidden_size": [10**9, -32, 30],
    "num_heads": [0, 10**9, "2"],
    "num_classes": [10**9, -1, 11],
    "num_experts": [10**9, 2**20, -1, 5, "4"],
    "num_experts_per_tok": [9, 0, True],
    "n_shared_experts": [10**9, -1, 1.5],
    "mlp_ratio": [1e9, 1e308, -1, "4", True],
    "class_dropout_prob": [2, -1, "0.1", 0.0],
    "mlp_type": ["../../etc/passwd", 3, ["swiglu"]],
    "expert_backend": ["os.system", 3, ["loop"]],
    "sparse_layers": [[10**9], [-1], ["0"], [[0]], 3, {"0": 1}],
    "qk_norm": [1, "yes", True],
    "learn_sigma": [0, "no", False],
    "evil": [1],
    "../../x": [1],
}


def hostile_metadata(folder: Path, own: Path) -> dict[str, Path]:
    weights, config = load_file(own), asdict(read_checkpoint(own).config)
    infos: dict[str, object] = {
        f"config-{name.replace('/', '')}-{number}": {"config": {**config, name: value}}
        for name, values in BAD_FIELDS.items()
        for number, value in enumerate(values)
    }
    infos |= {
        "config-list": {"config": [config]},
        "config-text": {"config": "DiT-XL/2"},
        "info-list": [config],
        "info-number": 7,
        "step": {"config": config, "step": "1; rm -rf /"},
        "negative-step": {"config": config, "step": -1},
        "model-path": {"config": config, "model": "../../etc/x"},
        "model-escape": {"config": config, "model": "\x1b]0;owned\x07"},
        "objective": {"config": config, "objective": "os.system"},
        "names-few": {"config": config, "class_names": ["../../etc/passwd"]},
        "names-numbers": {"config": config, "class_names": [1] * 10},
        "names-object": {"config": config, "class_names": {"a": 1}},
        "vae-list": {"config": config, "vae_path": ["/"]},
        "vae-zero": {"config": config, "vae_path": "a\0b"},
        "origin": {"config": config, "initialized_from": {"path": 3}},
        "settings": {"config": config, "settings": "none"},
    }
    texts = {
        **{name: json.dumps(info) for name, info in infos.items()},
        "not-json": "{",
        "no-number": '{"config": {"mlp_ratio": NaN}}',
        "infinite": '{"config": {"mlp_ratio": 1e999}}',
        "repeated": '{"step": 1, "step": 2}',
        "nested": "[" * 100_000,
        "nested-less": "[" * 50 + "]" * 50,
        "long": json.dumps({"config": config, "note": "a" * 2**23}),
        "digits": '{"step": ' + "9" * 5000 + "}",
    }
    paths = {f"{name}.safetensors": folder / f"metadata-{name}.safetensors" for name in texts}
    for name, text in texts.items():
        save_file(weights, paths[f"{name}.safetensors"], metadata={"dit_moe": text})
    return {path.name: path for path in paths.values()}


def hostile_weights(folder: Path, own: Path) -> dict[str, Path]:
    """Weights that are no finite numbers of floating point, in both kinds of file."""
    weights = load_file(own)
    info = {"dit_moe": json.dumps({"config": asdict(read_checkpoint(own).config)})}
    name = "blocks.0.attn.proj.weight"
    nan, infinite = weights[name].clone(), weights[name].clone()
    nan[3, 5], infinite[0, 0] = torch.nan, -torch.inf
    changed = {
        "nan": nan,
        "infinite": infinite,
        "integers": weights[name].long(),
        "booleans": weights[name] > 0,
        "complex": weights[name] + 0j,
        "float8": weights[name].to(torch.float8_e4m3fn),
        "bytes": weights[name].byte(),
    }
    paths = {}
    for kind, value in changed.items():
        content = {**weights, name: value}
        paths[f"weights-{kind}.safetensors"] = folder / f"weights-{kind}.safetensors"
        save_file(content, paths[f"weights-{kind}.safetensors"], metadata=info)
        paths[f"weights-{kind}.pt"] = folder / f"weights-{kind}.pt"
        torch.save({"ema": content, "args": {"num_heads": 2}}, paths[f"weights-{kind}.pt"])
    others = {
        "sparse": {**weights, name: weights[name].to_sparse()},
        "path-like": {"../../etc/passwd": torch.ones(2), "/dev/null": torch.ones(2)},
        "far-block": {**weights, "blocks.99999999999.attn.proj.weight": torch.ones(2)},
        "far-expert": {**weights, "blocks.0.moe.experts.99999999.gate_proj.weight": torch.ones(2)},
        "escape": {"\x1b[2J\n\rblocks": torch.ones(2)},
        "no-numbers": {**weights, "x_embedder.proj.weight": torch.ones(0, 4, 0, 0)},
        "scalar": {**weights, "pos_embed": torch.ones(())},
    }
    for kind, content in others.items():
        paths[f"weights-{kind}.pt"] = folder / f"weights-{kind}.pt"
        torch.save({"ema": content, "args": {"num_heads": 2}}, paths[f"weights-{kind}.pt"])
    return paths


def hostile_folders(folder: Path, own: Path) -> dict[str, Path]:
    """Folders as diffusers', with a config.json of the attacker's."""
    weights, config = load_file(own), asdict(read_checkpoint(own).config)
    official = {"_class_name": "DiTTransformer2DModel", "num_layers": 2}
    contents = {
        "nested": "[" * 100_000,
        "repeated": '{"_class_name": "DiTMoETransformer", "_class_name": "x"}',
        "class-list": json.dumps({"_class_name": ["os", "system"]}),
        "no-dit": json.dumps({"_class_name": "DiTMoETransformer"}),
        "dit-list": json.dumps({"_class_name": "DiTMoETransformer", "dit": [1]}),
        "deep": json.dumps({"_class_name": "DiTMoETransformer", "dit": {**config, "depth": 10**9}}),
        "info": json.dumps({"_class_name": "DiTMoETransformer", "dit": config, "info": [1]}),
        "layers": json.dumps({**official, "num_layers": 10**9}),
        "sample-size": json.dumps({**official, "sample_size": 10**6}),
        "patch": json.dumps({**official, "patch_size": 0}),
        "text": json.dumps({**official, "num_layers": "28"}),
    }
    paths = {}
    for name, text in contents.items():
        path = paths[f"folder-{name}"] = folder / f"folder-{name}"
        path.mkdir()
        (path / "config.json").write_text(text)
        renamed = {f"model.{key}": value for key, value in weights.items()}
        save_file(renamed, path / "diffusion_pytorch_model.safetensors")
    binary = paths["folder-binary"] = folder / "folder-binary"
    binary.mkdir()
    (binary / "config.json").write_text(json.dumps(official))
    torch.save(
        {"a": Gadget(os.mkdir, str(folder / CANARY))}, binary / "diffusion_pytorch_model.bin"
    )
    return paths


def hostile_nodes(folder: Path, own: Path) -> dict[str, Path]:
    """What has a name like a file and is none: reading a pipe would wait for ever."""
    paths = {}
    for suffix in (".pt", ".safetensors"):
        pipe, directory = folder / f"pipe{suffix}", folder / f"directory{suffix}"
        os.mkfifo(pipe)
        directory.mkdir()
        link = folder / f"link{suffix}"
        link.symlink_to(folder / "nowhere")
        paths.update({path.name: path for path in (pipe, directory, link)})
    run = folder / "run" / "checkpoints" / "0000001"
    run.mkdir(parents=True)
    os.mkfifo(run / "model.safetensors")
    paths["run"] = folder / "run"
    return paths


# JSON that the files of a run do not hold: settings, layouts, checksums, progress.
DOCUMENTS = {
    "nested": "[" * 100_000,
    "nested-less": "[" * 50 + "]" * 50,
    "huge": "[" + "0," * 2**21 + "0]",
    "repeated": '{"lr": 1, "lr": 2}',
    "infinite": '{"lr": 1e999}',
    "digits": '{"lr": ' + "9" * 5000 + "}",
    "list": "[1, 2]",
    "nothing": "",
}

# What becomes of the parts of a training state.
STATES = {
    "no-model": lambda state: state.pop("model"),
    "model-list": lambda state: state.update(model=[1]),
    "no-optimizer": lambda state: state.update(optimizer={"state": {}}),
    "optimizer-text": lambda state: state.update(optimizer="adam"),
    "moments-shape": lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    "moments-of-4-tb": lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.ones(1).expand(2**40)
    ),
    "moments-text": lambda state: state["optimizer"]["state"][0].update(exp_avg_sq="many"),
    "steps": lambda state: state["optimizer"]["state"][0].update(step=torch.ones(2)),
    "weight-shape": lambda state: state["model"].update(pos_embed=torch.ones(1)),
    "weight-more": lambda state: state["model"].update(more=torch.ones(1)),
    "scaler-text": lambda state: state.update(scaler={"scale": "large"}),
    "scaler-list": lambda state: state.update(scaler=[1]),
    "code": lambda state: state.update(model=Gadget(os.mkdir, CANARY)),
}

DEEPSPEED = {
    "nested": "[" * 100_000,
    "list": "[]",
    "repeated": '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}',
    "not-json": '{"zero_optimization": {"stage": 1,}}',
    "infinite": '{"zero_optimization": {"stage": 1e999}}',
    "stage-true": '{"zero_optimization": {"stage": true}}',
    "stage-list": '{"zero_optimization": {"stage": [1]}}',
    "zero-list": '{"zero_optimization": [1]}',
    "offload-text": '{"zero_optimization": {"stage": 1, "offload_param": "cpu"}}',
    "offload-disk": '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
    "buckets": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e15}}',
    "buckets-text": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}',
    "import": '{"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["os.system"]}}}',
    "experts-list": '{"zero_optimization": {"stage": 1}, "expert_parallel": [1]}',
    "experts-text": '{"zero_optimization": {"stage": 1}, "expert_parallel": {"enabled": "no"}}',
    "optimizer": '{"zero_optimization": {"stage": 1}, "optimizer": {"type": "os.system"}}',
    "batch": '{"zero_optimization": {"stage": 1}, "train_batch_size": [1]}',
    "writes": '{"zero_optimization": {"stage": 1}, "csv_monitor": {"output_path": "/tmp"}}',
    "profiles": '{"zero_optimization": {"stage": 1}, "flops_profiler": {"output_file": "/x"}}',
    "network": '{"zero_optimization": {"stage": 1}, "wandb": {"enabled": true}}',
    "unknown": '{"zero_optimization": {"stage": 1}, "../../etc/passwd": 1}',
}

AUTOENCODERS = {
    "block_out_channels": [[10**9, 8], [8] * 1000, [], "8", [8, -8], [8, True]],
    "layers_per_block": [10**9, 0, "1"],
    "latent_channels": [10**9, "4", 0],
    "in_channels": [10**6],
    "scaling_factor": ["1", [1]],
    "_class_name": ["os.system", ["AutoencoderKL"], None],
    "norm_num_groups": [10**9, 0],
    "down_block_types": [["os.system", "os.system"], 3],
}


def npz_bytes(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def hostile_counts(folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, Path]:
    """Count tables that no heat map may be drawn of; `arrays` are good ones."""
    folder.mkdir()
    settings = json.loads(str(arrays["settings"]))
    gadget = np.array(Gadget(os.mkdir, str(folder / CANARY)), dtype=object)
    changes = {
        "objects": {"class_names": np.array([gadget.item()] * len(arrays["labels"]))},
        "object": {"by_class": gadget},
        "object-settings": {"settings": gadget},
        "shape": {"by_class": arrays["by_class"][:, :1]},
        "negative": {"by_class": -arrays["by_class"]},
        "wrapping": {"by_class": arrays["by_class"] + np.array([2**62, 2**62, 2**62, 2**62])},
        "booleans": {"by_class": arrays["by_class"] > 0},
        "floats": {"by_class": arrays["by_class"].astype(float)},
        "nan-times": {"times": arrays["times"] * np.nan},
        "settings-bytes": {"settings": np.array(b"{}")},
        "settings-list": {"settings": np.array(["{}"] * 3)},
        "settings-nested": {"settings": np.array("[" * 100_000)},
    }
    fields = {
        "grid_size": [10**9, 10**400, -1, 2.0, None],
        "num_steps": [10**12, 0, True],
        "num_experts": [10**9, "4"],
        "cfg_scale": [10**400, "1"],
        "model": ["\x1b[2J", 3],
    }
    for name, values in fields.items():
        for number, value in enumerate(values):
            text = np.array(json.dumps({**settings, name: value}))
            changes[f"settings-{name}-{number}"] = {"settings": text}
    contents = {name: npz_bytes({**arrays, **change}) for name, change in changes.items()}
    whole = npz_bytes(arrays)
    contents |= {
        "bomb": bomb_npz(arrays),
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a zip",
    }
    paths = {f"{name}.npz": folder / f"{name}.npz" for name in contents}
    for name, content in contents.items():
        paths[f"{name}.npz"].write_bytes(content)
    good = folder / "truncated.npz"  # for a moment
    good.write_bytes(whole)
    for name, shape in (("trillion", b"(10**12,), }"), ("huge-shape", b"(99999999,)}")):
        paths[f"{name}.npz"] = rewrite(good, folder / f"{name}.npz", reshape(shape))
    good.write_bytes(contents["truncated"])
    pipe, directory = folder / "pipe.npz", folder / "directory.npz"
    os.mkfifo(pipe)
    directory.mkdir()
    return {**paths, "pipe.npz": pipe, "directory.npz": directory}


def reshape(shape: bytes):
    """Makes a table's header promise another shape than its bytes have."""

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"(5, 2, 4), }", shape) if name == "by_class.npy" else content

    return change


def bomb_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """A gigabyte of zeros in a table, a megabyte in the file."""
    file = io.BytesIO(npz_bytes({name: a for name, a in arrays.items() if name != "by_class"}))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (2**25, 1, 4)}
    )
    with (
        zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("by_class.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(2**10):
            member.write(bytes(2**20))
    return file.getvalue()
