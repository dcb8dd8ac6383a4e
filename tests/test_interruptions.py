"""What happens to a running job: signals, kills, hangs, broken numbers. Real processes and signals.

Whatever happens, the same command run again ends with the weights, optimizer state, EMA and log of
a run that nothing happened to, bit for bit.

    pytest tests/test_interruptions.py -k killed --kills 50    as many kills as you have time for
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import engine_of

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {
        "global-batch-size": 8, "accum_iter": 2, "run-name": "run", "log-every": 3,
        "max-steps": STEPS, "ckpt-every": EVERY, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **own)


PRECISIONS = {1: "bf16", 2: "fp32"}


@pytest.fixture(scope="module")
def untroubled(flags, tmp_path_factory):
    """Gives the run folder of an uninterrupted run on a number of processes."""
    results = tmp_path_factory.mktemp("untroubled")

    def run(processes: int) -> Path:
        folder = results / str(processes)
        if not folder.exists():
            arguments = flags(folder, precision=PRECISIONS[processes])
            run_script("train.py", *arguments, processes=processes if processes > 1 else 0)
        return folder / "run"

    return run


@contextmanager
def running(arguments: list, processes: int = 1, launcher: tuple = (), **environment):
    """A training run under way, in a session of its own; nothing of it is left at the end."""
    command = [sys.executable]
    if processes > 1:
        nproc = f"--nproc_per_node={processes}"
        command += ["-m", "torch.distributed.run", "--standalone", nproc, *launcher]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def workers(process: subprocess.Popen) -> list[int]:
    """The training processes under a torchrun, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children), key=lambda pid: environment_of(pid)["RANK"])


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def kill_all(process: subprocess.Popen) -> None:
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    process.stdout.close()


def wait_for(process: subprocess.Popen, text: str, seconds: float = 240) -> str:
    """Reads what a run says until `text` is in it, and returns all of that."""
    said, deadline = "", time.monotonic() + seconds
    while text not in said:
        line = process.stdout.readline()
        assert line and time.monotonic() < deadline, f"no {text!r} in:\n{said}"
        said += line
    return said


def log_rows(run: Path) -> list[dict]:
    """The lines of log.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    machine = ("images_per_sec", "memory_gb")
    return [{k: v for k, v in row.items() if k not in machine} for row in rows]


def board_rows(run: Path, name: str = "loss") -> list[tuple[int, float]]:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def flat(value: object, path: str = "") -> dict[str, object]:
    """The leaves of nested dicts and lists by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
    return {path: value}


def state_of(folder: Path) -> dict[str, object]:
    """All weights, EMA weights and optimizer state of a step folder of train.py."""
    state = torch.load(folder / "training_state.pt", weights_only=True)
    return flat({**state, "ema": load_file(folder / "model.safetensors")})


def assert_same_state(got: Path, want: Path) -> None:
    a, b = state_of(got), state_of(want)
    assert a.keys() == b.keys()
    for name, value in b.items():
        same = torch.equal(a[name], value) if torch.is_tensor(value) else a[name] == value
        assert same, name


def assert_same_run(run: Path, want: Path) -> None:
    last = f"checkpoints/{STEPS:07d}"
    assert_same_state(run / last, want / last)
    assert log_rows(run) == log_rows(want)
    assert board_rows(run) == board_rows(want)


@pytest.mark.parametrize("processes, name", [(1, "SIGTERM"), (2, "SIGUSR1")])
def test_a_signal_stops_all_after_one_step_and_the_run_goes_on_exactly(
    flags, untroubled, tmp_path, processes, name
):
    """SIGTERM reaches every process, as Slurm's does; SIGUSR1 one worker of a torchrun that would
    start it again. The run stops between two checkpoints and between two log lines."""
    changes = {"num-workers": 1} if processes == 1 else {}
    arguments = flags(tmp_path, precision=PRECISIONS[processes], **changes)
    with running(["train.py", *arguments], processes, ("--max-restarts=3",)) as process:
        wait_for(process, "step 0000006")
        time.sleep(0.1)  # into another step
        if processes == 1:
            os.killpg(process.pid, getattr(signal, name))
        else:
            os.kill(workers(process)[1], getattr(signal, name))
        said = wait_for(process, "the same command goes on from there")
        said += process.stdout.read()
        code = process.wait()
    (saved,) = [int(line.split("/")[-1]) for line in said.splitlines() if "saved" in line][-1:]
    assert f"after step {saved};" in said and 6 <= saved < STEPS
    assert code == (
        75 if processes == 1 else 1
    )  # torchrun has one code for all that is not success
    assert said.count("steps 0 to") == 0, "started again"
    again = run_script("train.py", *arguments, processes=processes if processes > 1 else 0)
    assert f"resumed from {tmp_path}/run/checkpoints/{saved:07d}" in again.stdout
    assert_same_run(tmp_path / "run", untroubled(processes))


