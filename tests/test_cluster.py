"""Cluster jobs: the Slurm job script, and processes that cannot use their GPU."""

import os
import subprocess

import pytest
import torch
from conftest import ROOT

from runtime import processes
from runtime.errors import UserError


@pytest.mark.parametrize("status, checkpoint, requeued, code", [
    (0, "0000002", False, 0),
    (1, None, False, 1),  # without progress the job would fail again
    (1, "0000002", True, 75),
])  # fmt: skip
def test_a_failed_slurm_job_requeues_itself_if_it_has_a_new_checkpoint(
    tmp_path, status, checkpoint, requeued, code
):
    """Shell scripts replace Slurm's programs: srun writes a checkpoint and fails."""
    folder = tmp_path / "results" / "run" / "checkpoints"
    (folder / "0000001").mkdir(parents=True)
    made = f"mkdir {folder / checkpoint}" if checkpoint else "true"
    for name, line in (
        ("srun", f"echo $@ > {tmp_path}/srun.txt; {made}; exit {status}"),
        ("scontrol", f"echo $@ >> {tmp_path}/scontrol.txt; echo node0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NUM_NODES": "2", "JOB_NODELIST": "n[0-1]", "CPUS_ON_NODE": "4", "JOB_ID": "7"}
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), "recipe.sh"], cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
             **{f"SLURM_{name}": value for name, value in slurm.items()}},
    )  # fmt: skip
    assert ended.returncode == code
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text()) == requeued
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.txt").read_text()


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
