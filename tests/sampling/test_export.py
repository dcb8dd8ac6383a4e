"""Export: every format preserves the weights, and the pipeline generates sample.py's images."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from helpers import (
    SMALL,
    assert_same_values,
    call_main,
    expect_error,
    save_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file
from test_layouts import DENSE
from test_models import randomised, resolved
from test_sampling import randomised_preset

from checkpoints import Checkpoint, Record, load_model, read_checkpoint
from options.parts import Word
from routers import ROUTERS
from sampling.formats import model_card

NAMES = ("ape", "bee", "cat", "dog")
DRAW = ("--class-labels", "cat", 0, "bee", "--seed", 5, "--cfg-scale", 2, "--num-sampling-steps", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_vae) -> dict[str, Path]:
    """Checkpoints of a sparse model with the record of a run, one per objective."""
    folder, model = tmp_path_factory.mktemp("trained"), randomised_preset(**SMALL)
    spans = randomised_preset(**SMALL, conditions=("label", "span"))
    facts = {
        "step": 70, "model": "DiT-Ti/2", "image_size": 16, "vae_path": str(tiny_vae),
        "class_names": NAMES, "initialized_from": {"path": "/somewhere/private/weights.pt"},
        "settings": {"lr": 1e-3, "global_batch_size": 8, "data_path": "/somewhere/private"},
    }  # fmt: skip
    paths = {}
    for objective, trained, options in (
        ("gaussian", model, {}), ("rectified_flow", model, {"mean": -0.4}),
        ("mean_flow", spans, {"omega": 0.8, "kappa": 0.5}),
    ):  # fmt: skip
        values = {**facts, "objective": Word(objective, options)}
        paths[objective] = save_checkpoint(trained, folder / f"{objective}.safetensors", **values)
    return paths


def export(path: Path, output: Path, *arguments) -> Path:
    call_main("export.py", "--ckpt", path, "--output", output, "--samples", 0, *arguments)
    return output


def assert_same_weights(a: Checkpoint, b: Checkpoint) -> None:
    assert resolved(a.config) == resolved(b.config)
    assert_same_values(a.state_dict, b.state_dict)


@pytest.mark.parametrize("format", ["safetensors", "published", "pipeline"])
def test_an_exported_model_is_read_back_unchanged(trained, format, tiny_vae, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"fid": 12.5}}))
    flags = ("--format", format, "--scores", tmp_path / "results.json")
    before = os.umask(0o022)
    try:
        out = export(trained["rectified_flow"], tmp_path / "out", *flags)
    finally:
        os.umask(before)
    got, want = read_checkpoint(out), read_checkpoint(trained["rectified_flow"])
    assert_same_weights(got, want)
    if format != "published":
        assert got.record.objective == want.record.objective
    assert got.record.objective.name == "rectified_flow" and got.record.class_names == NAMES
    vae = AutoencoderKL.from_pretrained(out / "vae")
    first = load_file(tiny_vae / "diffusion_pytorch_model.safetensors")
    assert_same_values(vae.state_dict(), first)
    card = (out / "README.md").read_text()
    assert "| fid | 12.5 |" in card and "| steps trained | 70 |" in card
    for file in filter(Path.is_file, out.rglob("*")):
        content = file.read_bytes()
        assert b"/somewhere/private" not in content and bytes(tiny_vae) not in content, file
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_the_path_of_an_autoencoder_that_is_gone_is_not_exported(tmp_path, capsys):
    source = tmp_path / "source.safetensors"
    save_checkpoint(randomised(**DENSE), source, vae_path="/somewhere/private/vae")
    out = export(source, tmp_path / "out")
    assert "/somewhere/private/vae does not exist, so the export has no" in capsys.readouterr().out
    assert b"/somewhere/private" not in (out / "model.safetensors").read_bytes()
    assert not (out / "vae").exists()


def test_export_in_half_precision_halves_the_file_and_rounds_the_weights(trained, tmp_path):
    path = trained["gaussian"]
    (tmp_path / ".bf16.writing").mkdir()
    (tmp_path / ".bf16.writing" / "half").touch()  # left by an export that was killed
    folders = [export(path, tmp_path / name, "--precision", name) for name in ("fp32", "bf16")]
    whole, half = (load_model(folder).state_dict() for folder in folders)
    for name, value in whole.items():
        is_exact = name == "pos_embed" or ".moe.gate." in name
        assert half[name].equal(value if is_exact else value.bfloat16().float()), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[1] < 0.55 * sizes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"fp32", "bf16"}
    assert not (tmp_path / "bf16" / "half").exists()


def test_an_exported_folder_includes_its_autoencoder_and_sample_images(trained, tiny_vae, tmp_path):
    call_main("sample.py", "--ckpt", trained["gaussian"], *DRAW, "--output", tmp_path / "want.png")
    vae = shutil.copytree(tiny_vae, tmp_path / "vae")
    flags = ("--vae-path", vae, "--samples", 3, "--num-sampling-steps", 2)
    out = export(trained["gaussian"], tmp_path / "out", *flags)
    assert Image.open(out / "samples.png").width > 3 * 16
    assert "(samples.png)" in (out / "README.md").read_text()
    shutil.rmtree(vae)
    moved = out.rename(tmp_path / "moved")
    call_main("sample.py", "--ckpt", moved, *DRAW, "--output", tmp_path / "got.png")
    assert (tmp_path / "got.png").read_bytes() == (tmp_path / "want.png").read_bytes()


def test_a_model_card_escapes_hostile_names():
    config = randomised_preset().config
    hostile = "<script>x</script>|\n\n# Free\x1b[2J [money](http://x)"
    record = Record(
        config=config, class_names=(hostile, *"abc"), initialized_from={"path": hostile}
    )
    checkpoint = Checkpoint(Path("x"), {}, record)
    card = model_card(checkpoint, "name", "pipeline", {"fid": 1.5}, "").split("## Usage")[0]
    assert not re.search(r"<script|\n# Free|\x1b|\[money", card)
    assert all(line.count("|") == 3 for line in card.splitlines() if line.startswith("|"))
    assert "script" in card and "| fid | 1.5 |" in card


PIPELINE_PROGRAM = """
import sys
import torch
from diffusers import AutoModel, DiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(5, 8)]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    images = pipeline(["Cat", 0, "bee"], generator=generators, **options).images
    for seed, image in zip(range(5, 8), images):
        image.save(f"{folder}/drawn-{seed}.png")
