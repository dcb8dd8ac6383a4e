"""Training steps and runs on tiny models and generated images."""

import errno
import gzip
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    HAS_EXTRAS,
    TINY_MODEL,
    call_main,
    expect_error,
    flat,
    in_processes,
    needs_extras,
    needs_gpu,
    only_run,
    relative_error,
    rows,
    state_of,
    step_folder,
    train_on,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter

import training.step
from checkpoints import Record, load_model, read_record
from checkpoints.costs import count_macs
from conditions import drop_conditions
from diffusion import OBJECTIVES, RectifiedFlow
from latents.sources import Source
from models import DiTConfig
from options.parts import option
from routers import ROUTERS
from runtime import devices, signals
from runtime.devices import peak_of
from runtime.errors import UserError
from runtime.processes import ALONE, Distributed
from runtime.signals import Requests
from training import loop
from training.config import TrainConfig
from training.engine import new_weights
from training.engines.ddp import DDPEngine
from training.log import RunLog
from training.loop import TrainingLoop
from training.optimizers import OPTIMIZERS, Optimizer
from training.saving import Saver
from training.setup import inputs_of


@pytest.fixture(scope="module")
def flags(train_flags):
    values = {"global-batch-size": 8, "log-every": 2, "max-steps": 4, "rf": True}
    return partial(train_flags, **values)


class Plain(Optimizer):
    """Optimizer without a fused implementation, so the host must skip steps that are not finite."""

    momentum: float | None = option(None, help="None: AdamW", ge=0)

    def make(self, named, lr, matrices=()):
        if self.momentum is None:
            return torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0)
        return torch.optim.SGD(named.values(), lr=lr, momentum=self.momentum)


FUSED, ADAM, SGD = {}, {"optimizer": "plain"}, {"optimizer": "plain:momentum=0.9"}
MUON = {"optimizer": "muon:weight_decay=0.1"}
WITH_MUON = pytest.param(MUON, id="muon", marks=needs_extras)


@pytest.fixture(autouse=True)
def plain_optimizer(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "plain", Plain)


def engine_of(
    precision: str = "fp32", settings: dict = FUSED, dist: Distributed = ALONE, **model
) -> DDPEngine:
    OPTIMIZERS["plain"] = Plain  # processes started by in_processes need this too
    values = {"precision": precision, "ema": ("exponential:decay=0.9",), "lr": 1e-3, **settings}
    config = replace(TrainConfig.default(), model=DiTConfig(**{**TINY_MODEL, **model}))
    config = config.changed(values)
    return DDPEngine(dist, config, new_weights(config))


class ToOnes:
    """Objective (prediction - 1)^2, multiplied by the next factor in each call."""

    guides_in_training = False

    def __init__(self, *factors: float):
        self.factors = list(factors)

    def draw(self, x) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return {}

    def losses(self, network, x, y) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        prediction, aux_loss = network(torch.randn(x.shape), torch.rand(len(x)) * 999, y)
        loss = self.factors.pop(0) * (prediction - 1).square().mean()
        return {"loss": loss, "aux_loss": aux_loss}


BATCH = {"latents": torch.zeros(4, 4, 8, 8), "label": torch.arange(4)}


def take_step(engine: DDPEngine, *factors: float) -> bool:
    """Takes a step with one micro-batch per loss factor; returns whether it was skipped."""
    arguments = engine, ToOnes(*factors), [BATCH] * len(factors), len(factors)
    return bool(training.step.take_step(*arguments, step=1, rate=1.0)["skipped"])


