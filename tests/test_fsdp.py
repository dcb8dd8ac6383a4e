"""train.py --shard: the numbers of DDP, also where other processes go on."""

import ctypes
import gc
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_same_state,
    call_main,
    expect_error,
    in_processes,
    only_run,
    relative_error,
    rows,
    run_script,
    state_of,
    step_folder,
    train_on,
)
from safetensors.torch import load_file

from engines.flags import DDPFlags
from routers import ROUTERS
from training.config import DataFacts, parse_training, resolve

STEPS = 3
M_MMAP_THRESHOLD = -3  # of malloc.h
MUON = ["--optimizer=muon", "--optimizer-precision=fp32"]
EVERYTHING = {  # what else a run can be told, some of it at once
    "held-out": ["--val-share=0.5", "--val-images=20", "--val-every=2", "--num-sample=4",
                 "--sample-every=2", "--ema-decay", "0.9", "0.5", "--rf", "--grad-clip=0"],
    "frozen": ["--freeze", "blocks.*.attn.*", "x_embedder"],
    "gates": ["--train-router-only", "--gradient-checkpointing"],
    "empty": ["--num_experts=1", "--num_experts_per_tok=1"],  # one process has none
}  # fmt: skip
IN_TWO = (*ROUTERS, "topk-muon", "race-muon", "batch_pool-muon")  # moves matrices of routers, too
LAYOUTS = {  # each of them computes what topk does
    "kept": ["--reshard-after-forward=False"],
    "copies": ["--shard-size=1"],
}


