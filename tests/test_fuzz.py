"""Any input is either valid or refused by a UserError: nothing else is raised, nothing hangs.

The inputs are the same in every run. FUZZ_EXAMPLES sets how many each test tries:

    FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py
"""

import argparse
import io
import json
import os
import string
from dataclasses import asdict
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hostile_files import FIELDS, npz_bytes, safetensors_bytes
from safetensors.torch import load_file
from test_analysis import random_counts

from analysis.counts import RoutingCounts
from analysis.heatmap import draw_classes
from checkpoints.checkpoint import build_model, read_checkpoint, save_model
from models import DiT, DiTConfig
from runtime.errors import UserError
from training.zero_config import add_experts, complete_config, layout_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=20_000,  # milliseconds, of one input
    suppress_health_check=list(hypothesis.HealthCheck),
)

ODD = [0, -1, 1, 2, 3, 10**9, 2**63, 10**400, 0.5, 1e308, -0.0, True, None, "", "auto", "2", "../x"]
scalars = st.one_of(
    st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=20), st.booleans()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw, base: dict) -> object:
    """A JSON value like `base` with some of its values, or its keys, replaced."""
    result = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 3))):
        place = result
        while True:
            key = draw(st.sampled_from(sorted(place)) | st.text(string.ascii_letters, max_size=6))
            inner = place.get(key)
            if not isinstance(inner, dict) or not inner or draw(st.booleans()):
                break
            place = inner
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            place.pop(key, None)
        if not result:
            break
    return result


