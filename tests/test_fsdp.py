"""train.py --shard: the numbers of DDP, on any number of processes, after any interruption."""

import ctypes
import gc
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_same_values,
    call_main,
    children,
    expect_error,
    flat,
    in_processes,
    kill_all,
    only_run,
    relative_error,
    rows,
    run_script,
    running,
    step_folder,
    train_on,
    wait_for,
)
from safetensors.torch import load_file

from engines.flags import DDPFlags
from routers import ROUTERS
from training.config import DataFacts, parse_training, resolve

STEPS = 3
M_MMAP_THRESHOLD = -3  # of malloc.h
EVERYTHING = {  # what else a run can be told, some of it at once
    "held-out": ["--val-share=0.5", "--val-images=20", "--val-every=2", "--num-sample=4",
                 "--sample-every=2", "--ema-decay", "0.9", "0.5", "--rf", "--grad-clip=0"],
    "frozen": ["--freeze", "blocks.*.attn.*", "x_embedder"],
    "gates": ["--train-router-only", "--gradient-checkpointing"],
    "bf16": ["--precision=bf16"],
}  # fmt: skip
MUON = ["--optimizer=muon", "--optimizer-precision=fp32"]
IN_TWO = (*ROUTERS, "topk-muon", "race-muon")  # Muon also moves matrices of a router
IN_THREE = ("topk", "batch_pool-muon")
LAYOUTS = {  # each of them computes what topk does
    "kept": ["--reshard-after-forward=False"],
    "recomputed": ["--gradient-checkpointing"],
    "copies": ["--shard-size=1"],
}


@pytest.fixture(scope="module")
def flags(train_flags, image_tree, tiny_vae, tmp_path_factory):
    """Flags of a run of three steps of 12 images, whose latents are cached."""
    cache = tmp_path_factory.mktemp("latents")
    call_main("cache_latents.py", f"--data-path={image_tree}", f"--vae-path={tiny_vae}",
              "--image-size=16", f"--output={cache}")  # fmt: skip

    def make(results: Path, *more: str, **changes) -> list[str]:
        values = {
            "global_batch_size": 12, "max_steps": STEPS, "grad_clip": 0.5, "log_every": 1,
            "latents_path": cache, "data-path": None, "image-size": None, "run-name": "run",
        }  # fmt: skip
        return [*train_flags(results, **values | changes), *more]

    return make


def with_both(root: Path, flags, cases: dict[str, list[str]]) -> list[list[str]]:
    """Commands of each case under DDP, in a folder whose name ends in -ddp, and under --shard."""
    return [
        flags(root / f"{name}{ending}", *more, *how)
        for name, more in cases.items()
        for ending, how in (("-ddp", []), ("", ["--shard"]))
    ]


def accumulated(*names: str) -> dict[str, list[str]]:
    """Cases of two micro-batches a step: a router each, those whose names end in -muon with it."""
    return {
        name: [
            "--accum-iter=2",
            f"--router={name.removesuffix('-muon')}",
            *(MUON if name.endswith("-muon") else []),
        ]
        for name in names
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory, flags):
    """Results folders of two processes, by name."""
    root = tmp_path_factory.mktemp("two")
    cases = accumulated(*IN_TWO) | EVERYTHING
    cases["tuned"] = [f"--finetune={root / 'topk-ddp' / 'run'}", "--num-classes=4"]
    commands = with_both(root, flags, cases)
    for name, more in LAYOUTS.items():
        commands.append(flags(root / name, "--shard", "--accum-iter=2", "--router=topk", *more))

    # One process takes two steps in micro-batches of 3, then two go on in the same ones.
    call_main("train.py", *flags(root / "grown", *MUON, "--shard", "--accum-iter=4", max_steps=2))
    shutil.copytree(root / "grown", root / "grown-ddp")
    commands += with_both(root, flags, {"grown": [*MUON, "--accum-iter=2"]})
    commands.append(flags(root / "shrunk", *MUON, "--shard", "--accum-iter=2", max_steps=2))
    commands.append(flags(root / "began-ddp", "--accum-iter=2", max_steps=2))

    killed = {"optimizer": "muon", "ckpt_every": 2}
    last = killed_twice(flags(root / "killed", "--shard", **killed, max_steps=10**6)) + 2
    for name in ("killed", "killed-whole"):
        commands.append(flags(root / name, "--shard", **killed, max_steps=last))
    in_processes(train_on, *commands)
    for name, more in (("shrunk", MUON), ("began-ddp", [])):
        call_main("train.py", *flags(root / name, "--shard", "--accum-iter=4", *more))
    return root


def killed_twice(arguments: list[str]) -> int:
    """Trains on two processes; kills one, which torchrun starts again, then all of them.

    Returns the last step that was saved for sure.
    """
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with running("train.py", arguments, 2, ("--max-restarts=1",), **store) as process:
        wait_for(process, "checkpoints/0000002")
        os.kill(children(process.pid)[0], signal.SIGKILL)
        wait_for(process, "resumed from")
        said = wait_for(process, "saved ")
        kill_all(process)
    return int(re.findall(r"saved .*/(\d{7})\n", said)[-1])


