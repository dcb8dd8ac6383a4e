"""train.py as its users run it: real processes, tiny models, generated images."""

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL, call_main, expect_error, relative_error, run_script
from PIL import Image
from safetensors.torch import load_file
from test_sampling import published_layout

from latents.images import center_crop_arr
from latents.loading import BatchStream
from latents.sources import ImageTree
from models import DiT_models, DiTConfig
from runtime.errors import UserError
from runtime.options import parse_bool
from runtime.processes import LAUNCHER_VARIABLES, Distributed, setup_distributed
from train import DDPEngine
from training.ema import update_ema
from training.loop import TrainingLoop


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {"global-batch-size": 8, "log-every": 2, "max-steps": 4}
    return partial(train_flags, **own)


def only_run(results: Path) -> Path:
    (run,) = results.iterdir()
    return run


def final_weights(results: Path, step: int = 4) -> tuple[dict, dict]:
    folder = only_run(results) / "checkpoints" / f"{step:07d}"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    return state["model"], load_file(folder / "model.safetensors")


def assert_equal_runs(a: Path, b: Path, step: int = 4) -> None:
    for got, want in zip(final_weights(a, step), final_weights(b, step), strict=True):
        assert got.keys() == want.keys()
        for name in got:
            assert torch.equal(got[name], want[name]), name


