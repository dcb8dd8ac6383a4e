"""Generation for evaluation: the same images from any number of processes, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, run_script
from test_sampling import randomised_preset

from checkpoints import Record, save_model
from evaluation.images import read_image
from runtime.errors import UserError
from sampling.generate import generate

COMMON = ("--backbone", "efficientnet-lite0", "--sampler", "euler", "--cfg-scale", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_vae) -> Path:
    model, path = randomised_preset(), tmp_path_factory.mktemp("model") / "model.safetensors"
    info = {
        "image_size": 16, "vae_path": str(tiny_vae), "objective": "rectified_flow", "step": 7,
        "class_names": ("ape", "bee", "cat", "dog"),
    }  # fmt: skip
    save_model(path, model.state_dict(), Record(config=model.config, **info))
    return path


def command(checkpoint: Path, output: Path, *arguments, steps: int = 4) -> list:
    return [
        "evaluate.py", "--ckpt", checkpoint, "--output", output, "--num-images", 24,
        "--num-sampling-steps", steps, *COMMON, *arguments,
    ]  # fmt: skip


def images_in(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: read_image(path) for path in sorted((folder / "images").glob("*.png"))}


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> Path:
    """What one process draws in batches of 6."""
    folder = tmp_path_factory.mktemp("alone")
    call_main(*command(checkpoint, folder, "--batch-size", 6))
    return folder


def test_results_hold_what_decides_the_numbers(alone, checkpoint):
    images = json.loads((alone / "results.json").read_text())["images"]
    assert images["sampler"] == "euler" and images["num_sampling_steps"] == 4
    assert images["cfg_scale"] == 2 and images["guidance_interval"] == [0, 1]
    assert images["step"] == 7 and images["seed"] == 0 and images["labels"] == "balanced"
    assert images["num_images"] == 24 and images["precision"] == "float32"
    assert len(images["checkpoint_sha256"]) == len(images["vae_sha256"]) == 64
    with np.load(alone / "samples.npz") as file:
        pixels = file["arr_0"]
    drawn = images_in(alone)
    assert [name[-8:-4] for name in drawn] == [f"{i % 4:04d}" for i in range(24)]
    for row, image in zip(pixels, drawn.values(), strict=True):
        assert np.array_equal(row, image.permute(1, 2, 0).numpy())
    assert (alone / "sheet.png").exists()


def test_images_are_those_of_sample_py(alone, checkpoint, tmp_path):
    call_main(
        "sample.py", "--ckpt", checkpoint, "--num-sampling-steps", 4, *COMMON[2:],
        "--class-labels", 0, 1, 2, 3, "--batch-size", 6, "--seed", 4,
        "--output", tmp_path / "grid.png", "--output-dir", tmp_path,
    )  # fmt: skip
    for seed in range(4, 8):
        name = f"{seed:06d}-class-{seed % 4:04d}.png"
        difference = read_image(tmp_path / name).int() - read_image(alone / "images" / name).int()
        assert difference.abs().max() <= 1


def test_two_processes_draw_the_same_images_bit_for_bit(alone, checkpoint, tmp_path):
    run_script(*command(checkpoint, tmp_path, "--batch-size", 6), processes=2)
    one, two = images_in(alone), images_in(tmp_path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (alone / "samples.npz").read_bytes()[-9000:] == (
        tmp_path / "samples.npz"
    ).read_bytes()[-9000:]  # fmt: skip


def test_another_batch_size_stays_within_one_grey_level(alone, checkpoint, tmp_path):
    call_main(*command(checkpoint, tmp_path, "--batch-size", 5))
    one, other = images_in(alone), images_in(tmp_path)
    assert one.keys() == other.keys()
    assert max((one[name].int() - other[name].int()).abs().max() for name in one) <= 1


def test_killed_and_run_again_it_keeps_what_was_done(checkpoint, tmp_path, capsys):
    """SIGKILL in the middle of drawing; the rerun draws the rest, and the images are the same."""
    options = ("--batch-size", 6)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call_main(*command(checkpoint, whole, *options, steps=20))
    script, *arguments = command(checkpoint, killed, *options, steps=20)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(killed.glob("images/*.png"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("images/*.png")}
    assert 6 <= len(before) < 24 and not (killed / "results.json").exists()
    capsys.readouterr()
    for _ in range(2):
        kept = len(list(killed.glob("images/*.png")))
        call_main(*command(checkpoint, killed, *options, steps=20))
        assert f"{24 - kept} images drawn, {kept} were there" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    got, want = images_in(killed), images_in(whole)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_folder_begun_with_other_settings_is_refused(alone, checkpoint):
    with pytest.raises(UserError, match="begun with other settings: seed got 1, expected 0"):
        call_main(*command(checkpoint, alone, "--seed", 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class-labels", "4"), "--class-labels: got 4, expected 0 to 3 or one of ape"),
        (("--guidance-interval", "0.5", "0.2"), "0 <= low < high <= 1, got 0.5 0.2"),
        (("--bpd", "--data-path", "x"), "--bpd: got a model of rectified_flow"),
    ],
)
def test_bad_flags_are_one_line(checkpoint, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        call_main(*command(checkpoint, tmp_path / "out", *arguments))
    assert message in str(error.value)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label):
    """Label 4 of 4 classes is in the table: it means no class, and would pass unseen."""
    with pytest.raises(UserError, match=f"labels: got {label}, expected 0 to 3"):
        generate(randomised_preset(), [0, label], [0, 1], objective="rectified_flow", num_steps=1)


def test_trajectory_is_a_strip_of_predictions_or_a_gif(checkpoint, tmp_path):
    from PIL import Image

    for suffix in ("png", "gif"):
        call_main(
            "sample.py", "--ckpt", checkpoint, "--sampler", "heun", "--num-sampling-steps", 5,
            "--guidance-interval", 0.2, 0.8, "--cfg-scale", 2, "--captions", "False",
            "--output", tmp_path / "grid.png", "--trajectory", tmp_path / f"trajectory.{suffix}",
        )  # fmt: skip
    strip = Image.open(tmp_path / "trajectory.png")
    assert strip.size == (5 * 18 + 2, 4 * 18 + 2)  # a column for each step, a row for each image
    last = strip.crop((2 + 4 * 18, 2, 18 + 4 * 18, 18))
    image = Image.open(tmp_path / "grid.png").crop((2, 2, 18, 18))
    difference = np.asarray(last, dtype=int) - np.asarray(image, dtype=int)
    assert abs(difference).max() <= 1  # the last prediction of the data is the image
    assert Image.open(tmp_path / "trajectory.gif").n_frames == 5


def test_routing_is_not_counted_of_a_sampler_with_two_calls_a_step(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--sampler: got heun, which calls the model more than"):
        call_main(
            "expert_data.py", "--ckpt", checkpoint, "--sampler", "heun",
            "--output", tmp_path / "counts.npz",
        )  # fmt: skip
