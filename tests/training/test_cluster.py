"""Cluster jobs: the Slurm job script, and faults that only one process meets."""

import json
import os
import resource
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, call_main

from checkpoints import config_of
from latents.loading import BatchStream
from models import DiT
from runtime import processes
from runtime.errors import UserError
from runtime.processes import ALONE, Distributed, ProcessError
from training.config import resolve
from training.engines import fsdp
from training.engines.flags import DDPFlags
from training.log import RunLog
from training.plan import load_that_fits


@pytest.mark.parametrize("status, saves, requeued, code", [
    (0, "this", False, 0),
    (1, None, False, 1),  # without progress the job would fail again
    (1, "another", False, 1),
    (1, "this", True, 75),
])  # fmt: skip
def test_a_failed_slurm_job_requeues_itself_if_its_run_saved_a_checkpoint(
    tmp_path, status, saves, requeued, code
):
    """Shell scripts replace Slurm's programs: srun fails while this or another run saves."""
    (tmp_path / "results" / "other" / "checkpoints").mkdir(parents=True)
    save = {
        "this": 'mkdir -p elsewhere/run/checkpoints/0000002; echo "$_" > "$DIT_MOE_SAVED"',
        "another": "mkdir results/other/checkpoints/0000002",
        None: "true",
    }[saves]
    for name, line in (
        ("srun", f"echo $@ > {tmp_path}/srun.txt; {save}; exit {status}"),
        ("scontrol", f"echo $@ >> {tmp_path}/scontrol.txt; echo node0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm-7.saved").write_text("left by a node that failed")
    slurm = {"JOB_NUM_NODES": "2", "JOB_NODELIST": "n[0-1]", "CPUS_ON_NODE": "4", "JOB_ID": "7"}
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), "recipe.sh"], cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
             **{f"SLURM_{name}": value for name, value in slurm.items()}},
    )  # fmt: skip
    assert ended.returncode == code and not (tmp_path / "slurm-7.saved").exists()
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text()) == requeued
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.txt").read_text()


def test_training_names_each_checkpoint_in_the_file_of_the_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_MOE_SAVED", str(tmp_path / "slurm-7.saved"))
    for rank in (1, 0):
        stream = BatchStream(range(8), 1, rank=rank)
        with RunLog(tmp_path, stream, {}, None, is_main=not rank) as log:
            log.saved(tmp_path / "checkpoints" / "0000002")
        assert (tmp_path / "slurm-7.saved").exists() == (not rank)
    assert (tmp_path / "slurm-7.saved").read_text() == f"{tmp_path}/checkpoints/0000002\n"


def test_a_process_that_sees_one_gpu_uses_it():
    assert [processes.choose_gpu(rank, 8).index for rank in (0, 7)] == [0, 7]
    assert processes.choose_gpu(3, 1).index == 0  # --gpus-per-task=1
    with pytest.raises(UserError, match=r"got local rank 4, expected a process a GPU \(2\)"):
        processes.choose_gpu(4, 2)