def texts(base: dict) -> st.SearchStrategy[str]:
    """JSON near `base`, JSON far from it, and what is none."""
    whole = json.dumps(base)
    cut = st.integers(0, len(whole)).map(lambda n: whole[:n])
    inserted = st.tuples(st.integers(0, len(whole)), st.text(max_size=5)).map(
        lambda change: whole[: change[0]] + change[1] + whole[change[0] :]
    )
    near = changed(base).map(json.dumps)
    return st.one_of(near, near, near, values.map(json.dumps), cut, inserted, st.text(max_size=50))


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some replaced, cut out or repeated."""
    edits = st.lists(
        st.tuples(
            st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=12) | st.none()
        ),
        min_size=1,
        max_size=4,
    )

    def apply(changes) -> bytes:
        content = whole
        for start, length, new in changes:
            cut = content[start : start + length]
            content = (
                content[:start] + (cut * 2 if new is None else new) + content[start + length :]
            )
        return content

    return edits.map(apply)


# Weight files


CONFIG = DiTConfig(
    input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=3,
    num_experts=2,
)  # fmt: skip
INFO = {
    "config": asdict(CONFIG),
    "step": 3,
    "model": "DiT-S/2",
    "objective": "gaussian",
    "image_size": 8,
    "vae_path": "somewhere",
    "class_names": ["a", "b", "c"],
    "initialized_from": {"path": "x", "step": 1},
    "settings": {"lr": 1e-4, "freeze": []},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model = DiT(**asdict(CONFIG))
    save_model(path / "good.safetensors", model.state_dict(), CONFIG, INFO)
    arguments = argparse.Namespace(num_heads=2, image_size=8, class_names=["a", "b", "c"])
    torch.save({"ema": model.state_dict(), "args": arguments}, path / "good.pt")
    return path


def read_and_build(path: Path) -> bool:
    """Whether a weight file is a model, which is then built; other errors than ours come out."""
    try:
        build_model(read_checkpoint(path))
    except UserError as error:
        assert str(error) and len(str(error)) < 3000
        return False
    return True


@pytest.fixture(scope="module")
def tensors(folder) -> tuple[dict, bytes]:
    """The header without metadata and the data of a good safetensors file."""
    whole = (folder / "good.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    return {name: entry for name, entry in header.items() if name[0] != "_"}, whole[8 + length :]


def test_good_files_are_taken(folder):
    assert read_and_build(folder / "good.safetensors") and read_and_build(folder / "good.pt")
    assert len(load_file(folder / "good.safetensors")) > 10


@fuzz
@hypothesis.given(text=texts(INFO))
def test_checkpoint_metadata(text, folder, tensors):
    header, data = tensors
    path = folder / "metadata.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": {"info": text}, **header}, data))
    read_and_build(path)


@fuzz
@hypothesis.given(data=st.data())
def test_bytes_of_weight_files(data, folder):
    name = data.draw(st.sampled_from(["good.safetensors", "good.pt"]))
    whole = (folder / name).read_bytes()
    # What is not weights stands at the start of the one and at both ends of the other.
    head, tail = whole[:6000], whole[-6000:]
    if data.draw(st.booleans()):
        content = data.draw(damaged(head)) + whole[6000:]
    else:
        content = whole[:-6000] + data.draw(damaged(tail))
    (folder / f"bytes-{name}").write_bytes(content)
    read_and_build(folder / f"bytes-{name}")


@fuzz
@hypothesis.given(arguments=changed({"num_heads": 2, "num_experts_per_tok": 1, "image_size": 8}))
def test_arguments_of_published_files(arguments, folder):
    state = torch.load(folder / "good.pt", weights_only=False)["ema"]
    torch.save({"ema": state, "args": argparse.Namespace(**arguments)}, folder / "arguments.pt")
    read_and_build(folder / "arguments.pt")


@fuzz
@hypothesis.given(text=texts({"_class_name": "DiTMoETransformer", "dit": asdict(CONFIG)}))
def test_config_json_of_a_folder(text, folder):
    (folder / "diffusers").mkdir(exist_ok=True)
    (folder / "diffusers" / "config.json").write_text(text, errors="surrogateescape")
    target = folder / "diffusers" / "diffusion_pytorch_model.safetensors"
    target.write_bytes((folder / "good.safetensors").read_bytes())
    read_and_build(folder / "diffusers")


# DeepSpeed's JSON


DEEPSPEED = {
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 100,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "none"},
    },
    "expert_parallel": {"enabled": True, "autoep_size": 2, "top_k": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "train_batch_size": 16,
    "gradient_clipping": "auto",
}
FLAGS = argparse.Namespace(
    train_batch_size=4, accum_iter=2, grad_clip=0.0, precision="bf16", lr=1e-4, weight_decay=0.0
)


@fuzz
@hypothesis.given(text=texts(DEEPSPEED))
def test_deepspeed_json(text, folder):
    path = folder / "ds.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    flags = argparse.Namespace(**vars(FLAGS), deepspeed_config=str(path))
    try:
        config = complete_config(flags, 2)
        add_experts(config, CONFIG, str(path), world_size=2, gpus_per_node=2)
        layout = layout_of(config, 2)
    except UserError as error:
        assert str(error)
        return
    assert layout.zero_stage in (1, 2, 3) and layout.expert_parallel_size in (0, 1, 2)
    json.dumps(config)


# The counts


def arrays_of(counts: RoutingCounts) -> dict[str, np.ndarray]:
    arrays = {name: getattr(counts, name) for name in FIELDS}
    return {**arrays, "settings": np.array(json.dumps(vars(counts.settings)))}


COUNTS = arrays_of(random_counts())
SETTINGS = json.loads(str(COUNTS["settings"]))
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
dtypes = st.sampled_from(["<i8", "<i4", "<u8", "<f8", "<f2", "<U3", "<U0", "S2", "?", "<c16", "O"])


@st.composite
def odd_arrays(draw) -> np.ndarray:
    if draw(st.booleans()):
        return np.array(draw(texts(SETTINGS)))
    array = np.zeros(draw(shapes), draw(dtypes))
    if array.dtype.kind in "iuf" and draw(st.booleans()):
        odd = np.array(draw(st.sampled_from([1, -1, 2**62, 12])))
        with np.errstate(over="ignore"):
            array = array + odd.astype(array.dtype, casting="unsafe")
    return array


def load_counts(path: Path) -> bool:
    try:
        RoutingCounts.load(path)
    except UserError as error:
        assert str(error) and len(str(error)) < 3000
        return False
    return True


@fuzz
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(sorted(COUNTS)), odd_arrays(), max_size=2),
    gone=st.sets(st.sampled_from(sorted(COUNTS)), max_size=1),
    more=st.dictionaries(st.text(string.ascii_letters, min_size=1), odd_arrays(), max_size=1),
    compressed=st.booleans(),
)
def test_arrays_of_counts(changes, gone, more, compressed, folder):
    arrays = {**more, **COUNTS, **changes}
    arrays = {name: array for name, array in arrays.items() if name not in gone}
    path = folder / "arrays.npz"
    path.write_bytes(npz_bytes(arrays, compressed))
    taken = load_counts(path)
    if gone:
        assert not taken
    if not gone and not changes:
        assert taken


@fuzz
@hypothesis.given(text=texts(SETTINGS))
def test_settings_of_counts(text, folder):
    path = folder / "settings.npz"
    try:
        path.write_bytes(npz_bytes({**COUNTS, "settings": np.array(text)}))
    except UnicodeEncodeError:
        return
    load_counts(path)


@fuzz
@hypothesis.given(
    content=st.one_of(*(damaged(npz_bytes(COUNTS, packed)) for packed in (True, False)))
)
def test_bytes_of_counts(content, folder):
    path = folder / "bytes.npz"
    path.write_bytes(content)
    load_counts(path)


@hypothesis.settings(fuzz, max_examples=max(1, EXAMPLES // 60))
@hypothesis.given(names=st.lists(st.text(max_size=12), min_size=5, max_size=5))
def test_any_class_names_are_drawn(names, folder):
    counts = random_counts()
    object.__setattr__(counts, "class_names", np.array(names))
    try:
        counts.save(folder / "names.npz")
    except UnicodeEncodeError:
        return
    loaded = RoutingCounts.load(folder / "names.npz")
    figure = draw_classes(loaded, [0, 1], np.arange(5))
    figure.savefig(io.BytesIO(), dpi=40)
