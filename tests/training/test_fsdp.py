"""train.py --shard gives the results of DDP, also after resuming on more or fewer processes."""

import ctypes
import functools
import gc
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_state,
    assert_same_values,
    assert_unaveraged,
    call_main,
    config_of_command,
    expect_error,
    in_processes,
    needs_gpu,
    only_run,
    relative_error,
    resident,
    rows,
    run_script,
    state_of,
    step_folder,
    train_on,
)
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import moe
from checkpoints import MODEL_FILE, config_of, read_record
from checkpoints.meta import build_meta
from options.parts import Word
from routers import ROUTERS, Context, TopKRouter
from runtime.errors import UserError
from training.engine import new_weights
from training.engines.layout import shard_place
from training.engines.state import StoredShard, read_box
from training.optimizers import OPTIMIZERS, Optimizer

STEPS = 2
M_MMAP_THRESHOLD = -3  # from malloc.h
MUON = ["--optimizer=muon:precision=fp32"]
JIT = [  # class tokens and experts with biases
    "--norm=rms", "--class-tokens=3", "--class-tokens-start=1", "--patch-bottleneck=6",
    "--mlp-type=swiglu_bias",
]  # fmt: skip
OBJECTIVE = "mean_flow" if torch.__version__ >= (2, 13) else "rectified_flow"  # see check
# The other flags that interact with sharding, with one router each. batch_pool goes through the
# code of race, and `gradient_norms` compares the gradients of every router.
OTHERS = {
    "topk": [],
    "sigmoid": ["--accum-iter=1", *JIT, "--val-share=0.5", "--val-images=20", "--val-every=2",
                "--num-sample=4", "--ema", "exponential:decay=0.9", "exponential:decay=0.5",
                f"--objective={OBJECTIVE}",
                "--grad-clip=0"],
    "expert_choice": ["--rf", "--auxiliary", "repa:width=24", "sra", "dispersive", "contrastive"],
    "race": MUON,  # also updates the router
    "prototype": [*MUON, "--num_experts=4"],  # experts are not split: two on each process
}  # fmt: skip
CASES = {name: ["--accum-iter=2", f"--router={name}", *more] for name, more in OTHERS.items()} | {
    "gates": ["--train-router-only", "--gradient-checkpointing", "--ema", "none"],
    "bf16": ["--precision=bf16"],
}
SPREAD = ["--shard", "--expert-parallel=2"]
FOUR = {  # runs on four processes, with as many micro-batches in total as two processes take
    "prototype-2x2": [*SPREAD, "--shard-size=2"],  # two copies of the model
    "race-2x2": SPREAD,
}  # fmt: skip
LAYOUTS = {"ddp": [], "shard": ["--shard"], "spread": SPREAD}
WHOLE = {"ddp": "topk-ddp", "shard": "race", "spread": "sigmoid-spread"}  # runs without a pause
AGAIN = {"ddp": ("name",), "shard": ("name", "branch"), "spread": ("resume",)}
# On two processes. The others take four.
SPREAD_ROUTERS = ("sigmoid", "expert_choice")