def compare(got: Path, want: Path, losses: float = 1e-6, weights: float = 1e-5) -> None:
    """Holds the log, all weights and EMAs of two results folders against each other."""
    pairs = list(zip(rows(got), rows(want), strict=True))
    for mine, theirs in pairs:
        keys = [key for key in theirs if "loss" in key or key == "grad_norm"]
        expected = {key: theirs[key] for key in keys}
        assert {key: mine[key] for key in keys} == pytest.approx(expected, rel=losses)
    folders = [step_folder(results, STEPS) for results in (got, want)]
    for path in folders[1].glob("*.safetensors"):
        mine, theirs = load_file(folders[0] / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        assert max(relative_error(mine[key], value) for key, value in theirs.items()) < weights


@pytest.mark.parametrize("name", [*IN_TWO, "held-out", "frozen", "gates", "tuned", "grown"])
def test_two_processes_compute_what_ddp_does(two, name):
    compare(two / name, two / f"{name}-ddp")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gpus_or_one_process_compute_what_ddp_does(at_most, flags, tmp_path, optimizer):
    """On two GPUs if there are as many."""
    processes = min(2, torch.cuda.device_count())
    for name, how in (("ddp", []), ("shard", ["--shard"])):
        arguments = flags(tmp_path / name, "--accum-iter=2", f"--optimizer={optimizer}", *how)
        if processes > 1:
            run_script("train.py", *arguments, processes=processes)
        else:
            call_main("train.py", *arguments)
    losses = ([row["loss"] for row in rows(tmp_path / name)] for name in ("ddp", "shard"))
    apart = max(abs(got / want - 1) for want, got in zip(*losses, strict=True))
    at_most("difference of the losses", apart, 1e-3 if processes > 1 else 1e-6)


def test_bf16_differs_from_ddp_by_rounding(two):
    compare(two / "bf16", two / "bf16-ddp", losses=0.02, weights=0.02)


@pytest.mark.parametrize("name", [*LAYOUTS, "began-ddp", "shrunk"])
def test_how_weights_are_kept_and_fewer_processes_change_no_number(two, name):
    compare(two / name, two / ("topk-muon" if name == "shrunk" else "topk"))


def test_checkpoint_and_grid_are_those_of_ddp(two):
    for path in ("checkpoints/0000003/model.safetensors", "samples-0000002.png"):
        mine, theirs = (only_run(two / name) / path for name in ("held-out", "held-out-ddp"))
        assert mine.read_bytes() == theirs.read_bytes()


def test_killed_runs_end_with_equal_bits(two):
    states = []
    for name in ("killed", "killed-whole"):
        folder = max(only_run(two / name).glob("checkpoints/*"))
        parts = sorted(folder.glob("fsdp/*.pt"))
        assert len(parts) == 2
        states.append(flat([torch.load(path, weights_only=True) for path in parts]))
        states[-1] |= load_file(folder / "model.safetensors")
    assert len(rows(two / "killed")) == len(rows(two / "killed-whole"))
    assert_same_values(*states)


def engine_of(dist, *arguments: str):
    from engines.fsdp import FSDPEngine

    facts = DataFacts(num_classes=4, input_size=8, in_channels=4, image_size=64, vae_path="")
    arguments = ["--model=DiT-Ti/2", "--num_experts=8", "--shard", *arguments]
    config = resolve(parse_training(DDPFlags, None, arguments), DDPFlags, data=facts)
    return FSDPEngine(dist, config, None), config


def take_steps(dist, engine, config, steps: int = 1) -> None:
    from training.step import take_step

    size = engine.micro_batch(config, dist.world_size)
    batch = torch.randn(size, 4, 8, 8), torch.zeros(size, dtype=torch.int64)
    count = config.step.accum_iter
    for step in range(steps):
        take_step(engine, config.objective, [batch] * count, count, step=step + 1, rate=1.0,
                  dist=dist)  # fmt: skip


def collectives(dist, *arguments: str) -> dict[str, int]:
    """The collectives of one step."""
    engine, config = engine_of(dist, "--depth=3", "--global-batch-size=12", *arguments)
    with torch.profiler.profile() as profile:
        take_steps(dist, engine, config)
    events = profile.key_averages()
    return {e.key.split("::")[1]: e.count for e in events if "c10d" in e.key and "::" in e.key}


def draw_before_a_step(dist) -> bool:
    """Whether a run that draws a grid first, as it does when told to save, trains on."""
    from sampling.generate import SamplerSettings, generate

    engine, config = engine_of(dist, "--depth=1", "--global-batch-size=3", "--rf")
    with engine.ema_weights():
        generate(engine.model, [0], [0], SamplerSettings("rectified_flow", num_steps=2))
    take_steps(dist, engine, config)
    return bool(engine.is_finite())


def storages_of_gradients(dist) -> int:
    """Where DDP keeps the gradients while micro-batches are summed."""
    from engines.ddp import DDPEngine

    _, config = engine_of(dist, "--depth=1", "--accum-iter=2", "--global-batch-size=6")
    engine = DDPEngine(dist, config, None)
    with engine.micro_step(is_last=False):
        prediction, _ = engine.network(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.tensor([0]))
        engine.backward(prediction.square().mean())
    return len({w.grad.untyped_storage().data_ptr() for w in engine.trained.values()})


def memory(dist, *arguments: str) -> tuple[float, float]:
    """The bytes of a process that are planned, and those that a step takes at most."""

    def resident(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

    gc.collect()
    before = resident("VmRSS")
    size = "--hidden-size=256", "--depth=3", "--global-batch-size=6"
    engine, config = engine_of(dist, *size, "--precision=fp32", *arguments)
    take_steps(dist, engine, config)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    take_steps(dist, engine, config)
    measured = resident("VmHWM") - before
    planned, *_ = engine.memory(config, 3, engine.micro_batch(config, 3))
    return sum(planned.values()), measured


def three_processes(dist, commands: list[list[str]]) -> dict:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back at once
    memory(dist, *MUON)  # what is allocated once and for all
    facts = {
        "memory": memory(dist),
        "memory accumulated": memory(dist, "--accum-iter=2"),
        "memory muon": memory(dist, *MUON),
        "steps": {
            "topk": collectives(dist),
            "accumulated": collectives(dist, "--accum-iter=2"),
            "kept": collectives(dist, "--reshard-after-forward=False"),
            "race": collectives(dist, "--router=race"),
            "muon": collectives(dist, *MUON),
        },
    }
    facts["drawn"] = draw_before_a_step(dist)
    facts["storages"] = storages_of_gradients(dist)
    train_on(dist, *commands)  # last: it has the process keep what is freed
    return facts


@pytest.fixture(scope="module")
def three(tmp_path_factory, flags):
    root = tmp_path_factory.mktemp("three")  # 4 experts on 3 processes: the last one has none
    commands = with_both(root, flags, accumulated(*IN_THREE))
    return root, in_processes(three_processes, commands, processes=3)


@pytest.mark.parametrize("name", IN_THREE)
def test_three_processes_compute_what_ddp_does(three, name):
    root, _ = three
    compare(root / name, root / f"{name}-ddp")


def test_a_step_takes_one_collective_a_block_and_direction(three):
    """Three blocks, and the root with embeddings, routers and output, which stays gathered."""
    names = (
        "_allgather_base_", "_reduce_scatter_base_", "allreduce_",
        "allgather_into_tensor_coalesced_",
    )  # fmt: skip
    for result in three[1]:
        got = {
            case: tuple(counts.get(name, 0) for name in names)
            for case, counts in result["steps"].items()
        }
        assert got == {
            "topk": (1 + 2 * 3, 1 + 3, 1, 0),  # the norm is the one sum
            "kept": (1 + 3, 1 + 3, 1, 0),
            "accumulated": (2 * (1 + 2 * 3), 1 + 3, 1, 0),
            "race": (1 + 2 * 3, 1 + 3, 2, 0),  # its thresholds
            "muon": (1 + 2 * 3, 1 + 3, 1, 5),  # matrices of five shapes, and no experts
        }


@pytest.mark.parametrize("case", ["memory", "memory accumulated", "memory muon"])
def test_the_plan_is_what_a_process_takes(three, case):
    planned, measured = three[1][0][case]  # the first process has the most rows
    assert measured / 1.1 < planned < measured * 1.25


def test_ddp_sums_micro_batches_in_its_buckets(three):
    assert [result["storages"] for result in three[1]] == [1, 1, 1]


def test_a_grid_can_come_before_the_first_step(three):
    assert all(result["drawn"] for result in three[1])


def test_what_sharding_cannot_do_is_refused(capsys, flags, tmp_path):
    train = "train.py", *flags(tmp_path)
    assert "--precision: got fp16 with --shard" in expect_error(
        capsys, *train, "--shard", "--precision=fp16"
    )
    assert "without --shard" in expect_error(capsys, *train, "--shard-size=2")
    message = expect_error(capsys, *train, "--shard", "--shard-size=2")
    assert "--shard-size: got 2, expected a divisor of 1" in message


def test_the_plan_of_a_large_model_names_shard(capsys):
    large = "--dry-run", "--model=DiT-XL/2", "--gpus=8", "--global-batch-size=256"
    call_main("train.py", *large)
    assert "--shard" in capsys.readouterr().out.split("fits")[1].splitlines()[0]
    call_main("train.py", *large, "--shard")
    assert "fits         yes" in capsys.readouterr().out