def rows(results: Path) -> list[dict]:
    lines = (only_run(results) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """The results folder of a run of four steps, with a checkpoint at two."""
    results = tmp_path_factory.mktemp("finished")
    run_script("train.py", *flags(results, **{"ckpt-every": 2, "num-sample": 4}), "--rf")
    return results


def test_a_run_leaves_logs_samples_and_checkpoints(finished):
    run = only_run(finished)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["0000002", "0000004"]
    assert Image.open(run / "samples-0000004.png").size[0] > 32
    assert any((run / "tensorboard").iterdir())
    assert [row["step"] for row in rows(finished)] == [2, 4]
    row = rows(finished)[-1]
    for name in ("loss", "aux_loss", "grad_norm", "lr", "images_per_sec", "memory_gb"):
        assert row[name] > 0, name
    assert len(row["expert_load"]) == 6
    assert all(1 <= load <= 4 for load in row["expert_load"])
    assert "step 0000004  loss" in (run / "log.txt").read_text()


def test_the_same_command_again_says_it_is_finished(finished, flags, capsys):
    before = (only_run(finished) / "checkpoints" / "0000004").stat().st_mtime_ns
    call_main("train.py", *flags(finished, **{"ckpt-every": 2, "num-sample": 4}), "--rf")
    assert "is finished: step 4 of 4, nothing to do" in capsys.readouterr().out
    assert (only_run(finished) / "checkpoints" / "0000004").stat().st_mtime_ns == before


def test_resume_is_bit_exact(flags, tmp_path):
    """In another process, after a shorter run; test_interruptions.py stops in between."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = {"accum_iter": 2, "ckpt-every": 2}
    call_main("train.py", *flags(whole, **common), "--rf")
    call_main("train.py", *flags(parts, **common, **{"max-steps": 2}), "--rf")
    resumed = run_script("train.py", *flags(parts, **common), "--rf")
    assert "resumed from" in resumed.stdout
    assert_equal_runs(parts, whole)
    timeless = [
        {k: v for k, v in row.items() if k[:3] not in ("ima", "mem")} for row in rows(whole)
    ]
    for got, want in zip(rows(parts), timeless, strict=True):
        assert {**got, **want} == got


def test_a_global_batch_gives_the_same_step_however_it_is_split(flags, tmp_path):
    """Two processes with two micro-batches each, against one process with four."""
    run_script("train.py", *flags(tmp_path / "two", accum_iter=2), "--rf", processes=2)
    call_main("train.py", *flags(tmp_path / "one", accum_iter=4), "--rf")
    for got, want in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for metric in ("loss", "aux_loss", "grad_norm"):
            assert got[metric] == pytest.approx(want[metric], rel=1e-5), metric
    (got, got_ema), (want, want_ema) = (final_weights(tmp_path / name) for name in ("two", "one"))
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name
        assert relative_error(got_ema[name], want_ema[name]) < 1e-5, name


def test_accumulation_steps_the_optimizer_once_a_global_batch(flags, tmp_path):
    call_main("train.py", *flags(tmp_path, accum_iter=4))
    folder = only_run(tmp_path) / "checkpoints" / "0000004"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {4}


def engine_of(precision: str = "fp32", **config) -> DDPEngine:
    args = argparse.Namespace(
        gradient_checkpointing=False, compile=False, ema_decay=0.9, grad_clip=0.0, lr=1e-3,
        weight_decay=0.0, precision=precision, global_seed=0, freeze=[], train_router_only=False,
    )  # fmt: skip
    torch.manual_seed(0)
    dist = Distributed(0, 0, 1, torch.device("cpu"))
    return DDPEngine(args, dist, DiTConfig(**{**TINY_MODEL, **config}), None)


def test_balance_loss_acts_in_full_under_accumulation():
    """The balance loss alone: four micro-batches give its gradient once, not four times or 1/4."""
    x, t, y = torch.randn(8, 4, 8, 8), torch.rand(8) * 999, torch.arange(8)

    def losses(model):
        prediction, aux_loss = model(x, t, y)
        return {"loss": 0 * prediction.sum(), "aux_loss": aux_loss}

    def gate_gradient(num_micro: int) -> torch.Tensor:
        engine = engine_of(aux_loss_alpha=1.0, class_dropout_prob=0.0)
        grads = []
        engine.model.blocks[0].moe.gate.weight.register_post_accumulate_grad_hook(
            lambda weight: grads.append(weight.grad.clone())
        )
        engine.train_step([losses] * num_micro, lr=0.0)
        assert len(grads) == num_micro
        return grads[-1]

    assert gate_gradient(1).abs().sum() > 0
    assert relative_error(gate_gradient(4), gate_gradient(1)) < 1e-6


def test_an_fp16_overflow_updates_nothing_and_lowers_the_scale():
    engine = engine_of(precision="fp16")
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2) * 999, torch.arange(2)
    before = [weight.detach().clone() for weight in engine.model.parameters()]

    def losses(factor):
        def compute(model):
            prediction, aux_loss = model(x, t, y)
            return {"loss": factor * (prediction.float() - 1).square().mean(), "aux_loss": aux_loss}

        return compute

    scale = engine.scaler.get_scale()
    assert engine.train_step([losses(1e38)], lr=1.0) is None
    assert engine.scaler.get_scale() < scale
    for entry in engine.optimizer.state.values():  # the fused AdamW may have made empty ones
        assert entry["step"] == 0 and entry["exp_avg"].abs().sum() == 0
    for weight, ema, want in zip(
        engine.model.parameters(), engine.ema.values(), before, strict=True
    ):
        assert torch.equal(weight, want) and torch.equal(ema, want)
    scale = engine.scaler.get_scale()
    assert engine.train_step([losses(math.inf)], lr=1.0)["skipped"]  # at any scale
    assert engine.scaler.get_scale() == scale
    assert not engine.train_step([losses(1e-3)], lr=1e-3)["skipped"]
    assert {int(entry["step"]) for entry in engine.optimizer.state.values()} == {1}


def test_a_run_in_fp16_goes_through(flags, tmp_path):
    call_main("train.py", *flags(tmp_path, precision="fp16", **{"max-steps": 2}))
    assert rows(tmp_path)[-1]["loss"] > 0
    assert "overflows" in rows(tmp_path)[-1]


def test_resume_takes_a_run_a_step_and_weights(finished, flags, tmp_path, capsys):
    run = only_run(finished)
    call_main("train.py", *flags(tmp_path / "other", **{"max-steps": 4}), "--rf", f"--resume={run}")
    assert "is finished" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()

    step = run / "checkpoints" / "0000002"
    call_main("train.py", *flags(tmp_path / "step"), "--rf", f"--resume={step}")
    assert_equal_runs(tmp_path / "step", finished)

    weights = run / "checkpoints" / "0000004" / "model.safetensors"
    call_main(
        "train.py", *flags(tmp_path / "weights", lr=0.0, **{"max-steps": 1}), "--rf",
        f"--resume={weights}",
    )  # fmt: skip
    _, ema = final_weights(tmp_path / "weights", step=1)
    for name, value in load_file(weights).items():
        torch.testing.assert_close(ema[name], value, atol=1e-7, rtol=1e-6)


def test_published_weights_start_a_run_and_other_shapes_are_refused(flags, tmp_path, capsys):
    torch.manual_seed(0)
    build = DiT_models["DiT-Ti/2"]
    model = build(input_size=8, num_classes=4, num_experts=4)
    torch.save({"ema": published_layout(model), "opt": {}}, tmp_path / "published.pt")
    start = f"--resume={tmp_path / 'published.pt'}"
    call_main("train.py", *flags(tmp_path / "r", lr=0.0, **{"max-steps": 1}), start)
    weights, _ = final_weights(tmp_path / "r", step=1)
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name

    line = expect_error(capsys, "train.py", *flags(tmp_path / "s", num_experts=5), start)
    assert "another model: num_experts: got 5, expected 4" in line


def test_a_step_folder_may_be_renamed(finished, flags, tmp_path):
    shutil.copytree(only_run(finished) / "checkpoints" / "0000002", tmp_path / "best")
    call_main("train.py", *flags(tmp_path / "r"), "--rf", f"--resume={tmp_path / 'best'}")
    assert_equal_runs(tmp_path / "r", finished)


@pytest.mark.parametrize("lr, what", [(1e30, "the loss or the gradient"), (1e300, "the weights")])
def test_weights_that_diverged_are_never_saved(flags, tmp_path, lr, what, capsys):
    changes = {"lr": lr, "ckpt-every": 1, "log-every": 7, "max-steps": 6, "max-skipped-steps": 3}
    line = expect_error(capsys, "train.py", *flags(tmp_path, **changes))
    assert f"{what} became infinite or nan" in line
    for path in only_run(tmp_path).glob("checkpoints/*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path


def test_a_class_more_does_not_enter_the_run(flags, image_tree, tmp_path, capsys):
    shutil.copytree(image_tree, tmp_path / "data")
    arguments = flags(tmp_path / "r", **{"data-path": tmp_path / "data", "max-steps": 1})
    call_main("train.py", *arguments)
    shutil.copytree(image_tree / "class-0", tmp_path / "data" / "class-9")
    line = expect_error(capsys, "train.py", *arguments)
    assert "now ask for another model: num_classes: got 5, expected 4" in line


def test_unreadable_images_are_named_counted_and_replaced(flags, image_tree, tmp_path, capsys):
    data = tmp_path / "data"
    for folder in image_tree.iterdir():
        (data / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (data / folder.name / path.name).write_bytes(path.read_bytes())
    (data / "class-1" / "03.png").write_bytes(b"")
    (data / "class-2" / "04.png").write_bytes(b"not an image")
    whole = (data / "class-3" / "05.png").read_bytes()
    (data / "class-3" / "05.png").write_bytes(whole[: len(whole) // 2])
    call_main(
        "train.py", *flags(tmp_path / "r", **{"data-path": data, "max-steps": 5, "num-workers": 1})
    )
    said = capsys.readouterr().out
    for name in ("class-1/03.png", "class-2/04.png", "class-3/05.png"):
        assert said.count(f"cannot be read: {data / name}") == 1
    assert rows(tmp_path / "r")[-1]["skipped_images"] == 3


def test_published_command_line_is_understood(image_tree, capsys):
    call_main(
        "train.py", "--model", "DiT-S/2", "--num_experts", 8, "--num_experts_per_tok", 2,
        "--data-path", image_tree, "--image-size", 256, "--global-batch-size", 256,
        "--vae-path", "stabilityai/sd-vae-ft-mse", "--pretraining_tp", 1, "--accum_iter", 1,
        "--rf", "False", "--dry-run",
    )  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    # ImageNet's 199,209,248 and 71,807,264 less 996 rows of the label table: there are 4 classes
    assert lines["parameters"] == "198,826,784 total, 71,424,800 active for a token"
    assert "of 256 images (1 processes x 1 micro-batches x 256)" in lines["steps"]
    assert "GiB a process" in lines["memory"]


BAD_FLAGS = [
    ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok: got 3, expected at most"),
    ({"global-batch-size": 9, "accum_iter": 2}, "--global-batch-size: got 9, expected a multiple"),
    ({"image-size": 17}, "--image-size: got 17, expected a multiple of the autoencoder's factor 2"),
    ({"num-classes": 7}, "--num-classes: got 7, expected 4"),
    ({"data-path": "/nowhere"}, "--data-path: got /nowhere, expected a folder"),
    ({"resume": "/nowhere"}, "/nowhere: no such file or folder"),
    ({"results-dir": "/dev/null/x"}, "--results-dir: cannot write to"),
    ({"run-name": "../x"}, "--run-name: got '../x', expected a plain folder name"),
    ({"ema-decay": 1.5}, "--ema-decay: got 1.5"),
    ({"grad-clip": -1}, "--grad-clip: got -1.0, expected a number >= 0"),
    ({"weight-decay": -1}, "--weight-decay: got -1.0, expected a number >= 0"),
]


@pytest.mark.parametrize("changes, message", BAD_FLAGS, ids=[message for _, message in BAD_FLAGS])
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path, changes, message, capsys):
    assert message in expect_error(capsys, "train.py", *flags(tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_a_mistake_ends_the_process_with_one_line_and_exit_code_2(flags, tmp_path):
    arguments = flags(tmp_path / "r", **{"num-classes": 7})
    result = run_script("train.py", *arguments, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --num-classes: got 7, expected 4")


def test_a_vae_folder_without_weights_and_an_empty_class_are_one_line(
    flags, tiny_vae, tmp_path, capsys
):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes((tiny_vae / "config.json").read_bytes())
    line = expect_error(capsys, "train.py", *flags(tmp_path, **{"vae-path": tmp_path / "vae"}))
    assert "cannot load the weights" in line
    (tmp_path / "data" / "empty").mkdir(parents=True)
    line = expect_error(capsys, "train.py", *flags(tmp_path, **{"data-path": tmp_path / "data"}))
    assert "empty" in line


def test_other_settings_do_not_enter_a_named_run(flags, tmp_path, capsys):
    call_main("train.py", *flags(tmp_path, **{"run-name": "mine", "max-steps": 1}))
    changes = {"run-name": "mine", "lr": 2e-3}
    line = expect_error(capsys, "train.py", *flags(tmp_path, **changes))
    assert "--lr got 0.002, expected 0.001" in line


def test_other_settings_get_another_run_folder(flags, tmp_path):
    for seed in (0, 1):
        call_main("train.py", *flags(tmp_path, **{"global-seed": seed, "max-steps": 1}))
    assert len(list(tmp_path.iterdir())) == 2


def test_an_epoch_reads_every_image_once_whatever_the_split():
    for world_size, accumulation in ((1, 1), (2, 1), (2, 2), (5, 1)):
        read = []
        for rank in range(world_size):
            stream = BatchStream(
                40, micro_batch=2, accumulation=accumulation, rank=rank, world_size=world_size,
                seed=3, end_step=40 // (2 * accumulation * world_size),
            )  # fmt: skip
            read += [index for batch in stream for index, _ in batch]
        assert sorted(read) == list(range(40))


def test_the_order_can_be_entered_at_any_step():
    whole = list(BatchStream(11, micro_batch=3, accumulation=2, end_step=9))
    assert (
        list(BatchStream(11, micro_batch=3, accumulation=2, start_step=4, end_step=9)) == whole[8:]
    )
    assert whole != list(BatchStream(11, micro_batch=3, accumulation=2, end_step=9, seed=1))
    flips = [flip for batch in whole for _, flip in batch]
    assert 0.2 < sum(flips) / len(flips) < 0.8


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (16, 16), (300, 200)])
def test_centre_crop_keeps_the_centre_at_the_asked_size(size):
    image = Image.new("RGB", size)
    half, side = min(size) // 4, min(size) // 2  # a white square in the middle, half as wide
    left, top = size[0] // 2 - half, size[1] // 2 - half
    image.paste((255, 255, 255), (left, top, left + side, top + side))
    cropped = np.asarray(center_crop_arr(image, 16))
    assert cropped.shape == (16, 16, 3)
    assert (cropped[5:11, 5:11] > 200).all()
    assert (cropped[:3] < 50).all() and (cropped[:, -3:] < 50).all()


def test_images_of_any_mode_become_rgb(tmp_path):
    (tmp_path / "c").mkdir()
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (20, 20)).save(tmp_path / "c" / f"{mode}.{suffix}")
    dataset = ImageTree(str(tmp_path), 16)
    for index in range(5):
        image, label, unreadable = dataset[index, True]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        assert label == 0 and not unreadable


def test_ema_is_the_weighted_mean():
    averages, weights = [torch.ones(3)], [torch.full((3,), 2.0)]
    update_ema(averages, weights, decay=0.75)
    torch.testing.assert_close(averages[0], torch.full((3,), 1.25))


def test_others_without_a_launcher_that_names_this_process_are_one_line(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="got 2 and no LOCAL_RANK, MASTER_ADDR, MASTER_PORT, exp"):
        setup_distributed()


@pytest.mark.parametrize("text, value", [("True", True), ("false", False), ("0", False)])
def test_boolean_flags_read_their_text(text, value):
    assert parse_bool(text) is value


ENDS = {"return 0": 0, "raise UserError('wrong')": 2, "raise RuntimeError('broken')": 1}


@pytest.mark.parametrize("end", ENDS)
def test_gloo_threads_do_not_abort_a_process_that_leaves(tmp_path, end):
    """Without `run_process` this ends in "terminate called without an active exception"."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import torch, torch.distributed\n"
        "from runtime.processes import close_distributed, run_process, setup_distributed\n"
        "from runtime.errors import UserError, exit_on_user_error\n"
        "@exit_on_user_error\n"
        "def main():\n"
        "    global group, tensors\n"
        "    setup_distributed()\n"
        "    group = torch.distributed.group.WORLD  # as DeepSpeed holds on to it\n"
        "    tensors = [torch.ones(1000 + i) for i in range(3000)]\n"
        "    for tensor in tensors:\n"
        "        torch.distributed.all_reduce(tensor, async_op=True)\n"
        "    close_distributed()\n"
        f"    {end}\n"
        "run_process(main)\n"
    )
    code = ENDS[end]
    for _ in range(2):
        result = run_script(script, processes=2, check=code == 0, PYTHONPATH=str(ROOT))
        assert "terminate called" not in result.stderr and "SIGABRT" not in result.stderr
        assert not code or f"exitcode  : {code} " in result.stderr, result.stderr


