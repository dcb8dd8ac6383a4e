"""What happens to a running job: signals, kills, a dead process. Real processes and signals.

Whatever happens, the same command run again ends with the weights, optimizer state and EMA of a run
that nothing happened to, bit for bit.

    pytest tests/test_interruptions.py -k killed --kills 50    as many kills as you have time for
"""

import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    assert_same_state,
    call_main,
    children,
    in_processes,
    kill_all,
    rows,
    running,
    step_folder,
    train_on,
    wait_for,
)

from checkpoints import step_folders
from runtime.errors import STOPPED
from runtime.processes import ALONE
from training.manifest import find_fault

UNTIL_STOPPED = 100_000  # steps; a run's end may change


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {
        "global-batch-size": 8, "accum_iter": 2, "num_experts": 2, "run-name": "run",
        "log-every": 1, "ckpt-every": 3, "keep-last": 2, "rf": True, "precision": "bf16",
    }  # fmt: skip
    return partial(train_flags, **own)


def saved_step(said: str) -> int:
    return int(re.findall(r"saved .*/(\d{7})\n", said)[-1])


def goes_on_as_if_nothing_had_happened(flags, results: Path, other: Path, step: int) -> None:
    """Resumes a run for two steps and compares it with one from the start."""
    for folder in (results, other):
        call_main("train.py", *flags(folder, **{"max-steps": step + 2}))
    assert_same_state(step_folder(results, step + 2), step_folder(other, step + 2))
    steps = [row["step"] for row in rows(results)]
    assert steps == list(range(1, step + 3))  # each once


def test_a_stopped_run_goes_on_exactly(flags, tmp_path):
    """SIGTERM reaches every process, those that read images among them, as Slurm's does."""
    arguments = flags(tmp_path / "r", **{"num-workers": 1, "max-steps": UNTIL_STOPPED})
    with running("train.py", arguments) as process:
        wait_for(process, "step 0000004")
        os.killpg(process.pid, signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait() == STOPPED, said
    step = saved_step(said)
    assert "SIGTERM" in said and step >= 4
    goes_on_as_if_nothing_had_happened(flags, tmp_path / "r", tmp_path / "whole", step)


def test_ctrl_c_twice_stops_at_once(flags, image_tree, tmp_path):
    """In a step that takes minutes. Signals that come together are one: launchers repeat them."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    (data / "class-0" / "00.png").write_bytes(b"")
    changes = {"data-path": data, "global-batch-size": 80_000, "accum_iter": 40_000}
    with running("train.py", flags(tmp_path / "results", **changes)) as process:
        wait_for(process, "00.png")  # named while the step's images are read
        start = time.monotonic()
        while process.poll() is None:
            assert time.monotonic() - start < 60
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)  # a finger's pace; nothing is waited for
        assert process.wait() == 128 + signal.SIGINT
        assert time.monotonic() - start > 1.5
        assert "SIGINT" in process.stdout.read()
    assert not step_folders(tmp_path / "results" / "run")


def workers(launcher: int) -> list[int]:
    """The training processes under a torchrun, by rank."""

    def rank(pid: int) -> str:
        lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)["RANK"]

    return sorted(children(launcher), key=rank)


def test_two_processes_stop_together_and_outlive_a_dead_one(flags, tmp_path):
    """A signal to one of them stops both; later one is killed, and torchrun starts both again.

    Each holds a part of the weights and of Muon's momentum.
    """
    results = tmp_path / "r"
    shared = partial(flags, optimizer="muon", shard=True)
    arguments = shared(results, **{"max-steps": UNTIL_STOPPED})
    with running("train.py", arguments, processes=2) as process:
        wait_for(process, "step 0000002")
        os.kill(workers(process.pid)[1], signal.SIGUSR1)
        said = process.stdout.read()
        assert process.wait() == 1, said  # torchrun has one code for all that is not success
    step = saved_step(said)
    assert step >= 2, said

    last = step + 16  # so that the process is killed long before
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new one for each start
    arguments = shared(results, **{"max-steps": last})
    with running("train.py", arguments, 2, ("--max-restarts=1",), **store) as process:
        said = wait_for(process, f"step {step + 4:07d}")
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        said += process.stdout.read()
        assert process.wait() == 0, said
    assert f"resumed from {step_folder(results, step)}" in said
    assert said.count("resumed from") == 2

    whole = shared(tmp_path / "whole", **{"max-steps": last})
    in_processes(train_on, whole)
    assert_same_state(step_folder(results, last), step_folder(tmp_path / "whole", last))
    assert [row["step"] for row in rows(results)] == list(range(1, last + 1))


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(flags, tmp_path, request):
    """Every second kill waits for a save to begin, so that many fall into one."""
    kills, moments = request.config.getoption("--kills"), random.Random(0)
    results, newest = tmp_path / "r", 0
    arguments = flags(results, **{"max-steps": UNTIL_STOPPED})
    for number in range(kills):
        with running("train.py", arguments) as process:
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
        assert all(find_fault(folder, ALONE) is None for folder in step_folders(results / "run"))
    goes_on_as_if_nothing_had_happened(flags, results, tmp_path / "whole", newest)


def wait_for_a_save(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(run.glob("checkpoints/writing-*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
