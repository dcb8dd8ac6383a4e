"""Interrupted runs, with real processes: signals, kills, and one dead process of several.

Running the same command again gives the weights, optimizer state and EMA of an uninterrupted run,
bit for bit.

    pytest tests/training/test_interruptions.py -k killed --kills 50    kills a run 50 times
"""

import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import (
    assert_same_state,
    call_main,
    children,
    in_process,
    in_processes,
    kill_all,
    main_of_torchrun,
    rows,
    running_alone,
    running_forked,
    step_folder,
    train_on,
    wait_for,
)

import train
from checkpoints import step_folders
from runtime import signals
from runtime.errors import STOPPED
from runtime.processes import ALONE
from runtime.signals import Requests
from training import loop, preview, start
from training.config import parse_training
from training.manifest import fault_of

UNTIL_STOPPED = 100_000  # steps. A resumed run may have fewer


@pytest.fixture(scope="module")
def flags(train_flags):
    """Runs on pixels: a process that opens no autoencoder starts in half the time."""
    values = {
        "vae-path": "pixels", "image-size": 8,
        "global-batch-size": 8, "accum_iter": 2, "num_experts": 2, "run-name": "run",
        "log-every": 1, "ckpt-every": 3, "keep-last": 2, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **values)


def saved_step(output: str) -> int:
    """Step of the last checkpoint that a run wrote or resumed."""
    return int(re.findall(r"(?:saved|resumed from) .*/(\d{7})\n", output)[-1])


def assert_resumes_exactly(flags, results: Path, other: Path, step: int) -> None:
    """Asserts that a run resumed for two steps equals a run that was never interrupted."""
    for folder in (results, other):
        call_main("train.py", *flags(folder, **{"max-steps": step + 2}))
    assert_same_state(step_folder(results, step + 2), step_folder(other, step + 2))
    steps = [row["step"] for row in rows(results) if "loss" in row]
    assert steps == list(range(1, step + 3))  # every step once


def test_a_run_stopped_by_signals_resumes_bit_identically(flags, tmp_path):
    """Signals go to the process group, so also to the processes that read images: SIGTERM by
    `kill`, SIGHUP by a closed terminal."""
    arguments = flags(tmp_path / "r", **{"num-workers": 1, "max-steps": UNTIL_STOPPED})
    with running_alone("train.py", arguments) as process:
        wait_for(process, "step 0000004")
        os.killpg(process.pid, signal.SIGHUP)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait() == STOPPED, output
    step = saved_step(output)
    assert re.search("SIG(HUP|TERM): saving", output) and step >= 4
    assert_resumes_exactly(flags, tmp_path / "r", tmp_path / "whole", step)


def test_a_signal_before_the_end_of_the_first_step_ends_the_run_at_once(flags, tmp_path):
    slow = {"global-batch-size": 16_000, "accum_iter": 2_000, "max-steps": 1}
    with running_alone("train.py", flags(tmp_path, **slow)) as process:
        wait_for(process, "needed")  # the line on the memory, the last before the first step
        os.kill(process.pid, signal.SIGINT)
        assert "SIGINT: stopped before the end of the first step" in process.stdout.read()
        assert process.wait() == 128 + signal.SIGINT
    assert not step_folders(tmp_path / "run")


def stopped_run(place: str, arguments: list[str]) -> int:
    """Trains until a signal that arrives in the second step, between two micro-batches, or in the
    sample grid of the second step; returns the exit code."""
    take_step, unsignalled = loop.take_step, preview.generate

    def step(engine, objective, batches, count, *, step: int, rate: float) -> dict:
        def signalled():
            yield next(batches)
            signal.raise_signal(signal.SIGTERM)
            yield from batches

        given = signalled() if place == "step" and step == 2 else batches
        return take_step(engine, objective, given, count, step=step, rate=rate)

    def generate(*given, callback, **options):
        def signal_after_a_step(state: dict) -> None:
            assert state["step"] == 0
            signal.raise_signal(signal.SIGTERM)
            callback(state)

        return unsignalled(*given, callback=signal_after_a_step, **options)

    loop.take_step, preview.generate = step, generate
    return train.main(parse_training("train.py", None, arguments))


@pytest.mark.parametrize("place, steps", [("step", 1), ("grid", 2)])
def test_a_stop_within_a_step_or_a_sample_grid_loses_nothing(place, steps, flags, tmp_path):
    changes = {"sample-every": 2, "num-sample": 2, "max-steps": 5}
    code = in_process(stopped_run, place, flags(tmp_path / "r", **changes))
    assert code == STOPPED and not [*tmp_path.rglob("samples-*.png")]
    (last,) = step_folders(tmp_path / "r" / "run")
    assert int(last.name) == steps
    call_main("train.py", *flags(tmp_path / "r", **changes))
    call_main("train.py", *flags(tmp_path / "whole", **changes))
    assert_same_state(step_folder(tmp_path / "r", 5), step_folder(tmp_path / "whole", 5))