def test_the_same_signal_again_stops_at_once(flags, tmp_path):
    trouble = json.dumps([[0, 3, 3, "stall"]])
    arguments = ["tests/troubled.py", "train.py", *flags(tmp_path, **{"log-every": 1})]
    with running(arguments, TROUBLE=trouble) as process:
        wait_for(process, "step 0000002")
        time.sleep(0.5)  # into the step that takes a minute
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)  # a launcher that makes sure
        time.sleep(5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert "stopped at once, nothing saved" in process.stdout.read()


def test_a_stop_that_cannot_be_saved_is_tried_again_if_the_run_has_come_further(
    flags, untroubled, tmp_path
):
    """Exit code 75 if there is a checkpoint of this start, 2 if starting again would gain nothing.

    A limit on the size of files makes the save fail, as a full disk would.
    """
    for every, code in ((EVERY, 75), (STEPS, 2)):
        arguments = flags(tmp_path, precision=PRECISIONS[1], **{"ckpt-every": every})
        with running(["train.py", *arguments]) as process:
            wait_for(process, "step 0000006" if code == 75 else "step 0000009")
            limits = (100_000, resource.RLIM_INFINITY)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
            process.send_signal(signal.SIGTERM)
            said = wait_for(process, "could not be saved")
            said += process.stdout.read()
            assert process.wait() == code, said
        assert "File too large" in said and "stopped by SIGTERM or SIGUSR1 after step" in said
        assert complete_steps(tmp_path / "run") == [EVERY]
        if code == 75:
            assert f"the same command goes on from step {EVERY}" in said
        else:
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert f"no step since {EVERY} is: put that right and run the same command" in line
    run_script("train.py", *flags(tmp_path, precision=PRECISIONS[1]))
    assert_same_run(tmp_path / "run", untroubled(1))


MISTAKES = {
    "all": "raise UserError('wrong')",
    "one": "if os.environ['RANK'] == '1': raise UserError('wrong')\n    while True: time.sleep(1)",
    "flags": "argparse.ArgumentParser().parse_args(['--no-such-flag'])",
}


@pytest.mark.parametrize("who", MISTAKES)
def test_torchrun_does_not_repeat_a_mistake(tmp_path, who):
    """Under --max-restarts=2, whoever met it."""
    script = tmp_path / "mistaken.py"
    script.write_text(
        "import argparse, os, time\n"
        "from runtime.processes import run_process\n"
        "from runtime.errors import UserError, exit_on_user_error\n"
        "@exit_on_user_error\n"
        "def main():\n"
        "    print('started', flush=True)\n"
        f"    {MISTAKES[who]}\n"
        "run_process(main)\n"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    with running([script], 2, ("--max-restarts=2",), **environment) as process:
        said = process.stdout.read()
        assert process.wait() == 1  # of a torchrun that was told to stop
    assert said.count("started") <= 2, said
    if who != "flags":
        rank = " (rank 1)" if who == "one" else ""
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert lines == [f"error: wrong{rank}"]


def test_torchrun_recovers_from_a_dead_rank_by_itself(flags, untroubled, tmp_path):
    arguments = flags(tmp_path, precision=PRECISIONS[2])
    with running(["train.py", *arguments], 2, ("--max-restarts=1",)) as process:
        wait_for(process, "step 0000012")
        os.kill(workers(process)[1], signal.SIGKILL)
        said = wait_for(process, f"checkpoints/{STEPS:07d}")
        process.stdout.read()
        assert process.wait() == 0
    assert "resumed from" in said
    assert_same_run(tmp_path / "run", untroubled(2))


def test_a_dead_rank_is_one_line_of_the_others(tmp_path):
    script = tmp_path / "bereaved.py"
    script.write_text(
        "import os, signal\n"
        "from runtime.processes import run_process, setup_distributed\n"
        "def main():\n"
        "    dist = setup_distributed()\n"
        "    dist.barrier()\n"
        "    if dist.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    while True: dist.barrier()\n"
        "run_process(main)\n"
    )
    result = run_script(script, processes=2, check=False, PYTHONPATH=str(ROOT))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: another process is gone: ") and "peer" in line
    assert "in run_process" not in result.stderr  # no traceback of ours
    assert "Signal 9 (SIGKILL)" in result.stderr


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    flags, untroubled, tmp_path, request, capsys
):
    """Every second kill waits for a save to begin, so that many fall into one.

    --deterministic, which changes no bit on a CPU, is shown with it.
    """
    kills = request.config.getoption("--kills")
    rng = random.Random(0)
    arguments = flags(tmp_path, precision=PRECISIONS[1], deterministic=True)
    run, newest = tmp_path / "run", 0
    killed = in_save = 0
    while killed < kills:
        with running(["train.py", *arguments]) as process:
            if killed % 2 == 0:
                wait_for(process, "steps ")
                wait_until(lambda: half_written(run) or process.poll() is not None)
                time.sleep(rng.random() * 0.05)
            elif killed % 4 == 1:
                wait_for(process, "steps ")
                time.sleep(rng.random())
            else:
                time.sleep(rng.random() * 6)  # while it starts, perhaps
            alive = process.poll() is None
            kill_all(process)
        killed += alive
        in_save += alive and half_written(run)
        steps = complete_steps(run)
        for step in steps:
            state_of(run / "checkpoints" / f"{step:07d}")
        assert max(steps, default=0) >= newest, "a checkpoint was lost"
        while steps and steps[-1] >= STEPS - EVERY:  # so that there is something left to kill
            shutil.rmtree(run / "checkpoints" / f"{steps.pop():07d}")
        newest = max(steps, default=0)
    run_script("train.py", *arguments)
    with capsys.disabled():
        print(f"\n{killed} kills of a running process, {in_save} of them inside a save")
    assert in_save >= (kills + 1) // 4
    assert_same_run(run, untroubled(1))


def half_written(run: Path) -> bool:
    return any(run.glob("checkpoints/writing-*"))


def complete_steps(run: Path) -> list[int]:
    return sorted(int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit())


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("trouble", ["SIGSTOP", "stall"])
def test_a_hung_rank_is_named_by_the_others(flags, tmp_path, trouble):
    """Stopped as a whole, or its main thread alone, in the reading of images."""
    order = [[1, 5, 5, "stall"]] if trouble == "stall" else []
    arguments = flags(tmp_path, timeout=0.1, **{"log-every": 1, "max-steps": 2000})
    arguments = ["tests/troubled.py", "train.py", *arguments]
    with running(arguments, 2, TROUBLE=json.dumps(order)) as process:
        wait_for(process, "step 0000004")
        stuck = workers(process)[1]
        if trouble == "SIGSTOP":
            os.kill(stuck, signal.SIGSTOP)
        start = time.monotonic()
        said = wait_for(process, "all processes stop")
        assert 3 < time.monotonic() - start < 60
        name = f"rank 1 ({os.uname().nodename}, process {stuck})"
        line = said.splitlines()[-1]
        if trouble == "SIGSTOP":
            assert line.startswith(f"error: {name} has given no sign of life for 6 s; it was")
        else:
            assert f"no step was finished for 6 s: {name}: reading images in step 5;" in line


def test_processes_whose_launcher_is_gone_end(flags, tmp_path):
    """They would train on unseen, and hold the run folder's lock against the next start."""
    arguments = flags(tmp_path, **{"log-every": 1, "max-steps": 2000})
    with running(["train.py", *arguments], 2) as process:
        wait_for(process, "step 0000002")
        orphans = workers(process)
        process.kill()
        wait_for(process, "lost the connection to the launcher")
        try:
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 20)
        finally:
            for pid in orphans:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (2, "fp32"), (3, "bf16")])