@pytest.fixture(scope="module")
def flags(train_flags, latent_cache):
    """Function that returns the flags of a run: two steps of 12 images, with cached latents.

    The model has five experts, so two processes must split them along their width. Five does not
    divide the 384 assignments, so no expert is at exactly the mean load, where rounding would
    decide the direction in which the sigmoid router moves its bias.
    """

    def make(results: Path, *more: str, **changes) -> list[str]:
        values = {
            "global-batch-size": 12, "max_steps": STEPS, "grad_clip": 0.5, "log_every": 1,
            "latents_path": latent_cache, "data-path": None, "image-size": None, "run-name": "run",
            "num_experts": 5,
        }  # fmt: skip
        return [*train_flags(results, **values | changes), *more]

    return make


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> tuple[Path, list[dict]]:
    """Folder with the results folder of every run, and the measurements of the two processes."""
    root = tmp_path_factory.mktemp("two")
    tuned = [f"--finetune={root / 'topk-ddp' / 'run'}", "--num-classes=4", "--accum-iter=1"]
    cases = CASES | {"tuned": [*tuned, "--freeze", "blocks.*.attn.*", "x_embedder"]}
    commands = [
        flags(root / f"{name}{ending}", *more, *how)
        for name, more in cases.items()
        for ending, how in (("-ddp", []), ("", ["--shard"]))
    ]
    commands.append(flags(root / "copies", *CASES["topk"], "--shard", "--shard-size=1"))
    for name in (*SPREAD_ROUTERS, "bf16"):
        commands.append(flags(root / f"{name}-spread", *CASES[name], *SPREAD))

    # One process takes a step in micro-batches of 3, and two processes resume the run.
    race, auxiliary = [*CASES["race"], "--shard"], CASES["expert_choice"]
    call_main("train.py", *flags(root / "grown", *race, "--accum-iter=4", max_steps=1))
    commands.append(flags(root / "grown", *race))
    # DDP takes a step with auxiliary losses, and a sharded run resumes.
    commands.append(flags(root / "passed", *auxiliary, max_steps=1))
    commands.append(flags(root / "passed", *auxiliary, "--shard"))
    # Runs of one step go on by name or by path, or branch. test_runs.py has the others for DDP.
    for layout, hows in AGAIN.items():
        more = [*CASES[WHOLE[layout].split("-")[0]], *LAYOUTS[layout]]
        step = root / f"{layout}-{hows[0]}" / "run" / "checkpoints" / "0000001"
        for how in hows:
            results = root / f"{layout}-{how}"
            if how == "branch":
                commands.append(flags(results, *more, f"--resume={step}"))
                continue
            commands.append(flags(results, *more, max_steps=1))
            if how == "name":
                commands.append(flags(results, *more))
            else:
                run = f"--resume={results / 'run'}"
                commands.append(flags(None, *more, run, **{"run-name": None}))
    measured = in_processes(measure_and_train, commands)

    # Two processes took a step, and one resumes, or four with expert parallelism. The run in
    # spread-first goes the opposite way.
    resumed = {"began-ddp": "ddp", "gathered-2x2": "ddp", "copies-2x2": "ddp", "shrunk": "shard"}
    for name, source in resumed.items():
        shutil.copytree(root / f"{source}-name", root / name)
        shutil.rmtree(step_folder(root / name, STEPS))
    commands = [
        flags(root / name, *CASES[name.removesuffix("-2x2")], "--accum-iter=1", *more)
        for name, more in FOUR.items()
    ]
    commands.append(flags(root / "gathered-2x2", *SPREAD, "--accum-iter=1"))
    commands.append(flags(root / "copies-2x2", *SPREAD, "--shard-size=2", "--accum-iter=1"))
    commands.append(flags(root / "spread-first", *SPREAD, max_steps=1))
    in_processes(train_on, *commands, processes=4)
    alone = "--shard", "--accum-iter=4", "--expert-parallel=1"
    for name, more in (("spread-first", []), ("shrunk", race), ("began-ddp", [])):
        call_main("train.py", *flags(root / name, *more, *alone))
    for name in OTHERS:
        accumulation = "--accum-iter=2" if name == "sigmoid" else "--accum-iter=4"
        call_main("train.py", *flags(root / f"{name}-one", *CASES[name], accumulation))
    return root, measured


@pytest.fixture(scope="module")
def two(launched) -> Path:
    return launched[0]


@pytest.fixture(scope="module")
def measured(launched) -> list[dict]:
    return launched[1]


@pytest.mark.parametrize("layout", ["gates", "gates-ddp"])
def test_without_an_ema_a_checkpoint_has_the_weights_themselves(two, layout):
    assert_unaveraged(step_folder(two / layout, STEPS))