def snapshot(engine: DDPEngine) -> list[torch.Tensor]:
    """Copies of the weights, the EMA and the optimizer state."""
    numbers = sorted(flat(engine.optimizer.state_dict()).items())
    state = [value for _, value in numbers if torch.is_tensor(value)]
    weights = parameters_to_vector(engine.averaged.values())
    average = parameters_to_vector(engine.emas[0].averages)
    return [value.clone() for value in (weights, average, *state)]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_with_a_nan_micro_batch_changes_nothing_and_the_next_step_works(router):
    """The first micro-batch contains NaN, as from a damaged image. The second is normal."""
    engine, objective = engine_of(router=router, num_experts_per_tok=2), OBJECTIVES["gaussian"]()

    def step(first: float) -> bool:
        torch.manual_seed(0)
        batches = [{**BATCH, "latents": BATCH["latents"] + value} for value in (first, 1)]
        arguments = engine, objective, batches, len(batches)
        return bool(training.step.take_step(*arguments, step=1, rate=1.0)["skipped"])

    def state() -> list[torch.Tensor]:
        return [*snapshot(engine), *(buffer.clone() for buffer in engine.model.buffers())]

    assert not step(1.0)
    before = state()
    assert step(math.nan) and all(map(torch.equal, before, state())) and engine.is_finite()
    assert not step(1.0) and engine.is_finite()
    learnt = [name for name, _ in engine.model.named_buffers() if ".gate." in name]
    changed = [not torch.equal(*pair) for pair in zip(before, state(), strict=True)]
    assert changed[0] and all(changed[len(changed) - len(learnt) :])
    for name in learnt:
        engine.model.get_buffer(name).fill_(math.inf)  # as a mask may be
        assert engine.is_finite()
        engine.model.get_buffer(name).fill_(math.nan)
        assert not engine.is_finite()
        engine.model.get_buffer(name).zero_()


@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [FUSED, ADAM, SGD], ids=["fused", "plain", "sgd"])
def test_steps_equal_a_plain_training_loop_that_skips_infinite_losses(optimizer, grad_clip):
    """A step with an infinite or NaN loss has no effect, whether the device or host skips it."""
    engine = engine_of(settings={**optimizer, "grad_clip": grad_clip})
    reference = engine_of(settings=optimizer or ADAM)
    averages = [weight.detach().clone() for weight in reference.model.parameters()]
    for factor in (1.0, math.nan, 2.0, math.inf, 3.0):
        skipped = take_step(engine, factor)
        assert skipped == (not math.isfinite(factor))
        if skipped:
            continue
        torch.manual_seed(0)
        model = reference.model
        y = drop_conditions(model.conditions, BATCH, model.config.dropout)
        terms = ToOnes(factor).losses(model, BATCH["latents"], y)
        (terms["loss"] + terms["aux_loss"]).backward()
        if grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(reference.model.parameters(), grad_clip)
            assert norm > grad_clip
        reference.optimizer.step()
        reference.optimizer.zero_grad()
        for average, weight in zip(averages, reference.model.parameters(), strict=True):
            average += (1 - 0.9) * (weight.detach() - average)
    expected = reference.model.state_dict()
    for name, weight in engine.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
    for got, average in zip(engine.emas[0].averages, averages, strict=True):
        torch.testing.assert_close(got, average, rtol=1e-5, atol=1e-7)
    counts = {int(entry["step"]) for entry in engine.optimizer.state.values() if "step" in entry}
    assert counts == ({3} if optimizer != SGD else set())


def test_gradient_accumulation_does_not_scale_the_balance_loss():
    """Uses only the balance loss. Four micro-batches give the same gradient as one."""

    def gate_gradient(num_micro: int) -> torch.Tensor:
        engine = engine_of(aux_loss_alpha=1.0, class_dropout_prob=0.0)
        grads = []
        engine.model.blocks[0].moe.gate.weight.register_post_accumulate_grad_hook(
            lambda weight: grads.append(weight.grad.clone())
        )
        take_step(engine, *[0.0] * num_micro)
        assert len(grads) == num_micro
        return grads[-1]

    assert gate_gradient(1).abs().sum() > 0
    assert relative_error(gate_gradient(4), gate_gradient(1)) < 1e-6