pipeline.save_pretrained(f"{folder}-saved")
again = DiffusionPipeline.from_pretrained(f"{folder}-saved", trust_remote_code=True)
drawn = [
    p([1, 2], generator=torch.Generator().manual_seed(7), num_inference_steps=1, output_type=t)
    for p, t in ((pipeline, "np"), (again, "pt"))
]
assert (drawn[0].images == drawn[1].images.permute(0, 2, 3, 1).numpy()).all()
transformer = AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True)
inputs = torch.ones(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([1])
with torch.no_grad():
    assert torch.equal(transformer(*inputs).sample, pipeline.transformer(*inputs).sample)
"""


def test_an_exported_pipeline_generates_the_same_images_as_sample_py(trained, tmp_path):
    """The pipeline is loaded in a process without access to this repository."""
    paths = {name: trained[name] for name in ("gaussian", "rectified_flow")}
    folders = [export(paths[name], tmp_path / name, "--format", "pipeline") for name in paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "hf")}
    environment.pop("PYTHONPATH", None)
    (tmp_path / "program.py").write_text(PIPELINE_PROGRAM)
    result = subprocess.run(
        [sys.executable, tmp_path / "program.py", *folders],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for folder, path in zip(folders, paths.values(), strict=True):
        output = ("--output", tmp_path / "grid.png", "--output-dir", folder / "images")
        call_main("sample.py", "--ckpt", path, *DRAW, *output)
        drawn = sorted((folder / "images").iterdir())
        for seed, want in zip(range(5, 8), drawn, strict=True):
            got = np.asarray(Image.open(folder / f"drawn-{seed}.png")).astype(int)
            assert np.abs(got - np.asarray(Image.open(want))).max() <= 1


def test_a_model_of_pixels_is_exported_without_an_autoencoder(train_flags, tmp_path, monkeypatch):
    (tmp_path / "pixels").mkdir()  # a folder of this name changes nothing
    monkeypatch.chdir(tmp_path)
    flags = {"vae-path": "pixels", "patch-size": 8, "objective": "flow_x", "run-name": "run"}
    for steps in (1, 2):  # the second command resumes
        call_main("train.py", *train_flags(tmp_path, **flags, **{"max-steps": steps}))
    assert read_checkpoint("run").record.step == 2
    names = "run", "safetensors", "pipeline"
    for format in names[1:]:
        out = export(tmp_path / "run", tmp_path / format, "--format", format)
        assert not (out / "vae").exists()
    draw = ("--num-sampling-steps", 2, "--class-labels", 0, 1)
    for name in names:
        call_main("sample.py", "--ckpt", tmp_path / name, *draw, "--output-dir", f"{name}-images")
    want, *others = (sorted(Path(f"{name}-images").iterdir()) for name in names)
    for got in others:
        assert [path.read_bytes() for path in got] == [path.read_bytes() for path in want]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    drawn = pipeline([0, 1], num_inference_steps=2, output_type="np").images
    assert np.abs(drawn[0] - np.asarray(Image.open(want[0])) / 255).max() < 2 / 255


def test_a_pipeline_downloaded_from_the_hub_has_all_its_code(trained, tmp_path, monkeypatch):
    """diffusers downloads pipeline.py, the files that it imports, and the file that
    model_index.json names for each component."""
    out = export(trained["gaussian"], tmp_path / "out", "--format", "pipeline")
    snapshot = tmp_path / "snapshot"

    def download(repository: str, name: str, **options) -> str:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(out / name, snapshot / name)

    for name, value in {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "hf_hub_download": download,
        "model_info": lambda *args, **options: SimpleNamespace(sha="0123abc"),
    }.items():
        monkeypatch.setattr(dynamic_modules_utils, name, value)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    dynamic_modules_utils.get_class_from_dynamic_module(
        "lab/model", module_file="pipeline.py", class_name="DiTMoEPipeline", trust_remote_code=True
    )
    assert {path.name for path in out.glob("*.py")} == {path.name for path in snapshot.glob("*.py")}
    for name in ("model_index.json", "scheduler", "vae", "transformer"):  # and its code
        copy = shutil.copytree if (out / name).is_dir() else shutil.copy
        copy(out / name, snapshot / name)
    pipeline = DiffusionPipeline.from_pretrained(snapshot, trust_remote_code=True)
    assert pipeline(["dog"], num_inference_steps=2).images[0].size == (16, 16)
    count = sum(path.is_file() for path in out.rglob("*"))
    assert count == 9 and len([*out.rglob("*.py")]) == 2


def test_models_that_a_format_cannot_express_are_not_exported(
    tmp_path, trained, capsys, monkeypatch
):
    sums = randomised(router="topk:renormalize=True"), tmp_path / "sums.safetensors"
    sums = save_checkpoint(*sums, objective="rectified_flow")
    rotary = save_checkpoint(randomised(**DENSE, rope=True), tmp_path / "rope.safetensors")
    wide = save_checkpoint(randomised(**DENSE, input_size=(8, 32)), tmp_path / "wide.safetensors")
    shifted = save_checkpoint(
        randomised(**DENSE), tmp_path / "shifted.safetensors",
        objective="rectified_flow:shift=3",
    )  # fmt: skip
    for path, flags, message in (
        (sums, ("--format", "published"), "router: got topk:"),
        (rotary, ("--format", "published"), "rope: got True"),
        (trained["mean_flow"], ("--format", "published"), "objective: got mean_flow, expected"),
        (wide, ("--format", "published"), "input_size: got (8, 32), expected a square"),
        (shifted, ("--format", "published"), "shift=3.0, expected 1.0"),
        (sums, ("--format", "pipeline"), "--vae-path: is required"),
        (trained["gaussian"], ("--scores", tmp_path / "none"), "--scores: got"),
        (trained["gaussian"], ("--rf",), "--objective: got rectified_flow, but"),
    ):
        common = ("--ckpt", path, "--output", tmp_path / "out" / str(len(message)))
        assert message in expect_error(capsys, "export.py", *common, *flags)
    monkeypatch.setitem(ROUTERS, "mine", type("Mine", (ROUTERS["topk"],), {}))
    own = save_checkpoint(randomised_preset(router="mine"), tmp_path / "own.safetensors")
    pooled = randomised_preset(router="batch_pool:inference=count")
    pooled = save_checkpoint(pooled, tmp_path / "pooled.safetensors")
    for path, message in ((own, "got mine, expected one of topk"), (pooled, "by the others")):
        common = ("--ckpt", path, "--format", "pipeline", "--vae-path", "pixels", "--output")
        assert message in expect_error(capsys, "export.py", *common, tmp_path / path.stem)
        assert not (tmp_path / path.stem).exists()