def compare(got: Path, want: Path, losses: float = 1e-6, weights: float = 1e-5) -> None:
    """Asserts that the logs, weights and EMAs of two results folders agree within tolerances."""
    pairs = ([row for row in rows(results) if "loss" in row] for results in (got, want))
    for mine, theirs in zip(*pairs, strict=True):
        for key in theirs:
            if "loss" in key or key == "grad_norm":
                assert mine[key] == pytest.approx(theirs[key], rel=losses), key
    folders = [step_folder(results, STEPS) for results in (got, want)]
    for path in folders[1].glob("*.safetensors"):
        mine, theirs = load_file(folders[0] / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert relative_error(mine[name], value) < weights, name


@pytest.mark.parametrize("name", [*OTHERS, "gates", "tuned"])
def test_sharding_on_two_processes_gives_the_results_of_ddp(two, name):
    compare(two / name, two / f"{name}-ddp")


@pytest.mark.parametrize("router", SPREAD_ROUTERS)
def test_expert_parallelism_gives_the_results_of_ddp(two, router):
    compare(two / f"{router}-spread", two / f"{router}-ddp")
    load = rows(two / f"{router}-spread")[-1]["expert_parallel_load"]
    is_even = router == "expert_choice"
    assert load == pytest.approx(1.2) if is_even else 1 <= load <= 2  # 3 of the 5 experts


@pytest.mark.parametrize("name", [*FOUR, "gathered-2x2", "copies-2x2", "spread-first"])
def test_four_processes_with_expert_parallelism_give_the_results_of_two(two, name):
    """Two processes share each half of the experts, or one in each copy of the model. Runs also
    change to and from this layout; in the second copy, they get the state from the first one."""
    reference = name.removesuffix("-2x2") if name in FOUR else "topk"
    compare(two / name, two / f"{reference}-ddp")


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharding_on_gpus_gives_the_losses_of_ddp(at_most, flags, tmp_path, optimizer):
    """Uses two GPUs if there are two."""
    processes = min(2, torch.cuda.device_count())
    for name, how in (("ddp", []), ("shard", ["--shard"])):
        arguments = flags(tmp_path / name, "--accum-iter=2", f"--optimizer={optimizer}", *how)
        if processes > 1:
            run_script("train.py", *arguments, processes=processes)
        else:
            call_main("train.py", *arguments)
    losses = ([row["loss"] for row in rows(tmp_path / name)] for name in ("ddp", "shard"))
    errors = torch.tensor([abs(got / want - 1) for want, got in zip(*losses, strict=True)])
    at_most("difference of the losses", errors.max().item(), 1e-3 if processes > 1 else 1e-6)


def test_sharding_in_bf16_differs_from_ddp_by_rounding(two):
    for name in ("bf16", "bf16-spread"):
        compare(two / name, two / "bf16-ddp", losses=0.02, weights=0.02)


def test_a_process_whose_shards_of_experts_are_empty_trains_as_under_ddp(flags, tmp_path):
    """Three processes have two experts, two, and none."""
    same = {"num_experts": 4, "log_every": STEPS}
    commands = [flags(tmp_path / name, *how, **same)
                for name, how in (("ddp", []), ("shard", ["--shard"]))]  # fmt: skip
    in_processes(train_on, *commands, processes=3)
    compare(tmp_path / "shard", tmp_path / "ddp")
    assert "27% more on the fullest" in (tmp_path / "shard" / "run" / "log.txt").read_text()


@pytest.mark.parametrize("name", ["copies", "began-ddp", "shrunk", "grown"])
def test_sharding_layout_and_the_number_of_processes_do_not_change_the_results(two, name):
    compare(two / name, two / ("race" if name in ("shrunk", "grown") else "topk"))


def test_a_sharded_run_writes_the_checkpoint_and_sample_grid_of_ddp(two):
    names = "sigmoid", "sigmoid-ddp", "sigmoid-spread"
    weights, expected = (load_file(step_folder(two / n, STEPS) / MODEL_FILE) for n in names[:2])
    assert_same_values(weights, expected)
    mine, theirs, spread = (only_run(two / name) / "samples-0000002.png" for name in names)
    assert mine.read_bytes() == theirs.read_bytes()
    pixels = [np.asarray(Image.open(grid)).astype(int) for grid in (theirs, spread)]
    assert pixels[0].shape == pixels[1].shape and abs(pixels[0] - pixels[1]).max() <= 1
    assert "val_loss" in rows(two / "sigmoid")[-1]


@pytest.mark.parametrize("router", OTHERS)
def test_two_ddp_processes_give_the_results_of_one_with_twice_the_micro_batches(two, router):
    """The micro-batches have the same size, because race compares the tokens of a micro-batch, and
    the auxiliary losses of topk and prototype are computed per micro-batch."""
    runs = two / f"{router}-ddp", two / f"{router}-one"
    compare(*runs)
    got, want = (state_of(step_folder(results, STEPS)) for results in runs)
    for name, value in want.items():
        if name.startswith("/model/") or "/projectors." in name:
            assert relative_error(got[name], value) < 1e-5, name
    assert {int(value) for name, value in got.items() if name.endswith("/step")} == {STEPS}


@pytest.mark.parametrize("name", ["expert_choice", "expert_choice-spread", "passed"])
def test_weights_of_auxiliary_losses_equal_those_of_ddp_in_any_layout(two, name):
    """Covers sharding, expert parallelism, and sharding that resumes a DDP run."""
    compare(two / name, two / "expert_choice-ddp")
    got, want = (state_of(step_folder(two / n, STEPS)) for n in (name, "expert_choice-ddp"))
    of_losses = [title for title in want if "/projectors." in title]
    assert len(of_losses) == 10 * 4  # weights and the state of AdamW
    for title in of_losses:
        assert relative_error(got[title], want[title]) < 1e-5, title


@pytest.mark.parametrize("layout, how", [(name, how) for name in AGAIN for how in AGAIN[name]])
def test_a_resumed_run_on_two_processes_is_bit_identical(two, layout, how):
    again, whole = two / f"{layout}-{how}", two / WHOLE[layout]
    step = step_folder(again, STEPS)
    # All processes write the header, which has the share of the EMA's first weights.
    assert read_record(step).ema_start_share == pytest.approx(0.81)
    assert "resumed from" in (only_run(again) / "log.txt").read_text()
    assert_same_state(step, step_folder(whole, STEPS))


@pytest.mark.parametrize("shape", [(5, 6, 4), (7, 6), (7,)], ids=str)
def test_every_shard_layout_reads_tensors_stored_in_any_other_layout(shape):
    """Includes layouts in which some processes hold nothing."""
    whole = torch.randn(shape)
    layouts = [[shard_place(whole.shape, part, n) for part in range(n)] for n in (1, 2, 3, 8)]
    layouts.append([(slice(0, 4),), (slice(4, shape[0]),)])  # rows, as in former versions
    for places in layouts:
        parts = []
        for place in places:
            local, first = whole[place], [limits.start for limits in place]
            offset = (*first, *[0] * (len(shape) - len(first)))
            if local.numel():
                parts.append(StoredShard(offset, tuple(local.shape), local.__getitem__))
        for place in (place for others in layouts[:-1] for place in others):
            assert torch.equal(read_box("weight", parts, place), whole[place])
    with pytest.raises(ValueError, match="expected"):
        read_box("weight", parts[1:], layouts[0][0])


def engine_of(dist, *arguments: str):
    from training.engines.fsdp import FSDPEngine

    small = "--model=DiT-Ti/2", "--hidden-size=32", "--num-heads=2", "--precision=fp32"
    config = config_of_command(*small, "--num_experts=8", "--shard", *arguments)
    config = config.changed({"num_classes": 4, "input_size": 8})
    return FSDPEngine(dist, config, new_weights(config)), config


def take_steps(dist, engine, config, steps: int = 1) -> dict[str, torch.Tensor]:
    from training.step import take_step

    size = engine.micro_batch(config, dist.world_size)
    labels = torch.zeros(size, dtype=torch.int64)
    batch = {"latents": torch.randn(size, 4, 8, 8), "label": labels}
    count = config.step.accum_iter
    for step in range(steps):
        torch.manual_seed(step)
        values = take_step(engine, config.objective, [batch] * count, count, step=step + 1,
                           rate=1.0)  # fmt: skip
    return values


class Calls(TorchDispatchMode):
    """Counts the calls of each operator. (A profile takes longer to read than a step.)"""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def collectives(dist, *arguments: str) -> dict[str, int]:
    """Number of calls of each operator in one step, collectives included."""
    engine, config = engine_of(dist, "--depth=3", "--global-batch-size=12", *arguments)
    with Calls() as counted:
        take_steps(dist, engine, config)
    return dict(counted.calls)


RECOMPUTED = ([], ["--selective-checkpointing"], ["--gradient-checkpointing"])


def exchanges(dist, *arguments: str) -> tuple[int, float]:
    """Number of exchanges of rows in a step with expert parallelism, and the gradient norm."""
    size = "--depth=2", "--global-batch-size=4"
    engine, config = engine_of(dist, *size, "--expert-parallel=2", *arguments)
    torch.manual_seed(0)
    with Calls() as counted:
        norm = take_steps(dist, engine, config)["grad_norm"].item()
    return counted.calls["exchange"], norm


def gradient_norms(dist, router: str, *layouts: list[str]) -> list[float]:
    """Gradient norm of a step in each layout.

    Initial weights would give the experts no gradient: the gates of the blocks and the output layer
    are zero.
    """
    norms, size = [], ("--depth=2", "--global-batch-size=4")
    for more in layouts:
        engine, config = engine_of(dist, *size, f"--router={router}", *more)
        torch.manual_seed(0)
        for name, weight in engine.local.items():
            if name.startswith("final_layer.linear") or "adaLN_modulation.1.bias" in name:
                whole = torch.randn(engine.shapes[name])
                weight.detach().copy_(whole[engine.places[name]])
        torch.manual_seed(dist.rank)
        norms.append(take_steps(dist, engine, config)["grad_norm"].item())
    return norms


class Halves(TopKRouter):
    """Each process uses its own weight. With `is_zero`, it adds the other one times zero."""

    is_zero = False

    def __post_init__(self):
        super().__post_init__()
        self.first = torch.nn.Parameter(torch.empty_like(self.weight))
        self.second = torch.nn.Parameter(torch.empty_like(self.weight))

    def reset_parameters(self):
        super().reset_parameters()
        torch.nn.init.normal_(self.first)
        torch.nn.init.normal_(self.second)

    def score(self, x):
        mine, other = self.first, self.second
        if torch.distributed.get_rank():
            mine, other = other, mine
        scores = super().score(x) + x @ mine.T
        return scores + 0 * (x @ other.T) if self.is_zero else scores


def norms_of_unused(dist) -> list[float]:
    """Gradient norm of a step whose processes use different weights, without and with zeros."""
    ROUTERS["halves"] = Halves
    norms = []
    for is_zero in (False, True):
        Halves.is_zero = is_zero
        norms.append(gradient_norms(dist, "halves", [])[0])
    return norms


def compiled_step(dist, *arguments: str, sharded: bool) -> tuple[int, int, float]:
    """Number of graphs of compiled blocks, number of graph breaks, and relative difference of the
    gradient norm from an uncompiled step. test_models.py runs the graphs' own backward passes."""
    from torch._dynamo.utils import counters

    from training.engines.ddp import DDPEngine

    graphs, norms, compile = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile = functools.partial(compile, backend=backend)
    counters.clear()
    for more in ([], ["--compile"]):
        size = "--depth=2", "--global-batch-size=4"
        engine, config = engine_of(dist, *size, *arguments, *more)
        engine = engine if sharded else DDPEngine(dist, config, new_weights(config))
        torch.manual_seed(0)
        norms.append(take_steps(dist, engine, config, steps=2)["grad_norm"].item())
    torch.compile = compile
    torch._dynamo.reset()
    return len(graphs), sum(counters["graph_break"].values()), abs(norms[1] / norms[0] - 1)


def spread_layer(dist) -> dict[str, float]:
    """Largest relative error of output, gradients and jvp of a layer with expert parallelism.

    The reference layer holds all experts. In the case "one", every token chooses the same expert.
    In the case "extra", the first image of the first process goes to the extra expert. In the case
    "unequal", every process has another number of images.
    """
    from moe import SparseMoEBlock
    from training.engines.expert_parallel import keep_experts, spread
    from training.engines.layout import experts_of_each, stored_of_each

    errors = {}
    for name, router in (("even", "expert_choice"), ("uneven", "topk"), ("one", "topk"),
                         ("extra", "prototype"), ("unequal", "expert_choice")):  # fmt: skip
        extra = ROUTERS[router].extra_experts
        counts = stored_of_each(5, dist.world_size, extra)
        layers = []
        for is_spread in (False, True):
            torch.manual_seed(0)
            layer = SparseMoEBlock(16, 5, 1 if name == "one" else 2, router=router)
            if name == "one":
                torch.nn.init.zeros_(layer.gate.weight)
            if is_spread:
                keep_experts(layer.experts, counts, dist.rank)
                routed = experts_of_each(5, dist.world_size)
                world, is_equal = torch.distributed.group.WORLD, name != "unequal"
                spread(layer.experts, world, routed, extra, has_equal_batches=is_equal)
            layers.append(layer)
        torch.manual_seed(dist.rank + 1)
        images = 3 + dist.rank * (name == "unequal")
        x, tangent = torch.randn(2, images, 10, 16)
        no_class = torch.arange(images) < (dist.rank == 0)

        def compute(x, layer, context=Context({"no_class": no_class})):  # noqa: B008
            return layer(x, context)[0]

        values = []
        for layer in layers:
            x = x.detach().requires_grad_()
            compute(x, layer).square().sum().backward()
            with torch.no_grad():
                call = functools.partial(compute, layer=layer)
                y, derivative = torch.func.jvp(call, (x,), (tangent,))
            values.append([y, derivative, x.grad, layer.gate.weight.grad])
        first = sum(counts[: dist.rank])
        for weight, local in zip(
            layers[0].experts.parameters(), layers[1].experts.parameters(), strict=True
        ):
            values[0].append(dist.sum(weight.grad)[first : first + counts[dist.rank]])
            values[1].append(local.grad)
        pairs = zip(*values, strict=True)
        errors[name] = max((a - b).norm().item() / max(1e-6, a.norm().item()) for a, b in pairs)
    return errors


def draw_before_a_step(dist) -> bool:
    """Whether training works after sampling a grid, as in a run that is told to save at once."""
    from sampling.generate import SamplerSettings, generate

    engine, config = engine_of(dist, "--depth=1", "--global-batch-size=2", "--rf")
    with engine.ema_weights():
        generate(engine.model, [0], [0], SamplerSettings("rectified_flow", num_steps=2))
    take_steps(dist, engine, config)
    return bool(engine.is_finite())


def storages_of_gradients(dist) -> int:
    """Number of storages in which DDP keeps the gradients while it sums micro-batches."""
    from training.engines.ddp import DDPEngine

    _, config = engine_of(dist, "--depth=1", "--accum-iter=2", "--global-batch-size=4")
    engine = DDPEngine(dist, config, new_weights(config))
    with engine.micro_step(is_last=False):
        prediction, _ = engine.network(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.tensor([0]))
        engine.backward(prediction.square().mean())
    return len({w.grad.untyped_storage().data_ptr() for w in engine.trained.values()})


def memory(dist, *arguments: str) -> tuple[float, float]:
    """Planned bytes of the first process, and the measured peak of a step."""
    gc.collect()
    before = resident()
    size = "--hidden-size=192", "--num-heads=4", "--depth=3", "--global-batch-size=4"
    engine, config = engine_of(dist, *size, *arguments)
    take_steps(dist, engine, config)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    take_steps(dist, engine, config)
    measured = resident("VmHWM") - before
    if not dist.is_main:  # only the plan of the first process is compared
        return 0.0, measured
    planned, *_ = engine.memory(config, dist.world_size)
    return sum(planned.values()), measured


def measure_and_train(dist, commands: list[list[str]]) -> dict:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # returns freed memory to the system at once
    memory(dist, *MUON, "--hidden-size=32")  # makes allocations that happen only once
    facts = {
        "memory": memory(dist),
        "memory accumulated": memory(dist, "--accum-iter=2"),
        "memory muon": memory(dist, *MUON),
        "memory spread": memory(dist, "--expert-parallel=2", "--hidden-size=256"),
        "steps": {
            "accumulated": collectives(dist, "--accum-iter=2"),
            "copies": collectives(dist, "--accum-iter=2", "--shard-size=1"),
            "kept": collectives(dist, "--reshard-after-forward=False"),
            "race": collectives(dist, "--router=race"),
            "muon": collectives(dist, *MUON),
        },
    }
    facts["spread layer"] = spread_layer(dist)
    facts["norms"] = {
        router: gradient_norms(dist, router, [], ["--expert-parallel=2"]) for router in ROUTERS
    }
    facts["unused"] = norms_of_unused(dist)
    facts["recomputed"] = [exchanges(dist, *more) for more in RECOMPUTED]
    facts["drawn"] = draw_before_a_step(dist)
    facts["compiled"] = {
        "ddp": compiled_step(dist, sharded=False),
        "shard": compiled_step(dist, sharded=True),
        "spread": compiled_step(dist, "--expert-parallel=2", sharded=True),
    }
    facts["storages"] = storages_of_gradients(dist)
    train_on(dist, *commands)  # last, because training makes the process keep freed memory
    return facts


def test_a_sharded_step_uses_one_collective_per_block_and_direction(measured):
    """Three blocks, and the root (embeddings, routers and output), which stays gathered."""
    names = (
        "_allgather_base_", "_reduce_scatter_base_", "allreduce_",
        "all_gather_into_tensor",
    )  # fmt: skip
    for result in measured:
        got = {
            case: tuple(counts.get(name, 0) for name in names)
            for case, counts in result["steps"].items()
        }
        assert got == {
            # The only sum is the gradient norm.
            "accumulated": (2 * (1 + 2 * 3), 2 * (1 + 3), 1, 0),
            "copies": (0, 0, 1 + 3 + 1, 0),  # one sum over the copies
            "kept": (1 + 3, 1 + 3, 1, 0),
            "race": (1 + 2 * 3, 1 + 3, 2, 0),  # one more sum for the thresholds
            "muon": (1 + 2 * 3, 1 + 3, 1, 2 * 6),  # six matrix shapes apart from experts, twice
        }


@pytest.mark.parametrize("case", ["memory", "memory accumulated", "memory muon", "memory spread"])
def test_the_memory_plan_of_sharding_matches_the_measured_peak(measured, case):
    planned, taken = measured[0][case]  # the first process has the most rows
    assert taken / 1.1 < planned < taken * 1.25


def test_ddp_accumulates_micro_batches_in_its_gradient_buckets(measured):
    assert [result["storages"] for result in measured] == [1, 1]


def test_a_layer_with_expert_parallelism_equals_the_layer_on_one_process(measured):
    assert max(error for result in measured for error in result["spread layer"].values()) < 1e-5


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_experts_in_parallel_have_the_norm_of_sharding(measured, router):
    for result in measured:
        whole, spread = result["norms"][router]
        assert spread == pytest.approx(whole, rel=1e-5)


def test_processes_that_use_different_weights_train_each_with_its_own_gradient(measured):
    if torch.__version__ < (2, 13):
        pytest.skip("needs PyTorch 2.13, whose FSDP sends zeros")
    for result in measured:
        got, want = result["unused"]
        assert got == want


def test_compiled_blocks_are_one_graph_under_ddp_and_sharding(measured):
    """With expert parallelism there is a graph break at the experts."""
    for result in measured:
        for name, (graphs, breaks, error) in result["compiled"].items():
            assert error < 1e-5, name
            assert graphs >= 1 if name == "spread" else (graphs, breaks) == (1, 0), name


def test_selective_checkpointing_exchanges_no_rows_again(measured):
    """A layer exchanges counts, rows and results, and two gradients. Complete checkpointing repeats
    the first three."""
    for result in measured:
        (plain, norm), *others = result["recomputed"]
        assert (plain, *(count for count, _ in others)) == (2 * 5, 2 * 5, 2 * 8)
        assert all(other == norm for _, other in others)


def test_a_sharded_model_can_be_sampled_before_the_first_step(measured):
    assert all(result["drawn"] for result in measured)


def test_unsupported_sharding_flags_are_one_line_errors(capsys, flags, tmp_path):
    train = "train.py", *flags(tmp_path)
    assert "without --shard" in expect_error(capsys, *train, "--shard-size=2")
    assert "without --shard" in expect_error(capsys, *train, "--expert-parallel=2")
    message = expect_error(capsys, *train, "--shard", "--expert-parallel=2")
    assert "--expert-parallel: got 2" in message
    message = expect_error(capsys, *train, "--shard", "--shard-size=2")
    assert "--shard-size: got 2, expected a divisor of 1" in message


class Adafactor(Optimizer):
    """An optimizer that keeps means of the rows and columns of a weight."""

    def make(self, named, lr, matrices):
        return torch.optim.Adafactor(named.values(), lr)


def test_shard_rejects_an_optimizer_whose_state_has_a_different_shape(monkeypatch):
    from training.engines.fsdp import FSDPEngine

    monkeypatch.setitem(OPTIMIZERS, "adafactor", Adafactor)
    config = replace(config_of_command("--shard"), model=config_of("DiT-Ti/2", depth=1))
    FSDPEngine.check(config, 2)
    other = replace(config, step=replace(config.step, optimizer=Word("adafactor")))
    FSDPEngine.check(other, 1)  # one process has whole weights
    with pytest.raises(UserError, match="adafactor keeps row_var .* requires tensors of the same"):
        FSDPEngine.check(other, 2)


def test_expert_parallelism_refuses_extra_experts_with_a_forward_pass_of_their_own(
    monkeypatch, request
):
    from training.engines.fsdp import FSDPEngine

    class Scaled(moe.Experts):
        def forward(self, x, routing, weights=None):
            return 2 * super().forward(x, routing, weights)

    words = "--shard", "--expert-parallel=2", "--model=DiT-Ti/2", "--depth=1", "--num_experts=4"
    monkeypatch.setattr(moe, "Experts", Scaled)
    build_meta.cache_clear()
    request.addfinalizer(build_meta.cache_clear)
    FSDPEngine.check(config_of_command(*words), 2)
    with pytest.raises(UserError, match="got 2, expected 1, because Scaled overrides forward"):
        FSDPEngine.check(config_of_command(*words, "--router=prototype"), 2)


def test_shard_rejects_a_scalar_parameter_of_a_router(monkeypatch):
    from training.engines.fsdp import FSDPEngine

    class Tempered(TopKRouter):
        def __post_init__(self):
            super().__post_init__()
            self.temperature = torch.nn.Parameter(torch.empty(()))

        def reset_parameters(self):
            super().reset_parameters()
            torch.nn.init.ones_(self.temperature)

    monkeypatch.setitem(ROUTERS, "tempered", Tempered)
    config = config_of_command("--shard", "--router=tempered", "--depth=1")
    with pytest.raises(UserError, match="^--shard: got the scalar parameter .*temperature, expec"):
        FSDPEngine.check(config, 2)


def test_the_memory_plan_of_a_large_model_suggests_shard(capsys):
    size = "--model=DiT-XL/2", "--depth=2", "--num_experts=144"
    large = "--dry-run", *size, "--gpus=8", "--global-batch-size=256"
    call_main("train.py", *large)
    assert "--shard" in capsys.readouterr().out.split("fits")[1].splitlines()[0]
    call_main("train.py", *large, "--shard")
    assert "fits         on a GPU, yes" in capsys.readouterr().out
