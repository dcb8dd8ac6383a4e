"""Weights out: each format comes back the same, and the pipeline draws what sample.py draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from test_layouts import DENSE
from test_models import randomised
from test_sampling import randomised_preset

import export
import sample
from checkpoints import Record
from checkpoints.checkpoint import Checkpoint, load_model, read_checkpoint, save_model
from checkpoints.upcycling import upcycle
from sampling.bundle import bundle

NAMES = ["ape", "bee", "cat", "dog"]


def run_main(script, *arguments) -> None:
    """A script's main in this process, for what needs no process of its own."""
    argv, sys.argv = sys.argv, [script.__name__, *map(str, arguments)]
    try:
        script.main(script.parse_args())
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_vae) -> dict[str, Path]:
    """A sparse model with a run's facts, for each objective."""
    folder, model = tmp_path_factory.mktemp("trained"), randomised_preset()
    paths = {}
    for objective in ("gaussian", "rectified_flow"):
        info = {
            "step": 70, "model": "DiT-Ti/2", "objective": objective, "image_size": 16,
            "vae_path": str(tiny_vae), "class_names": NAMES,
            "settings": {"lr": 1e-3, "global_batch_size": 8, "data_path": "/somewhere/private"},
        }  # fmt: skip
        paths[objective] = folder / f"{objective}.safetensors"
        save_model(paths[objective], model.state_dict(), Record(config=model.config, **info))
    return paths


def assert_same_weights(a: Checkpoint, b: Checkpoint) -> None:
    assert a.config == b.config
    assert a.state_dict.keys() == b.state_dict.keys()
    assert all(torch.equal(a.state_dict[name], b.state_dict[name]) for name in a.state_dict)


@pytest.mark.parametrize("format", ["safetensors", "published", "pipeline"])
def test_what_is_exported_is_read_back_the_same(trained, format, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"fid": 12.5, "precision": {"recall": 0.4}}))
    run_main(
        export, "--ckpt", trained["rectified_flow"], "--output", tmp_path / "out",
        "--format", format, "--scores", tmp_path / "scores.json",
    )  # fmt: skip
    path = tmp_path / "out" / ("model.pt" if format == "published" else "")
    got, want = read_checkpoint(path), read_checkpoint(trained["rectified_flow"])
    assert_same_weights(got, want)
    assert got.record.objective == "rectified_flow" and got.record.class_names == tuple(NAMES)
    if format == "pipeline":
        vae = AutoencoderKL.from_pretrained(got.record.vae_path)
        first = load_file(Path(want.record.vae_path) / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(vae.state_dict()[name], value) for name, value in first.items())
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| fid | 12.5 |", "| precision.recall | 0.4 |", "after 70 steps", "ape, bee"):
        assert line in card
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"/somewhere/private" not in file.read_bytes(), file


def test_a_dense_model_is_exported_as_the_official_dit(tmp_path):
    model = randomised(**DENSE)
    save_model(tmp_path / "dense.safetensors", model.state_dict(), Record(config=model.config))
    run_main(
        export, "--ckpt", tmp_path / "dense.safetensors", "--output", tmp_path / "official",
        "--format", "published",
    )  # fmt: skip
    stored = torch.load(tmp_path / "official" / "model.pt", weights_only=True)
    assert stored["ema"].keys() == model.state_dict().keys()


PIPELINE_PROGRAM = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["cat", 0, "bee"], seed=5, num_inference_steps=3, guidance_scale=2.0).images
    for seed, image in zip(range(5, 8), images):
        image.save(f"{folder}/drawn-{seed}.png")