@pytest.mark.parametrize("optimizer", [FUSED, SGD, WITH_MUON])
def test_an_fp16_overflow_changes_only_the_loss_scale(optimizer):
    engine = engine_of("fp16", optimizer)
    before, scale = snapshot(engine), engine.scaler.get_scale()
    for times in (1, 2):
        assert take_step(engine, 1e-3, 1e36)  # the loss is finite, the second gradient overflows
        assert engine.scaler.get_scale() == scale / 2**times
        assert all(map(torch.equal, snapshot(engine)[:2], before))
    assert not take_step(engine, 1e-3, 1e-3)
    assert engine.scaler.get_scale() == scale / 4
    assert not any(map(torch.equal, snapshot(engine)[:2], before))


def test_a_run_with_an_optimizer_without_state_is_resumed(tmp_path):
    engine = engine_of(settings={"optimizer": "plain:momentum=0"})
    take_step(engine, 1.0)
    saver = Saver(tmp_path, engine)
    saver.start(1, Record(config=engine.model.config))
    saver.wait()
    before = snapshot(engine)
    resumed = DDPEngine(ALONE, engine.config, ())
    resumed.load_state(saver.folder)
    assert all(map(torch.equal, snapshot(resumed), before))
    other = engine_of(settings=SGD)
    with pytest.raises(UserError, match="different model .momentum_buffer: got none"):
        other.load_state(saver.folder)
    with pytest.raises(UserError, match="different model .blocks.2.* got none"):
        engine_of(settings={"optimizer": "plain"}, depth=3).load_state(saver.folder)
    with pytest.raises(UserError, match="different model .* expected none"):
        engine_of(settings={"optimizer": "plain"}, depth=1).load_state(saver.folder)


@pytest.mark.parametrize("optimizer", [FUSED, WITH_MUON])
def test_a_run_whose_router_has_an_unused_weight_is_resumed(optimizer, tmp_path, monkeypatch):
    """A weight that never had a gradient has no state of the optimizer."""

    class Unused(ROUTERS["topk"]):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.unused = torch.nn.Linear(2, 2)

    monkeypatch.setitem(ROUTERS, "unused", Unused)
    engine = engine_of(settings=optimizer, router="unused")
    take_step(engine, 1.0)
    saver = Saver(tmp_path, engine)
    saver.start(1, Record(config=engine.model.config))
    saver.wait()
    resumed = DDPEngine(ALONE, engine.config, ())
    resumed.load_state(saver.folder)
    for one in engine, resumed:
        take_step(one, 1.0)
    assert all(map(torch.equal, snapshot(resumed), snapshot(engine)))