def test_the_limit_of_open_files_is_raised_or_named(monkeypatch, capsys):
    limit = resource.RLIMIT_NOFILE
    before = soft, hard = resource.getrlimit(limit)
    dist = Distributed(0, 0, world_size=hard // 2, device=torch.device("cpu"))
    try:
        resource.setrlimit(limit, (256, hard))
        processes.raise_descriptor_limit(dist)
        assert resource.getrlimit(limit) == (hard, hard)
        assert f"WARNING: ulimit -n: got {hard}, expected at least" in capsys.readouterr().out
        processes.raise_descriptor_limit(replace(dist, world_size=8))
        assert not capsys.readouterr().out
    finally:
        resource.setrlimit(limit, before)


@pytest.mark.parametrize("launched", [True, False])
def test_a_launched_process_without_a_usable_gpu_is_an_error(
    tmp_path, monkeypatch, capsys, launched
):
    """Otherwise eight processes would train on the CPU. A single process only gets a warning."""
    monkeypatch.setattr(processes, "GPU_FILE", tmp_path)
    if torch.cuda.is_available():
        pytest.skip("needs a machine whose GPU torch cannot use")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not launched:
        for name in (*processes.LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(processes.os, "environ", dict(os.environ))
        for always_group in (False, True):  # True: train_deepspeed.py
            dist = processes.setup_distributed(always_group=always_group)
            processes.close_distributed()
            assert dist.device.type == "cpu" and (dist.hosts is not None) == always_group
            assert "WARNING: torch" in capsys.readouterr().out
        return
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="cannot use the GPU of this machine: got a build for"):
        processes.setup_distributed()


def test_an_error_of_one_process_names_its_rank_and_keeps_its_cause(monkeypatch):
    def fail(kind):
        try:
            {}["a missing name"]
        except KeyError as error:
            raise kind("a failure") from error

    monkeypatch.setattr(Distributed, "gather", lambda self, value: [value, None])
    for kind, words in ((OSError, "^a failure$"), (ValueError, "^rank 0: ValueError: a failure$")):
        with pytest.raises((OSError, ProcessError), match=words) as raised:
            replace(ALONE, world_size=2).run_on_all(partial(fail, kind))
        cause = raised.value.__cause__
        assert isinstance(cause if kind is OSError else cause.__cause__, KeyError)


def test_an_error_of_one_process_reaches_the_error_file_of_torchrun(tmp_path, monkeypatch, capsys):
    """torchrun prints this file of the first process that failed, also on the other nodes."""

    def exit_with(code: int):
        raise SystemExit(code)

    def fail():
        raise RuntimeError("NCCL is out of shared memory")

    monkeypatch.setattr(processes.os, "_exit", exit_with)
    monkeypatch.setattr(processes.multiprocessing, "active_children", list)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stopped:
        processes.run_process(fail)
    stored = json.loads((tmp_path / "error.json").read_text())["message"]
    assert stopped.value.code == 1 and "out of shared memory" in stored["message"]
    assert "in fail" in stored["extraInfo"]["py_callstack"] and "in fail" in capsys.readouterr().err


def test_a_rank_prints_an_unexpected_error_before_it_waits_for_the_others(capsys):
    """As in a sample grid: the others wait in a collective of the grid, until it times out."""

    class WaitsForever(Distributed):
        def gather(self, value):
            raise KeyboardInterrupt

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    dist = WaitsForever(rank=3, local_rank=3, world_size=4, device=torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        dist.run_on_all(fail)
    assert capsys.readouterr().err == "rank 3: OutOfMemoryError: CUDA out of memory\n"


@pytest.mark.parametrize("model, experts", [("DiT-G/2", 16), ("DiT-XL/2", 8)])
def test_shards_that_scatter_over_the_rows_of_a_checkpoint_are_refused(model, experts):
    """256 does not divide the 1408 rows of down_proj of G: 22,528 runs of 88 bytes per layer."""
    with torch.device("meta"):
        dit = DiT(config_of(model, num_experts=experts, depth=2))
    weights, names = dict(dit.named_parameters()), frozenset(dit.expert_parameters())
    with pytest.raises(UserError, match="^--shard-size: got 256.*down_proj.*expected 128 or fewer"):
        fsdp.check_runs(fsdp.Layout(256), weights)
    spread = fsdp.Layout(32, spread=8, experts=names)
    for layout in (fsdp.Layout(128), spread, fsdp.Layout(8)):
        fsdp.check_runs(layout, weights)


def test_the_plan_refuses_what_training_would_refuse(monkeypatch):
    monkeypatch.setattr(fsdp, "MOST_RUNS", 1)
    flags = "--model=DiT-Ti/2", "--depth=1", "--global-batch-size=8", "--gpus=2", "--shard"
    with pytest.raises(UserError, match="^--shard-size: got 2,"):
        call_main("train.py", "--dry-run", *flags)


def test_the_plan_prints_the_load_that_fits_under_expert_parallelism():
    """G keeps 40 layers x 8,192 rows of 1408 + 2 x 5632 numbers in bf16 at the mean load."""
    config = replace(resolve({}, DDPFlags), model=config_of("DiT-G/2", num_experts=16))
    text = load_that_fits(config, micro_batch=16, free=15.47 * 2**30)
    assert text.startswith("7.73 GiB more on a process") and text.endswith("3.0 times the mean fit")