"""


def test_the_pipeline_draws_what_sample_py_draws(trained, tmp_path):
    """Loaded in a process that cannot see this repository."""
    folders = []
    for objective, path in trained.items():
        folders.append(tmp_path / objective)
        run_main(export, "--ckpt", path, "--output", folders[-1], "--format", "pipeline")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "hf")}
    environment.pop("PYTHONPATH", None)
    program = tmp_path / "program.py"
    program.write_text(PIPELINE_PROGRAM)
    result = subprocess.run(
        [sys.executable, program, *folders],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for folder, path in zip(folders, trained.values(), strict=True):
        run_main(
            sample, "--ckpt", path, "--class-labels", "cat", 0, "bee", "--seed", 5,
            "--cfg-scale", 2, "--num-sampling-steps", 3, "--output", tmp_path / "grid.png",
            "--output-dir", tmp_path / f"{folder.name}-images",
        )  # fmt: skip
        drawn = sorted((tmp_path / f"{folder.name}-images").iterdir())
        assert len(drawn) == 3
        for seed, want in zip(range(5, 8), drawn, strict=True):
            got = np.asarray(Image.open(folder / f"drawn-{seed}.png")).astype(int)
            assert np.abs(got - np.asarray(Image.open(want))).max() <= 1


def test_dense_to_upcycled_to_trained_to_exported_to_pipeline(tmp_path, tiny_vae):
    """The whole way, with a training step in between; the pipeline here, beside the repository."""
    from diffusers import DiffusionPipeline

    dense = randomised(**DENSE, num_classes=4)
    state_dict, config = upcycle(dense.state_dict(), dense.config, num_experts=4)
    save_model(tmp_path / "sparse.safetensors", state_dict, Record(config=config))
    sparse = load_model(tmp_path / "sparse.safetensors").train()
    x = torch.randn(4, 4, 8, 8)
    prediction, aux_loss = sparse(x, torch.rand(4), torch.arange(4))
    (prediction[:, :4].sub(x).square().mean() + aux_loss).backward()
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()
    info = {"objective": "rectified_flow", "class_names": NAMES, "vae_path": str(tiny_vae)}
    save_model(
        tmp_path / "trained.safetensors", sparse.state_dict(), Record(config=sparse.config, **info)
    )
    run_main(
        export, "--ckpt", tmp_path / "trained.safetensors", "--output", tmp_path / "out",
        "--format", "pipeline",
    )  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    got = pipeline.transformer.model.eval()
    inputs = (x[:2], torch.tensor([0.1, 0.9]), torch.tensor([1, 4]))
    with torch.no_grad():
        assert relative_error(got(*inputs)[0], sparse.eval()(*inputs)[0]) < 1e-6
    assert pipeline(["dog"], num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="class label: got fox, expected a number or one of ape"):
        pipeline(["fox"])
    assert_same_weights(
        read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "trained.safetensors")
    )


def test_a_bundle_refuses_two_definitions_of_one_name():
    with pytest.raises(ValueError, match="defined in moe.py and in moe.py"):
        bundle("moe.py", "moe.py")


def test_pushing_is_a_dry_run_unless_asked_and_says_when_it_fails(trained, tmp_path, capsys):
    common = ("--ckpt", trained["gaussian"], "--push-to", "lab/model")
    run_main(export, *common, "--output", tmp_path / "dry")
    said = capsys.readouterr().out
    assert "dry run: would push 3 files" in said and "model.safetensors" in said
    with pytest.raises(SystemExit) as stopped:
        run_main(export, *common, "--output", tmp_path / "wet", "--dry-run", "False")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--push-to lab/model: not pushed, the files are in" in said and said.count("\n") == 1


def test_what_a_format_cannot_say_is_one_line(tmp_path, trained, capsys):
    dense = randomised(**DENSE)
    state_dict, config = upcycle(dense.state_dict(), dense.config, num_experts=4)
    save_model(tmp_path / "up.safetensors", state_dict, Record(config=config))
    for arguments, message in (
        (
            ("--ckpt", tmp_path / "up.safetensors", "--format", "published"),
            "renormalize_top_k: got",
        ),
        (
            ("--ckpt", tmp_path / "up.safetensors", "--format", "pipeline"),
            "--vae-path: got nothing",
        ),
        (("--ckpt", trained["gaussian"], "--push-to", "lab"), "--push-to: got 'lab', expected OWN"),
        (
            ("--ckpt", trained["gaussian"], "--push-to", ""),
            "--push-to: got '', expected OWN",
        ),
        (("--ckpt", trained["gaussian"], "--scores", tmp_path / "none"), "--scores: cannot read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(export, *arguments, "--output", tmp_path / "out" / str(len(message)))
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
