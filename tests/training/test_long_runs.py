"""Runs of weeks: skipped spikes, and warnings about load, experts without tokens and data."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import call_main, rows

from checkpoints import Record, config_of
from runtime.errors import UserError
from runtime.processes import ALONE
from training import spikes
from training.alarms import LINES, Alarms
from training.config import TrainConfig
from training.engine import new_weights
from training.engines.ddp import DDPEngine
from training.engines.fsdp import FSDPEngine
from training.saving import Saver
from training.spikes import SpikeDetector
from training.step_metrics import ProcessReport


def test_only_a_norm_far_above_the_mean_of_the_earlier_ones_is_a_spike(monkeypatch):
    """Spikes and norms that are not finite do not enter the mean."""
    monkeypatch.setattr(spikes, "STEPS", 4)
    norms = torch.tensor([100, 1, 1, math.nan, 2, 77, 117, 39, math.inf, 20])
    detector = SpikeDetector(3.0, torch.device("cpu"))
    got = [bool(detector(norm)) for norm in norms]
    assert got == [False] * 6 + [True, False, True, False]  # the means are 26, 38.75, 38.81
    assert not any(map(SpikeDetector(0.0, torch.device("cpu")), norms))


def optimizer_steps(engine, scales: list[float]) -> list[bool]:
    """Takes steps with gradients of the given size; returns whether each step was skipped."""
    skipped = []
    for step, scale in enumerate(scales, start=1):
        for weight in engine.parameters.values():
            weight.grad = torch.full_like(weight, scale)
        skipped.append(bool(engine.optimizer_step(step, 1.0)["skipped"]))
    return skipped


@pytest.mark.parametrize("kind", [DDPEngine, FSDPEngine])
def test_a_spike_changes_nothing_and_its_mean_is_resumed(kind, tmp_path, monkeypatch):
    """A resumed engine draws no initial weights: the state replaces all of them."""
    monkeypatch.setattr(spikes, "STEPS", 2)
    values = {"grad_skip": 3.0, "shard": kind is FSDPEngine}
    config = replace(TrainConfig.default(), model=config_of("DiT-Ti/2", depth=1)).changed(values)
    engine = kind(ALONE, config, new_weights(config))
    assert optimizer_steps(engine, [1.0, 1.0]) == [False, False]
    before = [tensor.clone() for tensor in (*engine.averaged.values(), *engine.emas[0].averages)]
    assert optimizer_steps(engine, [4.0]) == [True]
    after = (*engine.averaged.values(), *engine.emas[0].averages)
    assert all(map(torch.equal, before, after))
    saver = Saver(tmp_path, engine)
    saver.start(3, Record(config=config.model))
    saver.wait()
    resumed = kind(ALONE, config, ())
    for tensor in (*resumed.local_tensors().values(), *resumed.emas[0].averages):
        tensor.fill_(math.nan)  # memory without a value may hold any
    assert not resumed.is_finite()
    resumed.load_state(saver.folder)
    assert resumed.is_finite()
    assert resumed.find_spikes.state_dict() == engine.find_spikes.state_dict()
    assert all(map(torch.equal, (*resumed.averaged.values(), *resumed.emas[0].averages), after))
    assert optimizer_steps(resumed, [4.0, 1.0]) == [True, False]


def test_ten_spikes_in_a_row_stop_a_run(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "STEPS", 1)
    flags = train_flags(tmp_path, **{"grad-skip": 0.001, "log-every": 1, "global-batch-size": 8})
    with pytest.raises(UserError, match=r"nan or more than 0.001 times its mean .* 2 to 11"):
        call_main("train.py", *flags, "--max-steps=20")
    assert rows(tmp_path)[-1]["skipped_steps"] == 10


REPORTS = [ProcessReport("node", {}, set(), 1, waited=0.0, bad=0, busy=1.0)]


def test_a_cause_that_lasts_gives_one_warning():
    """The first case ends before it has lasted; the last one lasts and gives one line only."""
    alarms, good = Alarms((1, 3)), {"expert_load": [1.2, 2.9], "dead_experts": 0, "data_wait": 0.1}
    bad = {"expert_load": [1.2, 3.5], "dead_experts": 2, "experts_in_all": 16, "data_wait": 0.4}
    all_values = [bad] * (LINES - 1) + [good] + [bad] * 3 * LINES
    lines = [alarms.check(values, REPORTS) for values in all_values]
    (warned,) = (number for number, found in enumerate(lines) if found)
    assert warned == 2 * LINES - 1
    load, dead, wait = lines[warned]
    assert "3 times the mean load (now 3.5 times in block 3)" in load
    assert "no tokens (now 2 of 16)" in dead and "waited for data more than 20%" in wait
    assert Alarms(()).check({"data_wait": 0.9}, REPORTS) == []