@pytest.fixture(scope="module")
def flags(train_flags, image_tree, tiny_vae, tmp_path_factory):
    """Flags of a run of three steps of 12 images, whose latents are cached.

    Of five experts two processes hold three and two. Nor can one have exactly its share of 384
    assignments, where rounding would say which way sigmoid's bias moves.
    """
    cache = tmp_path_factory.mktemp("latents")
    call_main("cache_latents.py", f"--data-path={image_tree}", f"--vae-path={tiny_vae}",
              "--image-size=16", f"--output={cache}")  # fmt: skip

    def make(results: Path, *more: str, **changes) -> list[str]:
        values = {
            "global_batch_size": 12, "max_steps": STEPS, "grad_clip": 0.5, "log_every": 1,
            "latents_path": cache, "data-path": None, "image-size": None, "run-name": "run",
            "num_experts": 5,
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
def launched(tmp_path_factory, flags) -> tuple[Path, list[dict]]:
    """A folder of results folders, most of two processes, and what each of the two measured."""
    root = tmp_path_factory.mktemp("two")
    cases = accumulated(*IN_TWO) | EVERYTHING
    cases["bf16"] = ["--precision=bf16"]
    cases["tuned"] = [f"--finetune={root / 'topk-ddp' / 'run'}", "--num-classes=4"]
    commands = with_both(root, flags, cases)
    for name, more in LAYOUTS.items():
        commands.append(flags(root / name, "--shard", "--accum-iter=2", "--router=topk", *more))

    # One process takes two steps in micro-batches of 3, then two go on in the same ones.
    call_main("train.py", *flags(root / "grown", *MUON, "--shard", "--accum-iter=4", max_steps=2))
    shutil.copytree(root / "grown", root / "grown-ddp")
    commands += with_both(root, flags, {"grown": [*MUON, "--accum-iter=2"]})
    commands.append(flags(root / "shrunk", *MUON, "--shard", "--accum-iter=2", max_steps=2))
    for steps in (2, STEPS):
        commands.append(flags(root / "again-ddp", "--accum-iter=2", max_steps=steps))
    commands.append(flags(root / "began-ddp", "--accum-iter=2", max_steps=2))
    measured = in_processes(measure_and_train, commands)
    for name, more in (("shrunk", MUON), ("began-ddp", [])):
        call_main("train.py", *flags(root / name, "--shard", "--accum-iter=4", *more))
    for router in ROUTERS:
        call_main("train.py", *flags(root / f"{router}-one", "--accum-iter=4", router=router))
    return root, measured


@pytest.fixture(scope="module")
def two(launched) -> Path:
    return launched[0]


@pytest.fixture(scope="module")
def measured(launched) -> list[dict]:
    return launched[1]


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
        for name, value in theirs.items():
            assert relative_error(mine[name], value) < weights, name


@pytest.mark.parametrize("name", [*IN_TWO, *EVERYTHING, "tuned", "grown"])
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
    apart = torch.tensor([abs(got / want - 1) for want, got in zip(*losses, strict=True)])
    at_most("difference of the losses", apart.max().item(), 1e-3 if processes > 1 else 1e-6)


def test_bf16_differs_from_ddp_by_rounding(two):
    compare(two / "bf16", two / "bf16-ddp", losses=0.02, weights=0.02)


@pytest.mark.parametrize("name", [*LAYOUTS, "began-ddp", "shrunk"])
def test_how_weights_are_kept_and_fewer_processes_change_no_number(two, name):
    compare(two / name, two / ("topk-muon" if name == "shrunk" else "topk"))


def test_checkpoint_and_grid_are_those_of_ddp(two):
    for path in ("checkpoints/0000003/model.safetensors", "samples-0000002.png"):
        mine, theirs = (only_run(two / name) / path for name in ("held-out", "held-out-ddp"))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("router", ROUTERS)
def test_two_processes_are_one_with_as_many_micro_batches(two, router):
    """As many of the same size: race and batch_pool compare the tokens of a whole micro-batch, and
    the losses of topk and prototype are of one."""
    runs = two / f"{router}-ddp", two / f"{router}-one"
    compare(*runs)
    got, want = (state_of(step_folder(results, STEPS)) for results in runs)
    for name, value in want.items():
        if name.startswith("/model/"):
            assert relative_error(got[name], value) < 1e-5, name
    assert {int(value) for name, value in got.items() if name.endswith("/step")} == {STEPS}


def test_ddp_goes_on_with_equal_bits(two):
    assert "resumed from" in (only_run(two / "again-ddp") / "log.txt").read_text()
    assert_same_state(*(step_folder(two / name, STEPS) for name in ("again-ddp", "topk-ddp")))


def engine_of(dist, *arguments: str):
    from engines.fsdp import FSDPEngine

    facts = DataFacts(num_classes=4, input_size=8, in_channels=4, image_size=64, vae_path="")
    arguments = ["--model=DiT-Ti/2", "--num_experts=8", "--shard", *arguments]
    config = resolve(parse_training(DDPFlags, None, arguments), DDPFlags, data=facts)
    return FSDPEngine(dist, config, None), config


def take_steps(dist, engine, config, steps: int = 1) -> None:
    from training.step import take_step

    size = engine.micro_batch(config, dist.world_size)
    labels = torch.zeros(size, dtype=torch.int64)
    batch = {"latents": torch.randn(size, 4, 8, 8), "label": labels}
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

    engine, config = engine_of(dist, "--depth=1", "--global-batch-size=2", "--rf")
    with engine.ema_weights():
        generate(engine.model, [0], [0], SamplerSettings("rectified_flow", num_steps=2))
    take_steps(dist, engine, config)
    return bool(engine.is_finite())


def storages_of_gradients(dist) -> int:
    """Where DDP keeps the gradients while micro-batches are summed."""
    from engines.ddp import DDPEngine

    _, config = engine_of(dist, "--depth=1", "--accum-iter=2", "--global-batch-size=4")
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
    size = "--hidden-size=256", "--depth=3", "--global-batch-size=4"
    engine, config = engine_of(dist, *size, "--precision=fp32", *arguments)
    take_steps(dist, engine, config)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    take_steps(dist, engine, config)
    measured = resident("VmHWM") - before
    micro_batch = engine.micro_batch(config, dist.world_size)
    planned, *_ = engine.memory(config, dist.world_size, micro_batch)
    return sum(planned.values()), measured


def measure_and_train(dist, commands: list[list[str]]) -> dict:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back at once
    memory(dist, *MUON)  # what is allocated once and for all
    facts = {
        "memory": memory(dist),
        "memory accumulated": memory(dist, "--accum-iter=2"),
        "memory muon": memory(dist, *MUON),
        "steps": {
            "topk": collectives(dist),
            "accumulated": collectives(dist, "--accum-iter=2"),
            "copies": collectives(dist, "--accum-iter=2", "--shard-size=1"),
            "kept": collectives(dist, "--reshard-after-forward=False"),
            "race": collectives(dist, "--router=race"),
            "muon": collectives(dist, *MUON),
        },
    }
    facts["drawn"] = draw_before_a_step(dist)
    facts["storages"] = storages_of_gradients(dist)
    train_on(dist, *commands)  # last: it has the process keep what is freed
    return facts


def test_a_step_takes_one_collective_a_block_and_direction(measured):
    """Three blocks, and the root with embeddings, routers and output, which stays gathered."""
    names = (
        "_allgather_base_", "_reduce_scatter_base_", "allreduce_",
        "allgather_into_tensor_coalesced_",
    )  # fmt: skip
    for result in measured:
        got = {
            case: tuple(counts.get(name, 0) for name in names)
            for case, counts in result["steps"].items()
        }
        assert got == {
            "topk": (1 + 2 * 3, 1 + 3, 1, 0),  # the norm is the one sum
            "copies": (0, 0, 1 + 3, 0),  # only the last micro-batch is summed over the copies
            "kept": (1 + 3, 1 + 3, 1, 0),
            "accumulated": (2 * (1 + 2 * 3), 2 * (1 + 3), 1, 0),
            "race": (1 + 2 * 3, 1 + 3, 2, 0),  # its thresholds
            "muon": (1 + 2 * 3, 1 + 3, 1, 5),  # matrices of five shapes, and no experts
        }


@pytest.mark.parametrize("case", ["memory", "memory accumulated", "memory muon"])
def test_the_plan_is_what_a_process_takes(measured, case):
    planned, taken = measured[0][case]  # the first process has the most rows
    assert taken / 1.1 < planned < taken * 1.25


def test_ddp_sums_micro_batches_in_its_buckets(measured):
    assert [result["storages"] for result in measured] == [1, 1]


def test_a_grid_can_come_before_the_first_step(measured):
    assert all(result["drawn"] for result in measured)


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
