"""train_deepspeed.py on real processes: every ZeRO stage gives the results of DDP.

The tests share their runs. Each run trains the same tiny model for 4 steps of two micro-batches on
two processes, or on one GPU, with a checkpoint at step 2.
"""

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    TINY_MODEL,
    assert_unaveraged,
    call_main,
    expect_error,
    list_files,
    main_of_torchrun,
    process_pool,
    relative_error,
    running_forked,
    state_of,
)
from safetensors.torch import load_file
from test_bad_files import Gadget

from initialization import initialize
from models import DiT, DiTConfig
from routers import ROUTERS
from runtime.errors import UserError
from runtime.processes import ALONE, reseed
from training.config import TrainConfig
from training.engines.deepspeed_engine import DeepSpeedEngine
from training.engines.state import stored_shards
from training.engines.zero_config import complete_config

ZERO2 = {"zero_optimization": {"stage": 2}}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
        "hysteresis": 2, "min_loss_scale": 1}  # fmt: skip
ADAM = {"lr": 0.0001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0}
PUBLISHED = {  # config/zero2.json by DiT-MoE's authors
    "fp16": FP16, "optimizer": {"type": "AdamW", "params": ADAM}, "bf16": {"enabled": False},
    "train_micro_batch_size_per_gpu": 32, "train_batch_size": 256, "steps_per_print": 10000,
    "gradient_accumulation_steps": 1, "zero_optimization": {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
    },
}  # fmt: skip
STEP_4 = "checkpoints/0000004"
LAYOUTS = ["zero1", "zero2", "zero3"]
PROCESSES = min(2, torch.cuda.device_count() or 2)  # one process per GPU if there are GPUs
CLOSE, EXACT = (1e-3, 1e-3) if torch.cuda.is_available() else (1e-5, 0)  # a GPU adds in any order
# Trains several times in the same processes, because processes are slow to start. They keep one
# process group. On a CPU every process has local rank 0, so only the rank tells processes apart.
SEVERAL = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import torch.distributed
from helpers import call_main, command_line
from runtime.processes import run_process

