"""Training steps on fake CUDA tensors: no host reads, and even shares on 8 and 64 GPUs.

`pytest --fake` also runs the cases that take minutes, each in a separate process.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from routers import ROUTERS

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
    ),
    pytest.mark.skipif(
        torch.backends.cuda.is_built(), reason="needs a PyTorch for CPUs, without its own CUDA"
    ),
]
SMALL = {"depth": 2, "hidden_size": 64, "num_heads": 2}
FLAGS = {"race": {"optimizer": "muon"}, "sigmoid": {"precision": "fp16"}}
STEPS = {
    router: {"model": "DiT-S/2", "router": router, "flags": FLAGS.get(router), **SMALL}
    for router in ROUTERS
}
STEPS |= {
    f"noisy, {flag}": {"model": "DiT-S/2", "router": "noisy", "flags": {flag: True}, **SMALL}
    for flag in ("gradient_checkpointing", "selective_checkpointing")
}
# The width of G. Without shard_size, each node of 8 GPUs holds a copy of the model.
RANKS = {
    "G 64 in copies": {"model": "DiT-G/2", "ranks": 64, "depth": 2},
    "G 64": {"model": "DiT-G/2", "ranks": 64, "depth": 2,
             "flags": {"shard_size": 64, "accum_iter": 2}},
}  # fmt: skip
PADDED = {"model": "DiT-G/2", "ranks": 12, "depth": 2,
          "flags": {"shard_size": 12, "global_batch_size": 24}}  # fmt: skip
SPREAD = {"model": "DiT-G/2", "ranks": 64, "depth": 2, "flags": {"expert_parallel": 8},
          "router": "expert_choice"}  # fmt: skip
# Two processes have the same experts, and gather them.
PAIRS = {"model": "DiT-S/2", "ranks": 8, "router": "expert_choice",
         "flags": {"expert_parallel": 4}, **SMALL}  # fmt: skip
SLOW_STEPS = {
    "XL": {"XL": {"model": "DiT-XL/2", "images": 32}},
    "G": {"G": {"model": "DiT-G/2", "images": 16, "flags": {"gradient_checkpointing": True}}},
    "routers": {r: {"model": "DiT-XL/2", "router": r, "depth": 2} for r in ROUTERS},
}
SLOW_RANKS = {
    f"{name} {ranks}": {"model": f"DiT-{name}/2", "ranks": ranks, "flags": {"shard_size": ranks}}
    for name in ("XL", "G") for ranks in (8, 64)
}  # fmt: skip
needs_fake = pytest.mark.needs_fake


def run_fake(**functions: dict[str, dict]) -> dict[str, dict]:
    """Calls functions of fake_cuda.py in a new process, each with its cases.

    Returns the result of each case by name.
    """
    calls = [(name, function, options) for function, cases in functions.items()
             for name, options in cases.items()]  # fmt: skip
    arguments = json.dumps([call[1:] for call in calls])
    command = [sys.executable, str(ROOT / "tests" / "fake_cuda.py"), arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = result.stdout.splitlines()
    assert not result.returncode and len(lines) == len(calls), result.stderr[-2000:]
    return {name: json.loads(line) for (name, *_), line in zip(calls, lines, strict=True)}


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    others = {"padded": PADDED, "spread": SPREAD, "pairs": PAIRS}
    return run_fake(step_of=STEPS, traffic_of={**RANKS, **others})


def assert_no_host_read(steps: dict[str, dict]) -> None:
    assert {name: row["fault"] for name, row in steps.items()} == dict.fromkeys(steps)


def assert_even(rows: dict[str, dict]) -> None:
    """Asserts that bytes sent and held are as planned and at most 1.1 times an even share."""
    for name, row in rows.items():
        for kind, even in row["even"].items():
            assert 0.99 * even <= row[kind] <= 1.1 * even + 100, (name, kind)  # 100: the norm
        assert row["weights"] == row["plan"]["weights"], name
        assert row["root and two blocks"] == row["plan"]["gathered weights"], name


def test_a_training_step_on_fake_cuda_reads_nothing_on_the_host(found):
    assert_no_host_read({name: found[name] for name in STEPS})


def test_sharded_fake_ranks_hold_and_send_an_even_share(found):
    assert_even({name: found[name] for name in RANKS})
    spread, copies = found["spread"], found["G 64 in copies"]
    assert spread["weights"] == spread["plan"]["weights"]
    assert spread["gathered"] < copies["gathered"] / 8  # experts are not gathered from 8 processes
    assert 0 < spread["exchanged"] < copies["gathered"] / 50


def test_the_next_weights_are_gathered_before_a_layer_exchanges_rows(found):
    """The root, the first block, its experts and the second block; then the second one's experts.
    The backward pass gathers both groups of the second block and the first block, then the first
    one's experts. Each layer exchanges rows and results."""
    order = found["pairs"]["gathers before each exchange"]
    assert order == [4, 4, 5, 5, 8, 8, 9, 9]


def test_the_plan_counts_the_padding_that_fake_ranks_hold_and_gather(found):
    """16 experts become 24 on 12 processes."""
    row = found["padded"]
    assert row["layout"].endswith("46% more on the fullest")
    assert row["weights"] == row["plan"]["weights"]
    assert row["root and two blocks"] == row["plan"]["gathered weights"]
    for kind in ("gathered", "scattered"):
        assert row[kind] == pytest.approx(1.46 * row["even"][kind], rel=0.01), kind


@needs_fake
@pytest.mark.parametrize("name", SLOW_STEPS)
def test_full_size_models_read_nothing_on_the_host(name):
    assert_no_host_read(run_fake(step_of=SLOW_STEPS[name]))


@needs_fake
@pytest.mark.parametrize("name", SLOW_RANKS)
def test_full_size_models_are_sharded_evenly(name):
    assert_even(run_fake(traffic_of={name: SLOW_RANKS[name]}))