def losses_of_steps(engine: DDPEngine, steps: int) -> list[float]:
    """Trains a flow on four latents, one per class; returns the losses."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 4, 8, 8).to(engine.dist.device), torch.arange(4).to(engine.dist.device)
    losses = []
    while len(losses) < steps:
        torch.manual_seed(len(losses))
        terms = RectifiedFlow().training_losses(engine.network, x, y)
        loss = terms["loss"].mean() + terms["aux_loss"]
        engine.backward(loss)
        engine.optimizer_step(1, 3.0)
        losses.append(loss.item())
    return losses


def test_fp16_training_has_the_losses_of_fp32():
    got, want = (losses_of_steps(engine_of(precision), 40) for precision in ("fp16", "fp32"))
    assert got == pytest.approx(want, rel=0.02)
    assert sum(got[-5:]) < 0.9 * sum(got[:5])


@needs_gpu
def test_compiled_blocks_train_with_the_same_losses():
    """Only on a GPU: a CPU compiles for half a minute, and test_models.py tests the graphs."""
    gpu = Distributed(0, 0, 1, torch.device("cuda"))
    engines = (engine_of(settings={"compile": flag}, dist=gpu) for flag in (True, False))
    got, want = (losses_of_steps(engine, 3) for engine in engines)
    assert got == pytest.approx(want, rel=1e-3)


def reads_of(profile: torch.profiler.profile) -> list[set[str]]:
    """Host reads that would wait for a GPU, each as the set of enclosing operators.

    Operators that read their arguments only on a CPU are left out; on CUDA they are kernels.
    """
    reads, only_on_cpu = [], {"aten::_grouped_mm", "aten::_fused_adamw_"}
    for event in profile.events():
        if event.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            callers = set()
            while event := event.cpu_parent:
                callers.add(event.name)
            reads.extend([callers] if not callers & only_on_cpu else [])
    return reads


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_step_reads_nothing_from_the_device(precision, flags, tmp_path, monkeypatch):
    """A step calls neither `.item()` nor `nonzero`."""
    unprofiled, names, reads = TrainingLoop.step, set(), []

    def step(loop, number, micro_batches):
        is_cuda = loop.dist.device.type == "cuda"
        if is_cuda and number:  # the first step copies tables to the GPU
            torch.cuda.set_sync_debug_mode("error")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            metrics = unprofiled(loop, number, micro_batches)
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        names.update(event.name for event in profile.events())
        reads.extend(reads_of(profile))
        return metrics

    monkeypatch.setattr(TrainingLoop, "step", step)
    changes = {"max-steps": 2, "rf": False, "grad-skip": 10}
    call_main("train.py", *flags(tmp_path, precision=precision, **changes))
    assert "aten::_fused_adamw_" in names
    assert not reads


PROFILED = 3  # the step whose collectives are counted


def in_two_processes(dist: Distributed, arguments: list[str], with_state: list[str]) -> dict:
    """Measurements for the tests below, which share one start of two processes."""
    return {
        "usual step": sent_by_the_last_step(dist, arguments),
        "with state": sent_by_the_last_step(dist, with_state),
        "broken": {
            broken_step(dist, optimizer) for optimizer in (FUSED, SGD, *[MUON] * HAS_EXTRAS)
        },
        "requests": requests_of_a_run(dist),
        "on main": dist.gather_on_main(dist.rank),
        "other data": error_for_other_data(dist),
    }


def error_for_other_data(dist: Distributed) -> str:
    """The error of data that are not the same on the two processes."""
    data = Source()
    data.classes, data.fingerprint = ["a"], {"count": 40, "names": f"digest {dist.rank}"}
    with pytest.raises(UserError) as error:
        inputs_of(None, data, dist)
    return str(error.value)


def broken_step(dist: Distributed, optimizer: dict) -> tuple[bool, bool, bool]:
    """Makes the loss of rank 1 NaN in one step.

    Returns whether the step was skipped, whether it left everything unchanged, and whether the
    next step changed the weights.
    """
    engine = engine_of(settings=optimizer, dist=dist)
    take_step(engine, 1.0)
    before = snapshot(engine)
    skipped = take_step(engine, math.nan if dist.rank == 1 else 1.0)
    is_same = all(map(torch.equal, before, snapshot(engine)))
    take_step(engine, 1.0)
    return skipped, is_same, not any(map(torch.equal, before[:2], snapshot(engine)[:2]))


def sent_by_the_last_step(dist: Distributed, arguments: list[str]) -> dict[str, int]:
    """Number of collectives in the last step of a run, numbers sent, and numbers in the model."""
    unprofiled, steps = TrainingLoop.step, []

    def step(loop: TrainingLoop, number: int, *arguments) -> dict:
        if number + 1 < PROFILED:
            return unprofiled(loop, number, *arguments)
        with torch.profiler.profile(record_shapes=True) as profile:
            metrics = unprofiled(loop, number, *arguments)
        sent = [event for event in profile.events() if event.name.startswith("gloo:")]
        model, observed = loop.engine.model, loop.engine.model.observed
        steps.append({
            "collectives": len(sent),
            "numbers": sum(math.prod(shape) for event in sent for shape in event.input_shapes),
            "weights": sum(weight.numel() for weight in model.parameters()),
            "observed": 0 if observed is None else observed.numel(),
        })  # fmt: skip
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "step", step)
        train_on(dist, arguments)
    return steps[0]


def requests_of_a_run(dist: Distributed) -> list[tuple[int, str]]:
    """Requests that a process sees: a save by the clock of rank 0, then a signal to rank 1."""
    requests, met = Requests(dist, save_seconds=1e-9), []
    requests.has_step, signals.POLL_SECONDS = True, 0.0  # each step polls
    for step in range(12):
        if step == 6 and dist.rank == 1:
            signal.raise_signal(signal.SIGUSR1)  # returns after the signal was handled
        if request := requests.poll():
            met.append((step, request))
            requests.save_seconds = 0.0
            if request == "stop":
                break
    requests.close()
    return met


def wait_in_cpp(ready) -> None:
    """Waits as a collective does whose peers hang: in C++, without the lock of Python."""
    signals.REPEATED = 0.5
    signals.Requests(ALONE, save_seconds=0).has_step = True
    ready.set()
    torch.distributed.HashStore().get("a key that nobody sets")


def test_pressing_ctrl_c_again_stops_a_process_that_waits_in_cpp():
    """Signals in quick succession count once, as launchers repeat signals."""
    context = torch.multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=wait_in_cpp, args=(ready,))
    process.start()
    assert ready.wait(60)
    start = time.monotonic()
    while process.is_alive() and time.monotonic() < start + 30:
        with suppress(ProcessLookupError):  # it may end meanwhile
            os.kill(process.pid, signal.SIGINT)
        process.join(0.05)
    ended = time.monotonic()
    process.kill()
    process.join()
    assert process.exitcode == 128 + signal.SIGINT and ended - start > 0.5


@pytest.fixture(scope="module")
def two_processes(flags, image_tree, tmp_path_factory) -> list[dict]:
    root, changes = tmp_path_factory.mktemp("two"), {"num_experts": 2, "max-steps": PROFILED}
    usual = flags(root / "usual", accum_iter=2, **changes)
    three_images = shutil.copytree(image_tree / "class-0", root / "images")
    for path in sorted(three_images.iterdir())[3:]:
        path.unlink()
    (three_images / "00.png").write_bytes(b"")
    changes["data-path"] = three_images  # both processes see each of them
    with_state = flags(root / "state", router="sigmoid", **changes)
    found = in_processes(in_two_processes, usual, with_state)
    return [one | {"rows": rows(root / "state")} for one in found]


def test_an_image_that_several_processes_cannot_read_counts_once(two_processes):
    assert [row.get("skipped_images") for row in two_processes[0]["rows"]][-1] == 1


def test_a_step_with_nan_on_one_process_changes_nothing_on_any_process(two_processes):
    assert [got["broken"] for got in two_processes] == [{(True, True, True)}] * 2


def test_values_of_all_processes_are_gathered_on_the_first(two_processes):
    assert [got["on main"] for got in two_processes] == [[0, 1], None]


def test_data_that_are_not_the_same_on_all_processes_are_refused_by_all(two_processes):
    for got in two_processes:
        assert "--data-path: got other images or latents on rank 1 than" in got["other data"]


def test_gradients_are_reduced_once_per_step_and_router_statistics_too(two_processes):
    """A step of two micro-batches sends nothing else."""
    for got in two_processes:
        usual, more = got["usual step"], got["with state"]
        assert usual["numbers"] == usual["weights"]
        assert more["collectives"] == usual["collectives"] + 1
        assert more["numbers"] == more["weights"] + more["observed"] > more["weights"]


def test_all_processes_act_on_a_request_before_the_same_step(two_processes):
    """They act on a request before the step that follows its arrival."""
    for got in two_processes:
        assert got["requests"] == [(1, "save"), (7, "stop")]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """Results folder of a run of four steps with a checkpoint at step 2."""
    results = tmp_path_factory.mktemp("finished")
    call_main("train.py", *flags(results, **{"ckpt-every": 2, "num-sample": 4, "profile": 1}))
    return results


def test_a_run_writes_logs_samples_and_checkpoints(finished):
    run = only_run(finished)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["0000002", "0000004"]
    assert Image.open(run / "samples-0000004.png").size[0] > 32
    assert any((run / "tensorboard").iterdir())
    assert [row["step"] for row in rows(finished)] == [1, 2, 4]
    shown = {word for line in (run / "log.txt").read_text().splitlines() if "  loss " in line
             for word in line.split()}  # fmt: skip
    assert {"loss", "lr", "left,"} <= shown  # the row has the rest
    assert {"expert_load", "memory_gb"} <= rows(finished)[0].keys() - shown
    row = rows(finished)[-1]
    for name in ("loss", "aux_loss", "grad_norm", "lr", "images_per_sec", "memory_gb"):
        assert row[name] > 0, name
    macs = count_macs(load_model(run).config)
    assert row["tflops_per_gpu"] * 1e12 == pytest.approx(6 * macs * row["images_per_sec"], rel=1e-4)
    assert 0 < row["data_wait"] < 1 and "mfu" not in row  # the peak of a CPU is unknown
    assert len(row["expert_load"]) == 2 and row["experts_in_all"] == 8
    assert row["epoch"] == 4 * 8 / 40 and abs(row["time"] - time.time()) < 600
    assert all(1 <= load <= 4 for load in row["expert_load"])
    text = (run / "log.txt").read_text()
    (first,) = [line for line in text.splitlines() if "step 0000001" in line]
    assert "loss" in first and "ends" in first  # printed for the first step, also when piped
    assert "samples-0000004.png" in text
    assert f"python sample.py --ckpt {run}" in text.splitlines()[-1]


def test_profile_writes_a_trace_of_the_steps_after_the_first_three(finished):
    with gzip.open(only_run(finished) / "profile" / "steps-0000004.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("ProfilerStep#3") == 1 and "ProfilerStep#2" not in names
    assert "aten::addmm" in names


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA GeForce GTX 1080", None),
])  # fmt: skip
def test_the_peak_flops_of_a_gpu_are_found_by_its_name(name, peak):
    assert peak_of(name) == peak


def test_tensorboard_contains_grouped_metrics_and_the_settings(finished):
    board = EventAccumulator(str(only_run(finished) / "tensorboard")).Reload()
    tags = {"loss/loss", "router/expert_load", "router/expert_load/01", "time/epoch"}
    assert tags | {"optimizer/lr", "optimizer/grad_norm"} <= set(board.Tags()["scalars"])
    assert "_hparams_/experiment" in board.summary_metadata


def test_weights_and_biases_receives_the_metrics_of_tensorboard(flags, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("CONSOLE", "off"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    call_main("train.py", *flags(tmp_path, wandb="demo", **{"num-sample": 4}))
    wandb.teardown()  # waits for the process that writes the file
    (stored,) = only_run(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    words = b"loss/loss", b"router/expert_load/01", b"global_step", b"global_seed"
    assert all(word in content for word in words)
    assert list(stored.parent.glob("files/media/images/samples_*.png"))


def test_an_image_that_cannot_be_written_for_wandb_is_a_warning(tmp_path, monkeypatch, capsys):
    wandb, logged = pytest.importorskip("wandb"), []

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb, "Image", fail)
    log = SimpleNamespace(
        board=SummaryWriter(tmp_path), text=logged.append, wandb=SimpleNamespace(log=logged.append)
    )
    log.show = partial(RunLog.show, log)
    RunLog.samples(log, 1, torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "grid.png")
    assert len(logged) == 1 and "Weights & Biases cannot be written" in capsys.readouterr().err


def test_wandb_without_the_package_is_a_one_line_error(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = expect_error(capsys, "train.py", *flags(tmp_path, wandb="demo"))
    assert "--wandb" in line and "pip install wandb" in line


def test_a_checkpoint_stores_its_config_objective_and_data(finished, image_tree, tiny_vae):
    record = read_record(step_folder(finished, 4))
    assert record.config == load_model(only_run(finished)).config
    assert (record.step, record.model, record.objective.name) == (4, "DiT-Ti/2", "rectified_flow")
    assert record.image_size == 16 and Path(record.vae_path) == tiny_vae
    assert record.class_names == tuple(f"class-{label}" for label in range(4))
    assert record.images["count"] == 40
    assert record.initialized_from is None


def test_a_branch_keeps_the_optimizer_moments_and_uses_the_new_flags(finished, flags, tmp_path):
    changes = {
        "optimizer": "adamw:weight_decay=0.5", "lr": 0, "max-steps": 3, "precision": "bf16",
    }  # fmt: skip
    origin = step_folder(finished, 2)
    call_main("train.py", *flags(tmp_path, resume=origin, **changes))
    config = TrainConfig.of_record(read_record(step_folder(tmp_path, 3)))
    assert config.optimizer.weight_decay == 0.5 and config.step.lr == 0
    changed = "--lr: was 0.001, is 0.0"
    assert changed in rows(tmp_path)[0]["changed"]
    assert changed in (only_run(tmp_path) / "log.txt").read_text()
    got, want = state_of(step_folder(tmp_path, 3)), state_of(origin)
    moments = [name for name in want if name.endswith("/exp_avg_sq")]
    assert all((got[name] >= 0.998 * want[name]).all() for name in moments)  # decay by 0.999
    assert any(want[name].any() for name in moments)


def break_losses(steps: dict[int, float], monkeypatch) -> None:
    """Adds numbers to the losses of the given steps, counted from 1."""
    unbroken, losses, now = TrainingLoop.step, RectifiedFlow.losses, [0]

    def step(loop, number, micro_batches):
        now[0] = number + 1
        return unbroken(loop, number, micro_batches)

    def broken_losses(*args, **kwargs):
        terms = losses(*args, **kwargs)
        return {**terms, "loss": terms["loss"] + steps.get(now[0], 0.0)}

    monkeypatch.setattr(TrainingLoop, "step", step)
    monkeypatch.setattr(RectifiedFlow, "losses", broken_losses)


def test_eleven_nan_steps_stop_a_run_with_its_last_good_weights(
    flags, tmp_path, monkeypatch, capsys
):
    break_losses(dict.fromkeys((2, *range(4, 99)), math.nan), monkeypatch)
    arguments = flags(tmp_path, **{"num_experts": 2, "log-every": 7, "max-steps": 99})
    line = expect_error(capsys, "train.py", *arguments)
    assert "steps 4 to 14" in line and "got 11" in line and "expected" in line
    (saved,) = (only_run(tmp_path) / "checkpoints").iterdir()
    assert saved.name == "0000003"
    assert {int(v) for k, v in state_of(saved).items() if k.endswith("/step")} == {2}


def test_infinite_or_nan_weights_are_never_saved(flags, tmp_path, capsys):
    changes = {"num_experts": 2, "ckpt-every": 1, "log-every": 7, "max-steps": 30}
    line = expect_error(capsys, "train.py", *flags(tmp_path, lr=1e300, **changes))
    assert "infinite or nan" in line
    for path in only_run(tmp_path).glob("checkpoints/*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path


def test_the_learning_rate_follows_its_schedule(flags, tmp_path):
    changes = {
        "lr-schedule": "cosine", "warmup-steps": 2, "max-steps": 6,
        "ckpt-every": 1, "log-every": 1,
    }  # fmt: skip
    call_main("train.py", *flags(tmp_path, **changes))
    want = [1 / 2, 1, 0.853553, 1 / 2, 0.146447, 0]
    got = [row["lr"] for row in rows(tmp_path)]
    assert got == pytest.approx([1e-3 * share for share in want], abs=1e-9)
    states = [state_of(step_folder(tmp_path, step)) for step in (4, 5, 6)]
    bias = [state["/model/final_layer.linear.bias"] for state in states]
    assert torch.equal(bias[2], bias[1]) and not torch.equal(bias[1], bias[0])


def test_a_run_on_images_shows_some_as_it_reads_them(
    flags, image_tree, latent_cache, tmp_path, capsys
):
    one_step = {"max-steps": 1, "vae-path": "pixels"}
    call_main("train.py", *flags(tmp_path / "pixels", **one_step))
    assert capsys.readouterr().out.startswith(f"reading the names of the images in {image_tree}\n")
    sheet = Image.open(only_run(tmp_path / "pixels") / "images.png")
    assert min(sheet.size) > 4 * 112  # four rows and columns of enlarged images
    of_cache = {"data-path": None, "latents-path": latent_cache, "image-size": None}
    call_main("train.py", *flags(tmp_path / "cached", **of_cache, **{"max-steps": 1}))
    assert not (only_run(tmp_path / "cached") / "images.png").exists()


def test_a_first_step_of_more_than_a_minute_says_what_takes_long(flags, tmp_path, monkeypatch):
    said, explain, take_step = threading.Event(), TrainingLoop.explain_slow_step, loop.take_step

    def explain_and_tell(run: TrainingLoop) -> None:
        explain(run)
        said.set()

    def slow_step(*arguments, step: int, **options) -> dict:
        assert step > 1 or said.wait(60)
        return take_step(*arguments, step=step, **options)

    changes = {"vae-path": "pixels", "global-batch-size": 6, "patch-size": 4, "max-steps": 3}
    call_main("train.py", *flags(tmp_path / "fast", **changes))
    monkeypatch.setattr(loop, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(loop, "take_step", slow_step)
    monkeypatch.setattr(TrainingLoop, "explain_slow_step", explain_and_tell)
    call_main("train.py", *flags(tmp_path / "slow", **changes))
    fast, slow = ((only_run(tmp_path / n) / "log.txt").read_text() for n in ("fast", "slow"))
    assert re.search(r"M active\), 16 tokens an image, .*\n.* memory: \S+ [GM]iB needed", fast)
    (line,) = re.findall(r"the first step has taken .*", slow)
    assert "6 images of 16 tokens, " in line and "recipes/pixels.yaml" in line
    assert line.endswith("a smaller --global-batch-size") and "has taken" not in fast
    # The first step has work that others do not have.
    first, *others = (part for part in slow.splitlines() if " left, " in part)
    assert "at most " in first and others and not any("at most" in other for other in others)


def test_epochs_are_converted_to_steps(flags, tmp_path):
    call_main("train.py", *flags(tmp_path, epochs=2, **{"max-steps": None}))
    assert rows(tmp_path)[-1]["step"] == 2 * 40 // 8


def test_a_resumed_run_keeps_using_tf32(flags, tmp_path):
    try:
        call_main("train.py", *flags(tmp_path, tf32=True, **{"max-steps": 1}))
        torch.set_float32_matmul_precision("highest")
        call_main("train.py", "--resume", only_run(tmp_path), "--max-steps", 2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# A processor with AVX-512 but without bf16; PyTorch's own check says that it has bf16.
CASCADE_LAKE = "flags\t: fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni\n\nprocessor : 1"


@pytest.mark.parametrize(
    "changes, slow",
    [
        ({"precision": "fp32"}, ""),
        ({"precision": "bf16"}, "--precision bf16"),
        pytest.param(
            {"precision": "fp32", "optimizer": "muon"},
            "--optimizer muon:precision bf16",
            marks=needs_extras,
        ),
    ],
)
def test_bf16_on_a_cpu_without_bf16_instructions_is_noted(
    flags, tmp_path, monkeypatch, changes, slow
):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(CASCADE_LAKE)
    call_main("train.py", *flags(tmp_path, **changes, **{"max-steps": 1, "run-name": "run"}))
    notes = re.findall(
        "no instructions for (.*); with fp32", (tmp_path / "run/log.txt").read_text()
    )
    assert notes == [slow] * bool(slow)


@pytest.mark.parametrize(
    "cpuinfo, lacks",
    [
        (CASCADE_LAKE, {torch.bfloat16, torch.float16}),
        ("flags\t: avx512f avx512_bf16 amx_tile amx_bf16\n\n", {torch.float16}),
        ("Features\t: asimd asimdhp bf16\n\n", set()),
        (None, set()),
    ],
)
def test_instructions_for_half_precision_are_those_that_linux_lists(
    tmp_path, monkeypatch, cpuinfo, lacks
):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    cpu, dtypes = torch.device("cpu"), (torch.float32, torch.bfloat16, torch.float16)
    assert {dtype for dtype in dtypes if devices.lacks_instructions(cpu, dtype)} == lacks