def test_a_broken_step_changes_nothing_on_any_rank(flags, tmp_path, stage, precision):
    """On rank 1 alone: an infinite loss with finite gradients, then gradients that are nan."""
    changes = {"ckpt-every": 1, "log-every": 1, "max-steps": 6, "precision": precision}
    script = "train_deepspeed.py" if stage else "train.py"
    if stage:
        config = tmp_path / "zero.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        changes |= {"deepspeed_config": config, "train_batch_size": 2}
    arguments = flags(tmp_path, **changes)
    if stage:
        arguments = [a for a in arguments if not a.startswith("--global-batch-size")]
    trouble = json.dumps([[1, 3, 3, "loss"], [1, 4, 4, "gradient"]])
    run_script("tests/troubled.py", script, *arguments, processes=2, TROUBLE=trouble)
    run = tmp_path / "run"
    rows = {row["step"]: row for row in log_rows(run)}
    assert [rows[step].get("skipped_steps", 0) for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    assert rows[3]["loss"] == rows[4]["grad_norm"] == "nan"  # of no step that counts
    assert all(isinstance(rows[step]["loss"], float) for step in (1, 2, 5, 6))

    def state(step: int) -> dict[str, object]:
        folder = run / "checkpoints" / f"{step:07d}"
        if not stage:
            return state_of(folder)
        return flat({**zero_state(folder), "ema": load_file(folder / "model.safetensors")})

    before, after, later = state(2), state(4), state(5)
    assert before.keys() == after.keys()
    tensors = [name for name, value in before.items() if torch.is_tensor(value)]
    assert tensors and all(torch.equal(before[name], after[name]) for name in tensors)
    assert not all(torch.equal(before[name], later[name]) for name in tensors)


def zero_state(folder: Path) -> dict:
    from training.zero import STORED_CLASSES

    with torch.serialization.safe_globals(STORED_CLASSES):
        return {
            path.name: torch.load(path, weights_only=True)["optimizer_state_dict"]
            for path in sorted(folder.glob("deepspeed/state/*optim_states.pt"))
        }


def test_steps_and_skipped_steps_are_those_of_plain_adamw_and_ema():
    """Fused, and skipped by the device, against PyTorch's reference loop that leaves steps out."""
    engine, reference = engine_of(), engine_of()
    plain = torch.optim.AdamW(
        reference.model.parameters(), lr=1e-3, weight_decay=0.0, fused=False, foreach=False
    )
    averages = [weight.detach().clone() for weight in reference.model.parameters()]
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4) * 999, torch.arange(4)

    def losses_of(factor: float):
        def losses(model: torch.nn.Module) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            prediction, aux_loss = model(x, t, y)
            return {"loss": factor * (prediction - 1).square().mean(), "aux_loss": aux_loss}

        return losses

    for factor in (1.0, math.nan, 2.0, math.inf, 3.0):
        metrics = engine.train_step([losses_of(factor)], lr=1e-3)
        assert bool(metrics["skipped"]) == (not math.isfinite(factor))
        if metrics["skipped"]:
            continue
        terms = losses_of(factor)(reference.model)
        (terms["loss"] + terms["aux_loss"]).backward()
        plain.step()
        plain.zero_grad()
        for average, weight in zip(averages, reference.model.parameters(), strict=True):
            average += (1 - engine.ema_decay) * (weight.detach() - average)
    for got, want in (
        (engine.model.parameters(), reference.model.parameters()),
        (engine.ema.values(), averages),
    ):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert {int(entry["step"]) for entry in engine.optimizer.state.values()} == {3}


