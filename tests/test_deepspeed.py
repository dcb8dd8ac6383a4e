"""train_deepspeed.py on real processes: every way to cut a model up computes what DDP computes.

The runs are shared between the tests: each trains the same tiny model for 20 steps of two
micro-batches on two processes, with a checkpoint at 10.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TINY_MODEL,
    call_main,
    flat,
    relative_error,
    run_script,
    running,
    wait_for,
)
from safetensors.torch import load_file
from test_sampling import randomised_preset

from checkpoints import Record, load_model, save_model
from models import DiT, DiTConfig
from runtime.errors import UserError
from runtime.processes import reseed
from sampling.generate import SamplerSettings, generate
from training.finetune import freeze
from training.zero_config import add_experts, complete_config, layout_of

LAYOUTS = ["zero1", "zero2", "zero3", "zero2_ep", "zero3_ep"]


@pytest.fixture(scope="session")
def flags(train_flags):
    own = {"accum_iter": 2, "max-steps": 20, "ckpt-every": 10, "log-every": 5, "rf": True}
    return partial(train_flags, **own)


@pytest.fixture(scope="session")
def deepspeed_flags(flags, tmp_path_factory):
    zero1 = tmp_path_factory.mktemp("config") / "zero1.json"
    zero1.write_text(json.dumps({"zero_optimization": {"stage": 1}}))

    def make(results: Path, layout: str, **changes) -> list[str]:
        config = zero1 if layout == "zero1" else ROOT / "config" / f"{layout}.json"
        own = {"deepspeed_config": config, "train_batch_size": 2, "run-name": layout}
        return flags(results, **{**own, **changes})

    return make


@pytest.fixture(scope="session")
def finished(flags, deepspeed_flags, tmp_path_factory):
    """Gives the run folder of a layout, or of "ddp", all trained beforehand."""
    results = tmp_path_factory.mktemp("finished")
    own = {"global-batch-size": 8, "run-name": "ddp", "num-sample": 4}
    commands = [["train.py", *flags(results, **own)]]
    for layout in LAYOUTS:
        sample = {"num-sample": 4} if layout == "zero3_ep" else {}
        commands.append(["train_deepspeed.py", *deepspeed_flags(results, layout, **sample)])
    train_one_after_another(commands)
    return results.joinpath


def train_one_after_another(
    commands: list[list[str]], script: str = "one_after_another.py", **environment
) -> str:
    """Trains on the same two processes, which are slow to start; returns what they said."""
    commands = json.dumps(commands)
    return run_script(f"tests/{script}", processes=2, COMMANDS=commands, **environment).stdout


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def log_rows(run: Path) -> list[dict]:
    """The lines of log.jsonl without what depends on the machine."""
    machine = ("images_per_sec", "memory_gb")
    return [{k: v for k, v in row.items() if k not in machine} for row in rows(run)]


def zero_state(folder: Path) -> dict:
    from training.zero import STORED_CLASSES

    with torch.serialization.safe_globals(STORED_CLASSES):
        return {
            path.name: torch.load(path, weights_only=True)["optimizer_state_dict"]
            for path in sorted(folder.glob("deepspeed/state/*optim_states.pt"))
        }


def ema_of(run: Path, step: int = 20) -> dict:
    return load_file(run / "checkpoints" / f"{step:07d}" / "model.safetensors")


def assert_close_runs(got: Path, want: Path, *more_metrics: str, step: int = 20) -> None:
    for a, b in zip(rows(got), rows(want), strict=True):
        for metric in ("loss", "aux_loss", "grad_norm", *more_metrics):
            assert a[metric] == pytest.approx(b[metric], rel=1e-5), metric
    weights, wanted = ema_of(got, step), ema_of(want, step)
    assert weights.keys() == wanted.keys()
    for name in wanted:
        a, b = weights[name], wanted[name]
        if name.endswith("attn.qkv.bias"):
            # A bias of the keys moves no attention weight, so its gradient is rounding alone, and
            # Adam makes steps of it.
            (a_q, a_k, a_v), (b_q, b_k, b_v) = a.chunk(3), b.chunk(3)
            assert (a_k - b_k).abs().max() < 2e-5
            a, b = torch.cat([a_q, a_v]), torch.cat([b_q, b_v])
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_ema_are_those_of_ddp(finished, layout):
    assert_close_runs(finished(layout), finished("ddp"), "expert_load")


@pytest.mark.parametrize("layout", ["zero2", "zero3", "zero2_ep"])
def test_resume_is_bit_exact(finished, deepspeed_flags, tmp_path, layout):
    whole = finished(layout)
    shutil.copytree(whole, tmp_path / layout)
    shutil.rmtree(tmp_path / layout / "checkpoints" / "0000020")
    arguments = deepspeed_flags(tmp_path, layout)
    if layout == "zero2":  # the launcher of the published commands
        launcher = ["-m", "torch.distributed.launch", "--nnodes=1", "--nproc_per_node=2"]
        launch(launcher, "train_deepspeed.py", arguments)
    else:
        run_script("train_deepspeed.py", *arguments, processes=2)
    assert "resumed from" in (tmp_path / layout / "log.txt").read_text()
    for got, want in zip(rows(tmp_path / layout), rows(whole), strict=True):
        for metric in ("loss", "aux_loss", "grad_norm", "expert_load"):
            assert got[metric] == want[metric], metric
    for name, want in ema_of(whole).items():
        assert torch.equal(ema_of(tmp_path / layout)[name], want), name


@pytest.mark.parametrize("layout", ["zero3_ep"])
def test_a_run_stopped_between_checkpoints_goes_on_exactly(
    finished, deepspeed_flags, tmp_path, layout
):
    """By SIGTERM to the launcher, which passes it on."""
    arguments = deepspeed_flags(tmp_path, layout)
    with running("train_deepspeed.py", arguments, 2) as process:
        wait_for(process, "step 0000010")
        time.sleep(0.1)  # into another step
        process.send_signal(signal.SIGTERM)
        wait_for(process, "the same command goes on from there")
        process.stdout.read()
        process.wait()
    again = run_script("train_deepspeed.py", *arguments, processes=2)
    assert "resumed from" in again.stdout
    got, want = tmp_path / layout, finished(layout)
    assert log_rows(got) == log_rows(want)
    for name, weight in ema_of(want).items():
        assert torch.equal(ema_of(got)[name], weight), name
    state, wanted = (flat(zero_state(run / "checkpoints" / "0000020")) for run in (got, want))
    assert state.keys() == wanted.keys()
    tensors = [name for name, value in wanted.items() if torch.is_tensor(value)]
    assert tensors and all(torch.equal(state[name], wanted[name]) for name in tensors)


def launch(launcher: list[str], script: str, arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("layout", ["zero3_ep"])
def test_another_number_of_processes_needs_a_conversion(
    finished, deepspeed_flags, tmp_path, layout
):
    """Two processes with two micro-batches each go on as one process with four."""
    shutil.copytree(finished(layout), tmp_path / layout)
    shutil.rmtree(tmp_path / layout / "checkpoints" / "0000020")
    arguments = deepspeed_flags(tmp_path, layout, accum_iter=4)
    refused = run_script("train_deepspeed.py", *arguments, check=False)
    assert refused.returncode == 2
    error = refused.stderr.strip().splitlines()[-1]
    assert "got 1 processes under ZeRO-3, experts over 1, expected 2 processes" in error
    command = error[error.index("python -m deepspeed.checkpoint.ds_to_universal") :].split()
    assert not subprocess.run([sys.executable, *command[1:]], capture_output=True).returncode
    run_script("train_deepspeed.py", *arguments)
    assert_close_runs(tmp_path / layout, finished(layout))


def test_two_launchers_read_every_image_once_in_an_epoch(deepspeed_flags, image_tree, tmp_path):
    """Two nodes of two processes: 40 images in 5 steps of 4 x 2."""
    changes = {"accum_iter": 1, "epochs": 1, "max-steps": 5, "train_batch_size": 2}
    arguments = deepspeed_flags(tmp_path / "results", "zero2", **changes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
                str(ROOT / "tests" / "watched_deepspeed.py"), *arguments,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "READS": str(tmp_path / "reads")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    reads = [(tmp_path / f"reads-{rank}").read_text().split("\n")[:-1] for rank in range(4)]
    assert [len(part) for part in reads] == [10] * 4
    assert sorted(sum(reads, [])) == sorted(map(str, image_tree.glob("*/*.png")))


def test_fp16_trains_and_a_skipped_step_leaves_no_trace(deepspeed_flags, tmp_path):
    """The loss scale doubles after each step, so it overflows again and again."""
    scale = {"initial_scale_power": 20, "loss_scale_window": 1, "hysteresis": 1}
    runs, commands = [tmp_path / "stage-2", tmp_path / "stage-3"], []
    for stage, run in enumerate(runs, start=2):
        config = tmp_path / f"{run.name}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": scale}))
        changes = {"precision": "fp16", "deepspeed_config": config, "max-steps": 8, "accum_iter": 1}
        changes["run-name"] = run.name
        commands.append(["train_deepspeed.py", *deepspeed_flags(tmp_path, "zero2", **changes)])
    output = train_one_after_another(commands, "watched_deepspeed.py", FP16_ON_CPU="1")
    overflows = [rows(run)[-1]["overflows"] for run in runs]
    assert min(overflows) >= 3
    assert output.count("overflow: nothing changed") == 2 * sum(overflows)  # two processes
    assert "SOMETHING CHANGED" not in output
    for run in runs:
        assert [row["step"] for row in rows(run)] == [5, 8]
        assert optimizer_steps(run) == 8
        assert rows(run)[-1]["loss"] < rows(run)[0]["loss"]


def optimizer_steps(run: Path) -> int:
    from training.zero import STORED_CLASSES

    (path,) = run.glob("checkpoints/0000008/deepspeed/state/*zero_pp_rank_0*optim_states.pt")
    with torch.serialization.safe_globals(STORED_CLASSES):
        state = torch.load(path, weights_only=True)["optimizer_state_dict"]
    adam = state[
        "base_optimizer_state" if "base_optimizer_state" in state else "optimizer_state_dict"
    ]
    (steps,) = {int(entry["step"]) for entry in adam["state"].values()}
    return steps


def test_expert_parallel_checkpoint_samples_the_images_of_its_ddp_twin(finished):
    twins = finished("zero3_ep"), finished("ddp")
    settings = SamplerSettings("rectified_flow", num_steps=5, cfg_scale=2.0)
    got, want = (generate(load_model(run), [0, 1, 3], [0, 1, 2], settings) for run in twins)
    assert relative_error(got, want) < 1e-5
    grids = [(run / "samples-0000020.png").read_bytes() for run in twins]  # drawn while training
    assert grids[0] == grids[1]


def test_a_checkpoint_holds_one_standard_model_and_the_state_of_deepspeed(finished):
    folder = finished("zero2_ep") / "checkpoints" / "0000020"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checksums.json", "deepspeed", "model.safetensors", "progress.json"]
    config = load_model(folder).config
    with torch.device("meta"):
        standard = DiT(**vars(config)).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == standard.keys()
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert not list(folder.rglob("latest"))


def test_a_branch_takes_the_weight_decay_of_its_command(finished, deepspeed_flags, tmp_path):
    origin = finished("zero2") / "checkpoints" / "0000010"
    changes = {"resume": origin, "weight-decay": 0.5, "max-steps": 11}
    run_script("train_deepspeed.py", *deepspeed_flags(tmp_path, "zero2", **changes), processes=2)
    for folder, decay in ((origin, 0.0), (tmp_path / "zero2" / "checkpoints" / "0000011", 0.5)):
        state = flat(zero_state(folder))
        values = {value for name, value in state.items() if name.endswith("/weight_decay")}
        assert values == {decay}


def test_damaged_files_of_deepspeed_are_one_line(finished, tmp_path):
    from training.zero import check_files

    shutil.copytree(finished("zero2") / "checkpoints" / "0000010" / "deepspeed", tmp_path / "state")
    files = sorted((tmp_path / "state").rglob("*.pt"))
    check_files(tmp_path, 0, 1)
    for number, path in enumerate(files):
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"\x80\x02}."):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{path.name}: damaged"):
                check_files(tmp_path, number, len(files))
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def fine_tuned(flags, tmp_path_factory) -> Path:
    """Four steps with frozen attention and experts, under ZeRO-3 by resuming, beside the source."""
    root = tmp_path_factory.mktemp("fine-tuned")
    model = randomised_preset()
    source = root / "source.safetensors"
    save_model(source, model.state_dict(), Record(config=model.config, model="DiT-Ti/2"))
    frozen = ["--finetune", str(source), "--freeze", "blocks.*.attn", "blocks.0.moe.experts"]

    def command(script: str, name: str, steps: int, **changes) -> list[str]:
        own = {"log-every": 1, "max-steps": steps, "run-name": name}
        return [script, *flags(root, **own, **changes), *frozen]

    call_main(*command("train.py", "ddp", 4, **{"global-batch-size": 4}))
    commands = []
    for layout, steps in (("zero2_ep", 4), ("zero3", 2), ("zero3", 4)):
        own = {"deepspeed_config": ROOT / "config" / f"{layout}.json", "train_batch_size": 2}
        commands.append(command("train_deepspeed.py", layout, steps, accum_iter=1, **own))
    train_one_after_another(commands)
    return root


@pytest.mark.parametrize("layout", ["zero2_ep", "zero3"])
def test_fine_tuning_with_frozen_parts_is_that_of_ddp(fine_tuned, layout):
    got = fine_tuned / layout
    assert_close_runs(got, fine_tuned / "ddp", step=4)
    before, after = load_file(fine_tuned / "source.safetensors"), ema_of(got, 4)
    for name, weight in before.items():
        is_frozen = ".attn." in name or ".0.moe.experts" in name or name == "pos_embed"
        assert torch.equal(weight, after[name]) == is_frozen, name


@pytest.mark.parametrize("pattern", ["blocks.1.moe.experts.down_proj", "blocks.*.moe"])
def test_frozen_experts_that_deepspeed_cannot_save_are_one_line(pattern):
    from training.zero import refuse_frozen_experts

    model = DiT(**TINY_MODEL)
    freeze(model, ["blocks.*.moe.gate", "blocks.*.attn"])
    refuse_frozen_experts(model)
    freeze(model, [pattern])
    with pytest.raises(UserError, match="--freeze: got experts under ZeRO-3 with expert parallel"):
        refuse_frozen_experts(model)


def test_initial_weights_need_the_memory_of_one_module_and_are_those_of_ddp():
    from training.zero import build_empty, draw_initial_weights

    config = DiTConfig(**TINY_MODEL)
    model = build_empty(config, lambda _: True)
    assert all(weight.untyped_storage().nbytes() == 4 for weight in model.parameters())
    drawn = {}
    draw_initial_weights(config, 3, drawn.__setitem__)
    reference = DiT(**vars(config))
    reseed(3)
    reference.initialize_weights()
    assert drawn.keys() == dict(reference.named_parameters()).keys()
    for name, want in reference.named_parameters():
        assert torch.equal(drawn[name], want), name


def arguments_for(tmp_path: Path, config: dict | str, **changes) -> argparse.Namespace:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return argparse.Namespace(**{
        "deepspeed_config": str(path), "train_batch_size": 4, "accum_iter": 2, "precision": "bf16",
        "lr": 1e-4, "weight_decay": 0.0, "grad_clip": 0.0, **changes,
    })  # fmt: skip


def config_for(args: argparse.Namespace, gpus: int, gpus_per_node: int, experts: int = 8) -> dict:
    ds_config = complete_config(args, gpus)
    model = DiTConfig(num_experts=experts)
    add_experts(
        ds_config, model, args.deepspeed_config, world_size=gpus, gpus_per_node=gpus_per_node
    )
    return ds_config


ZERO2 = {"zero_optimization": {"stage": 2}}
EXPERTS = {"enabled": True}
CONTRADICTIONS = [
    ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: got 8, expected 4"),
    ({"train_batch_size": 8}, "train_batch_size: got 8, expected 64"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: got 1, expected 2"),
    ({"gradient_clipping": 1.0}, "gradient_clipping: got 1.0, expected 0.0 as --grad-clip says"),
    ({"fp16": {"enabled": True}}, "fp16.enabled: got true, expected false as --precision says"),
    ({"bf16": {"enabled": False}}, "bf16.enabled: got false, expected true as --precision says"),
    ({"optimizer": {"params": {"lr": 1e-3}}}, "lr: got 0.001, expected 0.0001 as --lr says"),
    ({"scheduler": {"type": "WarmupLR"}}, "got a scheduler, expected none"),
    ({"checkpoint": {"writer": {"type": "FAST"}}}, "got checkpoint, expected one of"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: got 0, expected 1, 2 or 3"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "offload_optimizer.device: got nvme, expected cpu or none",
    ),
    ({"expert_parallel": {**EXPERTS, "autoep_size": 3}}, "autoep_size: got 3, expected a divisor"),
    ({"expert_parallel": {**EXPERTS, "top_k": 1}}, "top_k: got 1, expected 2 as --num_experts_per"),
    ("{,}", "is not JSON"),
    ("[]", "got a list"),
]


@pytest.mark.parametrize("config, message", CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_a_json_that_contradicts_the_flags_is_refused(tmp_path, config, message):
    if isinstance(config, dict):
        config = {**ZERO2, **config}
    with pytest.raises(UserError) as error:
        config_for(arguments_for(tmp_path, config), 8, 8)
    assert message in str(error.value)


def test_auto_and_the_same_value_are_accepted(tmp_path):
    config = {
        **ZERO2, "train_batch_size": "auto", "gradient_accumulation_steps": 2, "bf16": "auto",
        "fp16": {"enabled": "auto", "initial_scale_power": 12},
    }  # fmt: skip
    filled = config_for(arguments_for(tmp_path, config, precision="fp16"), 8, 8)
    assert filled["train_batch_size"] == 64
    assert filled["fp16"] == {"enabled": True, "initial_scale_power": 12}
    assert filled["bf16"] == {"enabled": False}


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload", "zero2_ep", "zero3_ep"])
def test_the_shipped_configs_fit_any_number_of_gpus(tmp_path, name):
    text = (ROOT / "config" / f"{name}.json").read_text()
    for gpus, per_node, experts in ((1, 1, 8), (6, 6, 8), (8, 8, 8), (32, 8, 16)):
        layout = layout_of(config_for(arguments_for(tmp_path, text), gpus, per_node, experts), gpus)
        assert layout.zero_stage == int(name[4])
        spread = {1: 1, 6: 2, 8: 8, 32: 8}[gpus]
        assert layout.expert_parallel_size == (spread if name.endswith("_ep") else 0)


def said_lines(capsys) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_dry_run_plans_the_largest_model_in_seconds(capsys):
    giant = "--dry-run", "--model=DiT-G/2", "--num_experts=16", "--gpus=32", "--train_batch_size=8"
    config = f"--deepspeed_config={ROOT / 'config' / 'zero3_ep.json'}"
    start = time.process_time()
    call_main("train_deepspeed.py", *giant, config, "--gradient-checkpointing")
    assert time.process_time() - start < 10
    lines = said_lines(capsys)
    assert lines["parameters"].startswith("16,503,356,704 total, 3,181,198,624 active")
    assert lines["layout"] == "32 processes under ZeRO-3, experts over 8, bf16"
    assert "AdamW 3.84, EMA 1.92, gradients 1.92" in lines["GPU"]
    assert lines["fits"].startswith("yes")
    more = "--train_batch_size=32"  # under ZeRO-2 beside 31 GiB of weights
    call_main("train_deepspeed.py", *giant, more)
    assert said_lines(capsys)["fits"].startswith("NO")


def test_published_commands_are_understood(capsys):
    command = [
        "train_deepspeed.py", "--deepspeed_config", str(ROOT / "config" / "zero2.json"),
        "--model", "DiT-XL/2", "--num_experts", 8, "--num_experts_per_tok", 2,
        "--data-path", "/path/to/imagenet1k/", "--vae-path", "/path/to/vae",
        "--train_batch_size", 32, "--local-rank=0", "--dry-run",
    ]  # fmt: skip
    assert "4,167,869,216 total" in run_script(*command).stdout
    call_main(*command, "--rf", "True")
    assert "4,167,869,216 total" in capsys.readouterr().out


RECIPES = {
    "train_s2_8e2a.sh": "199,209,248 total",
    "train_s2_16e2a.sh": "369,",
    "train_b2_8e2a.sh": "79",
    "train_l2_8e2a.sh": "2,8",
    "train_xl2_8e2a_rf.sh": "4,16",
    "train_g2_16e2a_rf_256.sh": "16,50",
    "train_g2_16e2a_rf_512.sh": "16,50",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_plan_steps_of_1024_images(recipe, tmp_path, monkeypatch, capsys):
    """The recipe is run; what stands in for `python` tells the command, which is called here."""
    stand_in = tmp_path / "python"
    told = '"$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$@"'
    stand_in.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' {told}\n")
    stand_in.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / recipe), "--dry-run"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "2", "GPUS": "8"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    world_size, node_size, *command = result.stdout.splitlines()
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node_size)
    monkeypatch.chdir(ROOT)
    call_main(*command)
    lines = said_lines(capsys)
    assert lines["parameters"].startswith(RECIPES[recipe])
    assert "1,751,595 of 1024 images (16 processes x" in lines["steps"]
    assert lines.get("fits", "yes").startswith("yes")