def test_ctrl_c_is_one_line():
    program = (
        "import time; from runtime.processes import run_process; print('go', flush=True); "
        "run_process(lambda: time.sleep(60))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on from what is written\n"


def test_a_training_step_reads_nothing_back_from_the_device(
    image_tree, tiny_vae, tmp_path, monkeypatch
):
    """No `.item()`, no `nonzero`: what a GPU would have to wait for.

    Two operators read their own arguments on a CPU; on CUDA they are kernels.
    """
    unprofiled, names, reads = TrainingLoop.step, set(), []
    on_cpu_alone = {"aten::_grouped_mm", "aten::_fused_adamw_"}

    def step(loop, number, micro_batches):
        device = loop.dist.device.type
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            metrics = unprofiled(loop, number, micro_batches)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        for event in profile.events():
            names.add(event.name)
            if event.name in ("aten::_local_scalar_dense", "aten::nonzero"):
                callers = set()
                while event := event.cpu_parent:
                    callers.add(event.name)
                reads.extend([callers] if not callers & on_cpu_alone else [])
        return metrics

    monkeypatch.setattr(TrainingLoop, "step", step)
    call_main(
        "train.py", f"--data-path={image_tree}", f"--vae-path={tiny_vae}", "--image-size=16",
        "--model=DiT-Ti/2", "--num_experts=4", "--precision=bf16", "--global-batch-size=4",
        "--max-steps=2", "--num-workers=0", "--num-sample=0", f"--results-dir={tmp_path}",
    )  # fmt: skip
    assert "dit_moe::experts_backward" in names
    assert not reads


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_and_sample_as_the_others_do(image_tree, tiny_vae, tmp_path):
    losses = []
    for compiled in (False, True):
        run = tmp_path / f"compile-{compiled}"
        call_main(
            "train.py", f"--data-path={image_tree}", f"--vae-path={tiny_vae}", "--image-size=16",
            "--model=DiT-Ti/2", "--num_experts=4", "--precision=fp32", "--global-batch-size=4",
            "--max-steps=3", "--log-every=1", "--num-workers=0", "--num-sample=0", "--rf",
            f"--compile={compiled}", f"--results-dir={tmp_path}", f"--run-name={run.name}",
        )  # fmt: skip
        rows = (run / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    call_main(
        "sample.py", f"--ckpt={run}", "--compile", "--class-labels", "0", "1",
        "--num-sampling-steps=2", f"--output-dir={tmp_path / 'samples'}",
        f"--output={tmp_path / 'grid.png'}",
    )  # fmt: skip
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
