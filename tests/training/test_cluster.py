"""Cluster jobs: the Slurm job script, and faults that only one process meets."""

import errno
import json
import math
import os
import re
import resource
import shutil
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed
from helpers import (
    ROOT,
    call_main,
    in_processes,
    running,
    step_folder,
    train_on,
    wait_for,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints import config_of, read_record
from checkpoints.weights import open_safetensors
from latents.loading import BatchStream
from models import DiT
from routers import ROUTERS, TopKRouter
from runtime import processes
from runtime.errors import UserError
from runtime.files import wait_for_file
from runtime.processes import ALONE, Distributed, ProcessError
from training import alarms
from training.config import TrainConfig
from training.engines import ddp, engine_for, fsdp, state
from training.log import RunLog
from training.plan import load_that_fits


@pytest.mark.parametrize("status, saves, is_signalled, requeued, code", [
    (0, "this", False, False, 0),
    (1, None, False, False, 1),  # without progress the job would fail again
    (1, "another", False, False, 1),
    (1, "this", False, True, 75),
    (1, "this", True, True, 75),
    (1, None, True, False, 1),  # or be stopped again before its first save
    (0, "this", True, False, 0),
])  # fmt: skip
def test_a_slurm_job_that_fails_or_is_stopped_requeues_itself_if_its_run_saved_a_checkpoint(
    tmp_path, status, saves, is_signalled, requeued, code
):
    """Shell scripts replace Slurm's programs: srun ends while this or another run saves, also after
    the signal before a time limit."""
    (tmp_path / "results" / "other" / "checkpoints").mkdir(parents=True)
    save = {
        "this": 'mkdir -p elsewhere/run/checkpoints/0000002; echo "$_" > "$DIT_MOE_SAVED"',
        "another": "mkdir results/other/checkpoints/0000002",
        None: "true",
    }[saves]
    if is_signalled:
        save += "; trap stop=1 USR1; kill -USR1 $PPID; until [ $stop ]; do sleep 0.02; done"
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


def test_a_cluster_starts_without_an_activated_environment(tmp_path):
    """Neither python nor torchrun is on the PATH, only .venv beside scripts/ has both; here, its
    python prints what it is to run."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    ended = subprocess.run(
        ["/bin/bash", tmp_path / "scripts" / "check_cluster.sh", "--help"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.stdout.startswith("-m torch.distributed.run --nnodes=1 --nproc_per_node=8")
    assert ended.stdout.endswith("-m tools.benchmarks.bench_cluster --help\n")


def test_a_recipe_knows_a_flag_in_any_spelling(tmp_path):
    """Its python prints what it is to run: the plan, without encoding images."""
    (tmp_path / "python").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    flags = "--image_size=512", "--vae_path", "my vae", "--dry_run"
    ended = subprocess.run(
        ["bash", ROOT / "scripts" / "train_s2_8e2a.sh", *flags], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "DATA": "images", "GPUS": "2"},
    )  # fmt: skip
    assert ended.stdout.startswith("train.py --config config/recipes/dit_moe_s2_8e2a.yaml")
    words = "--image-size 512 --vae-path my vae --dry-run --vae-path my vae --data-path images"
    assert words in ended.stdout and "cache_latents" not in ended.stdout


def test_training_names_each_checkpoint_in_the_file_of_the_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_MOE_SAVED", str(tmp_path / "slurm-7.saved"))
    for rank in (1, 0):
        stream = BatchStream(range(8), 1, rank=rank)
        with RunLog(tmp_path, stream, {}, None, is_main=not rank) as log:
            log.saved(tmp_path / "checkpoints" / "0000002")
        assert (tmp_path / "slurm-7.saved").exists() == (not rank)
    assert (tmp_path / "slurm-7.saved").read_text() == f"{tmp_path}/checkpoints/0000002\n"


def test_encoding_notes_each_shard_in_the_file_of_the_slurm_job(
    image_tree, tiny_vae, tmp_path, monkeypatch
):
    """Otherwise a time limit while the images are encoded would end the job for good."""
    monkeypatch.setenv("DIT_MOE_SAVED", str(tmp_path / "slurm-7.saved"))
    flags = "--image-size=16", "--shard-images=20", "--num-workers=0", f"--vae-path={tiny_vae}"
    cache = f"--output={tmp_path / 'latents'}"
    call_main("cache_latents.py", f"--data-path={image_tree}", cache, *flags)
    shards = [tmp_path / "latents" / f"shard-0000{n}.safetensors" for n in (0, 1)]
    assert (tmp_path / "slurm-7.saved").read_text().split() == list(map(str, shards))


def remember_missing_paths() -> None:
    """Makes this process look up paths as an NFS client does: a path that was missing stays missing
    until the folder that lacked it is listed."""
    missing, stat, listdir = set(), os.stat, os.listdir

    def lookup(path, *args, **named):
        whole = Path(path).absolute()
        for part in (*reversed(whole.parents), whole):
            if part in missing or not os.access(part, os.F_OK):
                missing.add(part)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(part))
        return stat(path, *args, **named)

    def list_again(path="."):
        lookup(path)
        missing.difference_update([p for p in missing if p.parent == Path(path).absolute()])
        return listdir(path)

    os.stat, os.listdir = lookup, list_again


def train_on_two_nodes(dist: Distributed, *commands: list[str]) -> None:
    if not dist.is_main:
        remember_missing_paths()
    train_on(dist, *commands)


def test_a_second_node_finds_the_run_folder_that_it_has_looked_up_before(train_flags, tmp_path):
    flags = {"vae-path": "pixels", "image-size": 8, "max-steps": 1}
    runs = {"run": tmp_path / "new" / "named", None: tmp_path / "new" / "numbered"}
    commands = [train_flags(runs[name], **flags, **{"run-name": name}) for name in runs]
    in_processes(train_on_two_nodes, *commands)
    assert all(step_folder(results, 1).exists() for results in runs.values())


def test_a_folder_that_other_nodes_do_not_share_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    assert not wait_for_file(tmp_path / "run" / "config.yaml", seconds=0.1)


def test_a_process_that_sees_one_gpu_uses_it():
    assert [processes.choose_gpu(rank, 8).index for rank in (0, 7)] == [0, 7]
    assert processes.choose_gpu(3, 1).index == 0  # --gpus-per-task=1
    with pytest.raises(UserError, match=r"got local rank 4, expected a process a GPU \(2\)"):
        processes.choose_gpu(4, 2)


def test_the_limit_of_open_files_is_raised():
    limit = resource.RLIMIT_NOFILE
    before = soft, hard = resource.getrlimit(limit)
    try:
        resource.setrlimit(limit, (256, hard))
        processes.raise_descriptor_limit()
        assert resource.getrlimit(limit) == (hard, hard)
    finally:
        resource.setrlimit(limit, before)


def test_always_group_makes_a_group_of_one_process_without_a_launcher(monkeypatch):
    """True: train_deepspeed.py."""
    monkeypatch.setattr(processes.os, "environ", dict(os.environ))
    for name in (*processes.LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for always_group in (False, True):
        dist = processes.setup_distributed(always_group=always_group)
        processes.close_distributed()
        assert (dist.hosts is not None) == always_group


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


FAILS_ON_ONE_RANK = """
import os

from routers import ROUTERS, TopKRouter
from runtime import processes

processes.PATIENCE = 1


class Fragile(TopKRouter):
    def forward(self, *inputs):
        if not self.training and os.environ["RANK"] == "1":
            raise ValueError("this GPU is out of order")
        return super().forward(*inputs)


ROUTERS["fragile"] = Fragile
"""


def test_a_sample_grid_that_fails_on_one_rank_ends_all_processes(train_flags, tmp_path):
    """The others wait in a collective. The save before the grid is completed."""
    (tmp_path / "fragile.py").write_text(FAILS_ON_ONE_RANK)
    flags = {
        "vae-path": "pixels", "image-size": 8, "max-steps": 1, "run-name": "run", "shard": True,
        "router": "fragile", "plugin": tmp_path / "fragile.py", "num-sample": 4, "rf": True,
    }  # fmt: skip
    with running("train.py", train_flags(tmp_path / "results", **flags), 2) as process:
        output = wait_for(process, "rank 1: ValueError: this GPU is out of order")
        start = time.monotonic()
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and time.monotonic() - start < 30, output + rest
    assert "this GPU is out of order; the other processes wait for this one" in rest
    assert step_folder(tmp_path / "results", 1).exists()


class Faulty(TopKRouter):
    """On rank 1, takes long, and returns nan in step 3."""

    def forward(self, *inputs):
        routing = super().forward(*inputs)
        if self.training and torch.distributed.get_rank() == 1:
            self.calls = getattr(self, "calls", 0) + 1
            time.sleep(0.15)
            if self.calls == 3:
                return routing._replace(loss=routing.loss * math.nan)
        return routing


def train_with_a_faulty_rank(dist: Distributed, arguments: list[str]) -> None:
    ROUTERS["faulty"] = Faulty
    alarms.LINES = 3
    train_on(dist, arguments)


def test_the_log_names_a_rank_that_is_slow_or_whose_loss_is_nan(train_flags, tmp_path):
    flags = {
        "vae-path": "pixels", "image-size": 8, "max-steps": 7, "run-name": "run",
        "router": "faulty", "log-every": 1, "global-batch-size": 8,
    }  # fmt: skip
    in_processes(train_with_a_faulty_rank, train_flags(tmp_path, **flags))
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    warnings = [line.split("WARNING: ")[1] for line in lines if "WARNING: " in line]
    (nan,) = [line for line in warnings if "nan" in line]
    assert re.fullmatch(r"the loss was infinite or nan in up to 1 step .* on rank 1 \(.+\)", nan)
    (slow,) = [line for line in warnings if "median" in line]
    assert slow.startswith("for 3 log lines, rank 1 (")


class FakeRank(Distributed):
    def gather(self, value):
        return [value] * self.world_size


class CountedFile:
    """A safetensors file that adds the bytes of the tensors that are read to a list."""

    def __init__(self, path: Path, read: list[int]):
        self.file, self.read = open_safetensors(path), read
        self.metadata = self.file.metadata

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.read.append(tensor.nbytes)
        return tensor

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.counted(self.file.get_tensor(name))

    def get_slice(self, name: str):
        return CountedSlice(self, self.file.get_slice(name))


class CountedSlice:
    def __init__(self, file: CountedFile, content):
        self.file, self.content, self.get_shape = file, content, content.get_shape

    def __getitem__(self, place) -> torch.Tensor:
        return self.file.counted(self.content[place])


@pytest.fixture(scope="module")
def first_step(train_flags, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("first")
    flags = {"vae-path": "pixels", "image-size": 8, "max-steps": 1, "run-name": "run"}
    call_main("train.py", *train_flags(results, **flags))
    return step_folder(results, 1)


@pytest.mark.parametrize("layout, readers", [({}, 1), ({"shard": True, "shard_size": 2}, 2)])
def test_only_the_first_copy_of_the_model_reads_a_checkpoint(
    first_step, monkeypatch, layout, readers
):
    """Four fake ranks. tests/training/test_fsdp.py compares what the other copies receive."""
    folder = first_step
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    files, read, by_rank = [], [], []

    def open_counted(path: Path) -> CountedFile:
        files.append(path)
        return CountedFile(path, read)

    for module in (state, ddp):
        monkeypatch.setattr(module, "open_safetensors", open_counted)
    monkeypatch.setattr(ddp.DDPEngine, "share_state", lambda *_: None, raising=False)
    config = TrainConfig.of_record(read_record(folder)).changed(layout)
    for rank in range(4):
        torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            dist = FakeRank(rank, rank, 4, torch.device("cpu"))
            engine_for(config.engine)(dist, config, ()).load_state(folder)
        finally:
            torch.distributed.destroy_process_group()
        by_rank.append((len(files), sum(read)))
        files.clear()
        read.clear()
    assert [rank for rank, (count, _) in enumerate(by_rank) if count] == [*range(readers)]
    assert 0.9 * stored < sum(size for _, size in by_rank) < 1.01 * stored


@pytest.mark.parametrize("model, experts", [("DiT-G/2", 16), ("DiT-XL/2", 8)])
def test_shards_that_scatter_over_the_rows_of_a_checkpoint_are_refused(model, experts):
    """256 does not divide the 1408 rows of down_proj of G: 22,528 runs of 88 bytes per layer."""
    with torch.device("meta"):
        dit = DiT(config_of(model, num_experts=experts, depth=2))
    weights, names = dict(dit.named_parameters()), frozenset(dit.expert_parameters())
    with pytest.raises(UserError, match="^--shard-size: got 256.*down_proj.*expected 128 or fewer"):
        fsdp.check_layout(fsdp.Layout(256), weights)
    spread = fsdp.Layout(32, spread=8, experts=names)
    for layout in (fsdp.Layout(128), spread, fsdp.Layout(8)):
        fsdp.check_layout(layout, weights)


@pytest.mark.parametrize("size, expected", [
    (1024, "pads .*experts.* by 19..% of .*; expected 128 or fewer"),
    (40, "pads .*experts.* by 137% of .*; expected 20 or fewer"),  # 16 experts become 40
    (41, "pads .*experts.* by 143%"),
])  # fmt: skip
def test_the_plan_refuses_shards_that_are_mostly_padding(size, expected):
    flags = "--model=DiT-G/2", "--num_experts=16", "--depth=2", "--shard", f"--shard-size={size}"
    batch = f"--gpus={size}", f"--global-batch-size={size}"
    with pytest.raises(UserError, match=f"^--shard-size: got {size}, which {expected}"):
        call_main("train.py", "--dry-run", *flags, *batch)


@pytest.mark.parametrize("size, extra", [(3, 11), (7, 29)])
def test_the_plan_says_how_much_more_the_fullest_process_holds(size, extra, capsys):
    flags = "--model=DiT-G/2", "--num_experts=16", "--depth=2", "--shard", f"--shard-size={size}"
    call_main("train.py", "--dry-run", *flags, f"--gpus={size}", f"--global-batch-size={size}")
    expected = f"each with 1/{size} of the model, {extra}% more on the fullest"
    assert expected in capsys.readouterr().out


def test_the_plan_refuses_what_training_would_refuse(monkeypatch):
    monkeypatch.setattr(fsdp, "MOST_RUNS", 1)
    flags = "--model=DiT-Ti/2", "--depth=1", "--global-batch-size=8", "--gpus=2", "--shard"
    with pytest.raises(UserError, match="^--shard-size: got 2,"):
        call_main("train.py", "--dry-run", *flags)


def test_the_plan_prints_the_load_that_fits_under_expert_parallelism():
    """G keeps 40 layers x 8,192 rows of 1408 + 2 x 5632 numbers in bf16 at the mean load."""
    config = replace(TrainConfig.default(), model=config_of("DiT-G/2", num_experts=16))
    text = load_that_fits(config, micro_batch=16, free=15.47 * 2**30)
    assert text.startswith("7.73 GiB more on a process") and text.endswith("3.0 times the mean fit")


def test_a_parameter_without_a_gradient_is_named_before_the_first_step(train_flags, tmp_path):
    """DDP would take the step with gradients of one process, and fail in the next step."""
    router = tmp_path / "chain.py"
    router.write_text(
        "import torch\nfrom routers import ROUTERS, TopKRouter\n"
        "class Chain(TopKRouter):\n"
        "    def __init__(self, *args, **options):\n"
        "        super().__init__(*args, **options)\n"
        "        self.before = torch.nn.Linear(self.num_experts, self.num_experts)\n"
        "    def forward(self, x, context):\n"
        "        logits = self.score(x.flatten(0, 1))\n"
        "        if (logits_before := context.get('logits')) is not None:\n"
        "            logits = logits + self.before(logits_before.detach())\n"
        "        return self.choose(logits)._replace(passed_on={'logits': logits})\n"
        "ROUTERS['chain'] = Chain\n"
    )
    flags = {
        "vae-path": "pixels", "image-size": 8, "max-steps": 1, "run-name": "run",
        "plugin": router, "router": "chain", "depth": 2,
    }  # fmt: skip
    changes = flags | {"accum-iter": 2, "global-batch-size": 8}
    with pytest.raises(UserError, match=r"^blocks\.0\.moe\.gate\.before\.weight, blocks\.0"):
        in_processes(train_on, train_flags(tmp_path, **changes))
