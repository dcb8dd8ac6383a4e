"""Images generated for evaluation: equal on any number of processes and after an interruption."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    assert_same_values,
    call_main,
    main_in_processes,
    save_checkpoint,
)
from test_models import randomised
from test_sampling import NAMES, randomised_preset

from evaluate import EvaluateConfig, results_folder
from evaluation.image_sets import read_image
from evaluation.sampled_images import sample_labels
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate

COMMON = ("--backbone", "efficientnet-lite0", "--sampler", "euler", "--cfg-scale", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_vae) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "flow.safetensors"
    facts = dict(image_size=16, vae_path=str(tiny_vae), model="DiT-Ti/2", class_names=NAMES)
    model = randomised(num_classes=4, num_experts=4, class_dropout_prob=0.1, **SMALL)
    return save_checkpoint(model, path, objective="rectified_flow", **facts)


def command(checkpoint: Path, output: Path, *arguments) -> list:
    return [
        "evaluate.py", "--ckpt", checkpoint, "--output", output, "--num-images", 24,
        "--num-sampling-steps", 4, *COMMON, *arguments,
    ]  # fmt: skip


def images_in(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: read_image(path) for path in sorted((folder / "images").glob("*.png"))}


@pytest.fixture(scope="module")
def single(checkpoint, tmp_path_factory) -> Path:
    """Evaluation folder of one process that generates in batches of 6."""
    folder = tmp_path_factory.mktemp("single")
    call_main(*command(checkpoint, folder, "--batch-size", 6))
    return folder


def test_evaluation_results_store_settings_checksums_and_samples(single):
    settings = json.loads((single / "results.json").read_text())["settings"]
    expected = dict(sampler="euler", num_steps=4, cfg_scale=2, guidance_interval=[0, 1], seed=0)
    assert settings == {**settings, **expected, "precision": "float32"}
    assert len(settings["checkpoint_sha256"]) == len(settings["vae_sha256"]) == 64
    assert settings["images"]["num_images"] == 24
    images = images_in(single)
    assert [name[-8:-4] for name in images] == [f"{i % 4:04d}" for i in range(24)]
    with np.load(single / "samples.npz") as file:
        stored = torch.from_numpy(file["arr_0"])  # (N, H, W, 3)
    assert torch.equal(stored, torch.stack([*images.values()]).permute(0, 2, 3, 1))


def test_evaluation_generates_the_same_images_as_sample_py(single, checkpoint, tmp_path):
    call_main(
        "sample.py", "--ckpt", checkpoint, "--num-sampling-steps", 4, *COMMON[2:],
        "--class-labels", 0, 1, 2, 3, "--batch-size", 6, "--seed", 4,
        "--output", tmp_path / "grid.png", "--output-dir", tmp_path,
    )  # fmt: skip
    for seed in range(4, 8):
        name = f"{seed:06d}-class-{seed % 4:04d}.png"
        (drawn,) = tmp_path.glob(f"{name.removesuffix('.png')}*.png")  # sample.py adds class names
        difference = read_image(drawn).int() - read_image(single / "images" / name).int()
        assert difference.abs().max() <= 1


def test_two_processes_generate_the_images_of_one_process(single, checkpoint, image_tree, tmp_path):
    """Each process passes its batches of images and of the reference through the backbone."""
    scored = ("--batch-size", 6, "--reference", image_tree, "--resize", 16, "--kid-subset-size", 20)
    main_in_processes(*command(checkpoint, tmp_path / "two", *scored))
    assert_same_values(images_in(tmp_path / "two"), images_in(single))
    shutil.copytree(single, tmp_path / "one")
    call_main(*command(checkpoint, tmp_path / "one", *scored))
    folders = [tmp_path / "one", tmp_path / "two"]
    one, two = ((folder / "samples.npz").read_bytes()[-9000:] for folder in folders)
    assert one == two
    one, two = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert one["metrics"] and one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert one["settings"] == two["settings"]  # these include digests of pixels and reference


def test_an_interrupted_evaluation_generates_only_the_missing_images(single, checkpoint, tmp_path):
    """The state after a kill: some images, one under its temporary name, and no results."""
    shutil.copytree(single, tmp_path / "run")
    written = sorted((tmp_path / "run" / "images").iterdir())
    for path in written[8:]:
        path.unlink()
    written[8].with_suffix(".tmp").write_bytes(b"half an image")
    before = {path: path.stat().st_mtime_ns for path in written[:8]}
    for name in ("results.json", "samples.npz"):
        (tmp_path / "run" / name).unlink()
    call_main(*command(checkpoint, tmp_path / "run", "--batch-size", 6))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_same_values(images_in(tmp_path / "run"), images_in(single))
    assert (tmp_path / "run" / "results.json").read_text() == (single / "results.json").read_text()


def test_evaluate_rejects_a_folder_with_other_settings(single, checkpoint, tmp_path):
    with pytest.raises(UserError, match="seed: got 1, expected 0"):
        call_main(*command(checkpoint, single, "--seed", 1))
    with pytest.raises(UserError, match="--sampler: has no effect with --loss"):
        call_main(*command(checkpoint, tmp_path / "out", "--loss"))
    with pytest.raises(UserError, match="held-out images: pass exactly one of"):
        call_main("evaluate.py", "--ckpt", checkpoint, "--loss", "--output", tmp_path / "out")


def test_evaluate_names_the_step_of_a_run_that_it_takes(single, checkpoint, tmp_path, capsys):
    for step in ("0000002", "0000012"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        shutil.copy(checkpoint, tmp_path / "checkpoints" / step / "model.safetensors")
    with pytest.raises(UserError, match="seed: got 1"):  # the folder is of another evaluation
        call_main(*command(tmp_path, single, "--seed", 1))
    assert f"{tmp_path}: evaluating step 12\n" in capsys.readouterr().out


def test_the_default_evaluation_folder_is_named_by_the_run_and_the_settings(tmp_path):
    ckpt = str(tmp_path / "my.run" / "checkpoints" / "0000002")
    changes = {}, {"num_images": 9}, {"reference": Path("a.npz")}, {"kid_subset_size": 9}
    configs = [EvaluateConfig(ckpt=ckpt, **change) for change in changes]
    names = [results_folder(config, {"seed": 0}).name for config in configs]
    assert len(set(names)) == 4 and all(name.startswith("evaluation-my.run-") for name in names)


@pytest.mark.parametrize("label", [-1, 4])
def test_sampling_rejects_labels_out_of_range(label):
    """With 4 classes, label 4 is the "no class" row of the table and would not raise by itself."""
    settings = SamplerSettings("rectified_flow", num_steps=1)
    with pytest.raises(UserError, match=f"labels: got {label}, expected 0 to 3"):
        generate(randomised_preset(), [0, label], [0, 1], settings)


def test_evaluation_labels_cycle_through_the_classes_or_are_random():
    assert sample_labels("equal", 10, 4, 0) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    labels = sample_labels("random", 1000, 4, 0)
    assert labels == sample_labels("random", 1000, 4, 0) != sample_labels("random", 1000, 4, 1)
    counts = [labels.count(label) for label in range(4)]
    assert all(200 < count < 300 for count in counts) and len(set(counts)) > 1