def stopped_grid(dist, arguments: list[str]) -> int:
    """Trains in a process of several; a signal to rank 1 only arrives in the first sample grid."""
    unsignalled = preview.generate
    signals_to_come = [signal.SIGTERM] if dist.rank == 1 else []

    def generate(*given, callback, **options):
        def signal_after_a_step(state: dict) -> None:
            assert state["step"] == 0
            if signals_to_come:
                signal.raise_signal(signals_to_come.pop())
            callback(state)

        return unsignalled(*given, callback=signal_after_a_step, **options)

    preview.generate, signals.POLL_SECONDS = generate, 0.0  # each step polls
    return start.train(*parse_training("train.py", None, arguments), dist)


def test_processes_that_share_a_model_leave_a_sample_grid_together(flags, tmp_path):
    changes = {"sample-every": 1, "num-sample": 2, "max-steps": 50, "accum_iter": 1}
    shard = flags(tmp_path, shard=True, **changes)
    assert in_processes(stopped_grid, shard) == [STOPPED] * 2
    assert not [*tmp_path.rglob("samples-*.png")]


@pytest.mark.parametrize("launcher, answer", [({}, None), ({"TORCHELASTIC_RUN_ID": "1"}, "stop")])
def test_nohup_protects_a_run_from_a_closed_terminal(launcher, answer, monkeypatch):
    """Unless torchrun launched it, which passes the signal on and then kills the process."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = Requests(ALONE, save_seconds=0)
    requests.has_step = True
    try:
        signal.raise_signal(signal.SIGHUP)
        assert requests.poll() == answer
    finally:
        requests.is_signalled = False
        requests.close()
        signal.signal(signal.SIGHUP, before)


def poll_at_two_speeds(dist) -> tuple[int, int, int]:
    """Number of polls in 160 fast steps and in 8 slow ones, and of slow steps from a signal, which
    only rank 1 receives, to the stop."""
    requests = Requests(dist, save_seconds=0)

    def polls(steps: int, seconds: float) -> int:
        started = [requests.reduction]  # keeps all of them, so that no two are the same object
        for _ in range(steps):
            time.sleep(seconds)
            assert requests.poll() is None
            started.append(requests.reduction)
        return len(set(map(id, started))) - 1

    try:
        fast = polls(160, 0.001)
        signals.POLL_SECONDS = 0.01
        polls(2 * signals.MOST_STEPS, 0.02)  # notices that steps have become slow
        slow = polls(8, 0.02)
        requests.is_signalled = dist.rank == 1
        return fast, slow, next(step for step in range(100) if requests.poll() == "stop")
    finally:
        requests.is_signalled = False
        requests.close()


def test_processes_poll_once_in_many_fast_steps_and_in_each_slow_step():
    """The ring of a poll takes 2 (N - 1) hops: 2,046 for 1,024 processes, so 128 a step."""
    results = in_processes(poll_at_two_speeds)
    assert results[0] == results[1]
    fast, slow, steps_to_stop = results[0]
    assert 160 // signals.MOST_STEPS <= fast <= 40  # more than 10 if this machine is busy
    assert slow == 8 and steps_to_stop <= 2


def test_two_processes_recover_from_a_killed_process_and_stop_together(flags, tmp_path):
    """One process is killed, and torchrun starts both again. Then a signal to one stops both.

    Each process holds a part of the weights and of the optimizer state.
    """
    results, shared = tmp_path / "r", partial(flags, shard=True)
    arguments = shared(results, **{"max-steps": UNTIL_STOPPED})
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new store for each start
    torchrun = main_of_torchrun, "train.py", arguments, 2, "--max-restarts=1"
    with running_forked(*torchrun, **store) as process:
        wait_for(process, "saved ")
        os.kill(children(process.pid)[1], signal.SIGKILL)  # rank 1
        resumed = wait_for(process, "resumed from ")
        output = wait_for(process, "step 00")
        os.kill(children(process.pid)[1], signal.SIGUSR1)
        output += process.stdout.read()
        assert process.wait() == 1, output  # torchrun returns 1 for every failure
    step = saved_step(output)
    assert step > saved_step(resumed), output

    last = {"max-steps": step + 2}
    in_processes(train_on, shared(results, **last), shared(tmp_path / "whole", **last))
    assert_same_state(step_folder(results, step + 2), step_folder(tmp_path / "whole", step + 2))
    assert [row["step"] for row in rows(results) if "loss" in row] == list(range(1, step + 3))


def test_a_run_killed_at_random_moments_resumes_to_the_same_weights(flags, tmp_path, request):
    """Every second kill waits for a save to begin, so that many kills interrupt a save."""
    kills, moments = request.config.getoption("--kills"), random.Random(0)
    results, newest = tmp_path / "r", 0
    arguments = flags(results, **{"max-steps": UNTIL_STOPPED})
    for number in range(kills):
        with running_alone("train.py", arguments) as process:
            wait_for(process, "steps ")
            if number % 2 == 0:
                wait_for_a_save(results / "run")
                time.sleep(moments.random() * 0.05)
            else:
                time.sleep(moments.random())
            assert process.poll() is None
            kill_all(process)
        steps = [int(folder.name) for folder in step_folders(results / "run")]
        assert max(steps, default=0) >= newest, "a checkpoint was lost"
        newest = max(steps, default=0)
        assert all(fault_of(folder) is None for folder in step_folders(results / "run"))
    assert_resumes_exactly(flags, results, tmp_path / "whole", newest)


def wait_for_a_save(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(run.glob("checkpoints/writing-*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