if not torch.cuda.is_available():
    os.environ |= {{"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}}
    from deepspeed.accelerator import get_accelerator  # knows fp16 only on newer CPUs
    type(get_accelerator()).is_fp16_supported = lambda self: True

def main():
    *commands, (script, *arguments) = json.loads(os.environ["COMMANDS"])
    for command in commands:
        call_main(*command)
    with command_line(script, arguments) as module:
        return module.main(module.parse_args())

torch.distributed.destroy_process_group = lambda: None
"""


def train_several(folder: Path, commands: list[list[str]]) -> str:
    """Runs several training commands in the same processes. The last has to fail.

    Returns what they and torchrun print.
    """
    program = folder / "several.py"
    program.write_text(f"{SEVERAL}\nrun_process(main)\n")
    torchrun = main_of_torchrun, program, [], PROCESSES
    with running_forked(*torchrun, COMMANDS=json.dumps(commands)) as process:
        return process.stdout.read()


@pytest.fixture(scope="session")
def flags(train_flags):
    values = {
        "vae-path": "pixels", "image-size": 8, "accum_iter": 2, "max-steps": 4, "ckpt-every": 2,
        "log-every": 1, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **values)


@pytest.fixture(scope="session")
def command(flags, tmp_path_factory):
    """Function that returns a train_deepspeed.py command for a layout such as zero2."""
    folder = tmp_path_factory.mktemp("config")
    written = {"zero1": {"zero_optimization": {"stage": 1}}, "fp16": {**ZERO2, "fp16": FP16}}
    for name, content in written.items():
        (folder / f"{name}.json").write_text(json.dumps(content))

    def make(results: Path, layout: str, **changes) -> list[str]:
        config = (folder if layout in written else ROOT / "config") / f"{layout}.json"
        values = {"deepspeed_config": config, "train_batch_size": 2, "run-name": layout}
        values["global-batch-size"] = None  # DeepSpeed's configuration has it
        return ["train_deepspeed.py", *flags(results, **{**values, **changes})]

    return make


@pytest.fixture(scope="session")
def alone():
    """Function that calls a function in one process, which all such calls share."""
    with process_pool(1) as pool:
        yield lambda *call: pool.submit(*call).result()


@pytest.fixture(scope="session")
def trained(flags, command, alone, tmp_path_factory) -> tuple[Path, Path, str]:
    """Folder of all runs, a damaged part of a checkpoint, and the output of the runs.

    The runs named "again-..." stop after two steps and are resumed. zero3 recomputes its
    activations. One process takes the first two steps of the run "grown" with ZeRO-3, and all
    processes resume it with ZeRO-2. The last command of the launch meets the damaged part.
    """
    results = tmp_path_factory.mktemp("trained")
    one = {"accum_iter": 2 * PROCESSES, "run-name": "grown", "max-steps": 2}
    alone(call_several, command(results, "zero3", **one))
    grown = results / "grown" / "checkpoints" / "0000002"
    cut = spoiled(grown, results / "cut", lambda path: os.truncate(path, 1000))

    ddp = {"global-batch-size": 4 * PROCESSES, "run-name": "ddp", "num-sample": 4}
    commands = [["train.py", *flags(results, **ddp)]]
    more = {"zero3": {"num-sample": 4, "gradient-checkpointing": True}}
    for layout in LAYOUTS:
        changes = more.get(layout, {})
        commands.append(command(results, layout, **changes))
        if layout == "zero3":
            again = partial(command, results, layout, **{**changes, "run-name": "again-zero3"})
            commands += [again(**{"max-steps": 2, "num-sample": 0}), again(**{"num-sample": 0})]
    recipe = results / "recipe.yaml"  # without a precision
    recipe.write_text("warmup-steps: 0\n")
    fp16 = partial(command, results, "fp16", precision=None, config=recipe)
    commands += [fp16(), fp16(**{"run-name": "again-fp16", "max-steps": 2})]
    commands.append(fp16(resume=results / "again-fp16", **{"run-name": None}))
    whole = results / "zero3" / "checkpoints" / "0000002"
    commands.append(again(resume=whole, **{"run-name": "branch-zero3", "num-sample": 0}))
    commands.append(
        command(results, "zero2", **{"run-name": "bf16", "precision": "bf16", "ema": "none"})
    )
    branch = {"run-name": "branch", "resume": results / "bf16" / "checkpoints" / "0000002"}
    commands.append(command(results, "fp16", **branch, **{"precision": None, "max-steps": 3}))
    commands.append(command(results, "zero2", **{"run-name": "grown"}))
    commands.append(command(results, "zero3", resume=cut.parent.parent, **{"run-name": "other"}))
    output = train_several(results, commands)
    assert f"error: {cut}" in output, output  # all commands before it succeeded
    return results, cut, output


@pytest.fixture(scope="session")
def finished(trained):
    """Function that returns the run folder with a given name."""
    return trained[0].joinpath


def rows(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]  # the others say what a command changed


def ema_of(run: Path, step: int = 4) -> dict:
    return load_file(run / "checkpoints" / f"{step:07d}" / "model.safetensors")


def assert_close_runs(got: Path, want: Path, *more_metrics: str, step: int = 4) -> None:
    for metric in ("loss", "aux_loss", "grad_norm", *more_metrics):
        assert rows(got)[-1][metric] == pytest.approx(rows(want)[-1][metric], rel=CLOSE), metric
    weights, expected = ema_of(got, step), ema_of(want, step)
    assert weights.keys() == expected.keys()
    for name, b in expected.items():
        a = weights[name]
        if name.endswith("attn.qkv.bias"):
            # The bias of the keys does not affect the attention weights, so its gradient consists
            # of rounding errors, from which Adam makes full steps.
            (a_q, a_k, a_v), (b_q, b_k, b_v) = a.chunk(3), b.chunk(3)
            assert (a_k - b_k).abs().max() < 2 * CLOSE
            a, b = torch.cat([a_q, a_v]), torch.cat([b_q, b_v])
        assert relative_error(a, b) < CLOSE, name


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepspeed_gives_the_losses_and_ema_of_ddp(finished, layout):
    assert_close_runs(finished(layout), finished("ddp"), "expert_load")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_deepspeed_in_16_bits_stays_close_to_ddp(finished, precision):
    """The JSON enables fp16; no flag and no recipe does. Its loss scale causes no overflow."""
    got, want = (rows(finished(name))[-1] for name in (precision, "ddp"))
    assert got["loss"] == pytest.approx(want["loss"], rel=0.01)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.05)


def test_without_an_ema_a_checkpoint_has_the_master_weights(finished):
    assert_unaveraged(finished("bf16") / STEP_4)


@pytest.mark.gpu
def test_a_run_that_changes_to_fp16_begins_with_the_configured_loss_scale(finished):
    _, _, metadata = stored_shards(finished("branch") / "checkpoints" / "0000003")
    assert metadata["scaler"]["cur_scale"] == 2 ** FP16["initial_scale_power"]


@pytest.mark.parametrize("again", ["again-fp16", "again-zero3", "branch-zero3"])
def test_a_resumed_deepspeed_run_is_bit_identical(finished, again):
    """The first goes on by path, with ZeRO-2 and a loss scale; the second by its name."""
    got, want = finished(again), finished(again.split("-")[1])
    assert "resumed from" in (got / "log.txt").read_text()
    for a, b in zip(rows(got), rows(want)[-len(rows(got)) :], strict=True):
        for metric in ("step", "loss", "aux_loss", "grad_norm", "expert_load"):
            assert a[metric] == pytest.approx(b[metric], rel=EXACT, abs=0), metric
    for name, weight in ema_of(want).items():
        assert relative_error(ema_of(got)[name], weight) <= EXACT, name
    mine, theirs = (state_of(run / STEP_4) for run in (got, want))
    assert mine.keys() == theirs.keys()
    for title, value in theirs.items():
        if torch.is_tensor(value):
            assert relative_error(mine[title], value) <= EXACT, title


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("state/*"))


def spoiled(step: Path, folder: Path, spoil: Callable[[Path], None]) -> Path:
    """Copies a checkpoint, spoils its last part and lists it in the manifest.

    Returns the path of the spoiled part.
    """
    shutil.copytree(step, folder)
    path = parts_of(folder)[-1]
    spoil(path)
    list_files(folder)
    return path


def call_several(*commands: list[str]) -> None:
    """Calls scripts one after another, in one process group, because DeepSpeed keeps the first."""
    torch.distributed.destroy_process_group = lambda: None
    for command in commands:
        call_main(*command)


def test_every_process_saves_its_share_of_the_state(finished):
    for layout in LAYOUTS:
        sizes = [part.stat().st_size for part in parts_of(finished(layout) / STEP_4)]
        assert len(sizes) == PROCESSES and max(sizes) < 1.2 * min(sizes), layout


def test_deepspeed_resumes_on_fewer_processes(finished, command, alone, tmp_path):
    """One process takes steps 3 and 4 of a run, and then rejects a checkpoint that hides code."""
    run = shutil.copytree(finished("zero3"), tmp_path / "zero3")
    shutil.rmtree(run / STEP_4)
    gadget = {"world_size": Gadget(tmp_path / "executed")}
    step = finished("zero3") / "checkpoints" / "0000002"
    hostile = spoiled(step, tmp_path / "a", lambda path: torch.save(gadget, path))
    one = {"accum_iter": 2 * PROCESSES}
    branch = {"resume": hostile.parent.parent, "run-name": "branch"}
    commands = (command(tmp_path, "zero3", **values) for values in (one, {**one, **branch}))
    with pytest.raises(UserError, match=f"{hostile}: damaged or not a safetensors file"):
        alone(call_several, *commands)
    assert not (tmp_path / "executed").exists()
    assert len(parts_of(run / STEP_4)) == 1
    assert_close_runs(run, finished("ddp"))


def test_deepspeed_resumes_on_more_processes_and_with_another_stage(finished):
    assert "resumed from" in (finished("grown") / "log.txt").read_text()
    assert_close_runs(finished("grown"), finished("ddp"))


def test_a_damaged_part_is_reported_by_one_process_and_exit_code_2(trained):
    _, cut, output = trained
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, output
    assert f"error: {cut}: damaged" in output
    assert re.findall(r"exitcode +: (-?\d+)", output)[-1] == "2"  # printed by torchrun


def test_a_checkpoint_is_checked_on_the_device_although_cpu_offload_keeps_the_state_on_the_host():
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.dist = replace(ALONE, device=torch.device("meta"))  # cannot be mixed with CPU tensors
    engine.ema = SimpleNamespace(averages=[torch.zeros(2)])
    buffers = {"pos_embed": torch.zeros(2, device="meta")}
    engine.shards = SimpleNamespace(masters=[torch.zeros(2)], buffers=buffers)
    assert engine.is_finite().is_meta
    engine.dist = ALONE
    for value, is_finite in ((math.inf, True), (math.nan, False)):  # a mask may be infinite
        engine.shards.buffers = {"mask": torch.tensor([0.0, value])}
        assert engine.is_finite() == is_finite


def test_the_sample_grid_under_zero_3_equals_the_grid_under_ddp(finished):
    runs = finished("zero3"), finished("ddp")
    grids = [(run / "samples-0000004.png").read_bytes() for run in runs]
    assert grids[0] == grids[1]


def test_train_py_refuses_to_resume_a_deepspeed_run(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished("zero2"), tmp_path / "zero2"))
    before = (run / "config.yaml").read_bytes()
    line = expect_error(capsys, "train.py", "--resume", run, "--max-steps", 9)
    assert "the script: was train_deepspeed.py, is train.py" in line
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_drawn_one_by_one_equal_those_of_a_model_built_at_once(router):
    from checkpoints.meta import initial_weights, meta_model

    config, drawn = DiTConfig(**TINY_MODEL, router=router), {}
    reseed(3)
    for name, weight in initial_weights(config):
        drawn[name] = weight
        assert all(tensor.is_meta for tensor in meta_model(config).state_dict().values())
    reference = DiT(**vars(config))
    reseed(3)
    initialize(reference)
    assert drawn.keys() == reference.state_dict().keys()
    for name, want in reference.state_dict().items():
        assert torch.equal(drawn[name], want), name


def config_for(tmp_path: Path, json_text: dict | str, gpus: int, per_node: int, **changes) -> dict:
    path = tmp_path / "config.json"
    path.write_text(json_text if isinstance(json_text, str) else json.dumps(json_text))
    values = {"deepspeed_config": str(path), "train_batch_size": 4, "accum_iter": 2,
              "gpus_per_node": per_node, **changes}  # fmt: skip
    return complete_config(TrainConfig.default("train_deepspeed.py").changed(values), gpus)


CONTRADICTIONS = [
    ({"train_batch_size": 8}, "train_batch_size: got 8, expected 64"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: got 1, expected 2"),
    ({"gradient_clipping": 1.0}, "gradient_clipping: got 1.0, expected 0.0, as set by --grad-clip"),
    (
        {"managed_gradient_accumulation": False},
        "managed_gradient_accumulation: got false, expected",
    ),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "grad_norm: got false, exp"),
    ({"bf16": {"enabled": False}}, "bf16.enabled: got false, expected true, as set by --precision"),
    ({"optimizer": {"params": {"lr": 1e-3}}}, "lr: got 0.001, expected 0.0001, as set by --lr"),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "expected [0.9, 0.999], as set by"),
    ({"scheduler": {"type": "WarmupLR"}}, "got a scheduler, expected none"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: got 0, expected 1, 2 or 3"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "offload_optimizer.device: got nvme, expected cpu or none",
    ),
    ({"expert_parallel": {"enabled": True}}, "expected train.py --shard --expert-parallel N"),
    ("{,}", "config.json"),
    ("[]", "got a list"),
]


@pytest.mark.parametrize("config, message", CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_a_deepspeed_json_that_contradicts_the_flags_is_rejected(tmp_path, config, message):
    if isinstance(config, dict):
        config = {**ZERO2, **config}
    with pytest.raises(UserError) as error:
        config_for(tmp_path, config, 8, 8)
    assert message in str(error.value)


def test_a_deepspeed_json_may_contain_auto_or_the_values_of_the_flags(tmp_path):
    config = {
        **ZERO2, "train_batch_size": "auto", "gradient_accumulation_steps": 2,
        "bf16": {"enabled": "auto", "immediate_grad_update": False},
    }  # fmt: skip
    filled = config_for(tmp_path, config, 8, 8)
    assert filled["train_batch_size"] == 64
    assert filled["bf16"].items() > {"enabled": True, "immediate_grad_update": False}.items()
    assert config_for(tmp_path, {**ZERO2, "bf16": "auto"}, 8, 8)["bf16"]["enabled"] is True


def test_the_published_deepspeed_json_works_unchanged(tmp_path, capsys):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(PUBLISHED))
    plan = "train_deepspeed.py", "--dry-run", "--gpus=8", f"--deepspeed_config={path}"
    call_main(*plan, "--depth=2")
    assert printed_values(capsys)["layout"] == "8 processes under ZeRO-2, fp16"
    line = expect_error(
        capsys, "train_deepspeed.py", "--dry-run", "--gpus=8", f"--deepspeed_config={path}",
        "--precision=bf16",
    )  # fmt: skip
    assert "enabled: got" in line and "as set by --precision" in line
    filled = config_for(tmp_path, PUBLISHED, 8, 8, train_batch_size=32, accum_iter=1,
                        precision="fp16")  # fmt: skip
    assert filled["fp16"] == FP16 and not filled["bf16"]["enabled"]


@pytest.mark.parametrize("user_flags, message", [
    ({"objective": "mean_flow"}, "--objective: got mean_flow"),
    ({"optimizer": "muon"}, "--optimizer: got muon"),
    ({"optimizer": "adamw:decay_vectors=False"}, "--optimizer adamw:decay_vectors: got False"),
    ({"ema": ("exponential", "power")}, "--ema: got 2 averages"),
    ({"auxiliary": ("dispersive", "sra")}, "--auxiliary: got sra"),
    ({"freeze": ("x_embedder",)}, "--freeze: got x_embedder"),
    ({"train_router_only": True}, "--train-router-only: got True"),
    ({"selective_checkpointing": True}, "--selective-checkpointing: got True"),
    ({"grad_skip": 10.0}, "--grad-skip: got 10.0"),
])  # fmt: skip
def test_flags_that_only_train_py_supports_are_rejected_under_deepspeed(
    tmp_path, user_flags, message
):
    with pytest.raises(UserError, match=f"^{message} under DeepSpeed, expected .*; train.py sup"):
        config_for(tmp_path, ZERO2, 8, 8, **user_flags)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_shipped_deepspeed_configs_work_with_any_number_of_gpus(tmp_path, name):
    text = (ROOT / "config" / f"{name}.json").read_text()
    for gpus, per_node in ((1, 1), (6, 6), (32, 8)):
        assert config_for(tmp_path, text, gpus, per_node)["train_batch_size"] == 8 * gpus


@pytest.mark.parametrize("name", ["zero2_ep", "zero3_ep"])
def test_the_removed_autoep_configs_name_their_replacement(name, capsys):
    line = expect_error(
        capsys, "train_deepspeed.py", "--dry-run", f"--deepspeed_config=config/{name}.json"
    )
    assert f"{name}.json, expected train.py --shard --expert-parallel N" in line


def printed_values(capsys) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_deepspeed_dry_run_plans_the_largest_model_in_seconds(capsys):
    giant = "--dry-run", "--model=DiT-G/2", "--num_experts=16", "--gpus=32", "--train_batch_size=8"
    config = f"--deepspeed_config={ROOT / 'config' / 'zero3.json'}"
    start = time.process_time()
    call_main("train_deepspeed.py", *giant, config, "--gradient-checkpointing")
    assert time.process_time() - start < 20
    lines = printed_values(capsys)
    assert lines["parameters"].startswith("16,503,356,704 total, 3,181,198,624 active")
    assert lines["layout"] == "32 processes under ZeRO-3, bf16"
    assert "AdamW 3.84, EMA 1.92, gradients 1.92" in lines["GPU"]
    assert lines["fits"].startswith("on a GPU, yes")
    # Under ZeRO-2, with twice the weights in few modules, which are planned in less time.
    wide = "--model=DiT-XL/2", "--depth=2", "--num_experts=1024", "--train_batch_size=32"
    call_main("train_deepspeed.py", *giant, *wide)
    assert printed_values(capsys)["fits"].startswith("on a GPU, NO")


def test_a_plan_accepts_auto_in_a_deepspeed_json(tmp_path, capsys):
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_max_live_parameters"), "auto")
    path = tmp_path / "auto.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **sizes}}))
    call_main("train_deepspeed.py", "--dry-run", "--depth=2", f"--deepspeed_config={path}")
    assert printed_values(capsys)["layout"] == "1 process under ZeRO-3, bf16"


def output_of(
    recipe: str, flags: list[str], stand_in: Path, program: str, **variables
) -> list[str]:
    """Runs a recipe with a bash script in place of Python; returns its output."""
    stand_in.write_text(f"#!/usr/bin/env bash\n{program}\n")
    stand_in.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / recipe), *flags],
        env={**os.environ, "PYTHON": str(stand_in), **variables},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


LARGEST = "train_g2_16e2a_rf_512.sh"


@pytest.mark.parametrize("recipe", [path.name for path in ROOT.glob("scripts/train_*.sh")])
def test_training_scripts_plan_steps_of_1024_images(recipe, tmp_path, monkeypatch, capsys):
    """A script in place of `python` prints the command of the recipe, which is then run here.

    Only the largest recipe is planned with all of its blocks.
    """
    print_command = r"""printf '%s\n' "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$@" """
    flags = ["--dry-run", *["--depth=2"] * (recipe != LARGEST)]
    output = output_of(recipe, flags, tmp_path / "python", print_command, NODES="2", GPUS="8")
    world_size, node_size, *command = output
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node_size)
    monkeypatch.chdir(ROOT)
    call_main(*command)
    lines = printed_values(capsys)
    assert "1,751,595 of 1024 images (16 processes x" in lines["steps"]
    assert lines["fits"].startswith("on a GPU, yes")


@pytest.mark.parametrize("variables, lines", [
    ({"DATA": "/images"}, ["cache_latents.py --data-path /images --image-size 512 --output "
                           "data/latents-512", "--latents-path data/latents-512"]),
    ({"DATA": "/images", "LATENTS": "/l", "VAE": "/vae"}, [
        "cache_latents.py --data-path /images --image-size 512 --vae-path /vae --output /l",
        "--vae-path /vae --latents-path /l"]),
    ({"LATENTS": "/l"}, ["--latents-path /l"]),
    ({"LATENTS": "/l", "said": "--latents-path /m"}, ["--latents-path /m"]),
    ({"DATA": "/images", "said": "--dry-run"}, ["--dry-run --run-name g2 --data-path /images"]),
    ({"DATA": "/images", "said": "--dry-run --latents-path /m"}, ["--latents-path /m"]),
    ({"DATA": "/images", "IMAGES": "1"}, ["--data-path /images"]),
])  # fmt: skip
def test_training_scripts_encode_the_images_once_and_train_on_latents(tmp_path, variables, lines):
    """A script in place of Python prints the commands of torchrun."""
    recipe, flags = LARGEST, ["--max-steps", "9"]
    variables = {"RUN": "g2", **variables}
    flags += variables.pop("said", "").split()
    output = output_of(recipe, flags, tmp_path / "python", 'echo "$@"', **variables)
    assert len(output) == len(lines)
    assert all(line.endswith(end) for line, end in zip(output, lines, strict=True))
    words = ("train.py --shard", "--max-steps 9", "--run-name g2")
    assert all(word in output[-1] for word in words)


def test_the_lock_of_a_stopped_compilation_is_named(tmp_path, monkeypatch, capsys):
    """The lock of another process of the same run, which is new, is not."""
    from training.engines import zero

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    zero.announce_compilation(offload)
    assert "delete it" not in capsys.readouterr().out
    os.utime(lock, (0, 0))
    zero.announce_compilation({"zero_optimization": {}})
    assert not capsys.readouterr().out
    zero.announce_compilation(offload)
    assert f"WARNING: {lock}: another process" in capsys.readouterr().out