def test_broken_steps_in_a_row_stop_the_run_with_the_weights_from_before(flags, tmp_path):
    changes = {"max-skipped-steps": 4, "log-every": 6, "ckpt-every": 2}
    arguments = flags(tmp_path, **changes)
    trouble = json.dumps([[0, 4, 4, "loss"], [0, 8, 99, "gradient"]])
    result = run_script("tests/troubled.py", "train.py", *arguments, check=False, TROUBLE=trouble)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "became infinite or nan in steps 8 to 12, which were skipped: got 5 such steps" in line
    assert "expected fewer than 4 (--max-skipped-steps)" in line
    checkpoints = tmp_path / "run" / "checkpoints"
    assert complete_steps(tmp_path / "run")[-1] == 10
    weights = [
        load_file(checkpoints / step / "model.safetensors") for step in ("0000008", "0000010")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(value.isfinite().all() for value in weights[1].values())
    again = run_script("train.py", *arguments)  # without the trouble
    assert "resumed from" in again.stdout
    assert log_rows(tmp_path / "run")[-1]["skipped_steps"] == 4  # 4, 8, 9 and 10


FAKE_SLURM = {
    # Passes SIGUSR1 on to its task, as srun does, and ends as it does.
    "srun": 'trap \'kill -USR1 "$task"\' USR1\nSLURM_NODEID=0 "$@" &\ntask=$!\n'
    'wait "$task" || status=$?\nwhile kill -0 "$task" 2>/dev/null; do wait "$task" || status=$?; '
    'done\nexit "${status:-0}"\n',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"\n[ "$1" != show ] || echo localhost\n',
}


def test_a_slurm_job_saves_and_requeues_itself_before_its_time_is_up(flags, tmp_path):
    """slurm.sh, launch.sh, torchrun and the training are real; srun and scontrol stand in."""
    for name, text in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(f'source {ROOT}/scripts/launch.sh\nlaunch train.py "$@"\n')
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts/slurm.sh"), str(recipe), *flags(tmp_path / "results")],
        env={
            **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7",
            "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(job, "step 0000006")
        job.send_signal(signal.SIGUSR1)  # --signal=B:USR1: to the batch shell alone
        said = wait_for(job, "the same command goes on from there")
        job.stdout.read()
        assert job.wait(60) == 75
    finally:
        kill_all(job)
    assert "saved" in said
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["scontrol show hostnames localhost", "scontrol requeue 7"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
