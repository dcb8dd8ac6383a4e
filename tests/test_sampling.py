"""sample.py as its users run it, and what generation promises of seeds and precision."""

import argparse
from pathlib import Path

import pytest
import torch
from conftest import call_main, expect_error, relative_error, run_script
from PIL import Image
from test_models import randomised

from checkpoints import Record, save_model
from diffusion import create_diffusion
from models import DiT, DiT_models
from runtime.errors import UserError
from sampling.generate import generate

OBJECTIVES = ("gaussian", "rectified_flow")


def randomised_preset() -> DiT:
    torch.manual_seed(0)
    model = DiT_models["DiT-Ti/2"](input_size=8, num_classes=4, num_experts=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def published_layout(model: DiT) -> dict[str, torch.Tensor]:
    """A state dict as the published training script stores it: one linear layer per expert."""
    published = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            prefix = name.rsplit(".", 1)[0]
            for expert, weight in enumerate(value):
                if name.endswith("down_proj"):
                    published[f"{prefix}.{expert}.down_proj.weight"] = weight.clone()
                else:
                    gate, up = weight.chunk(2)
                    published[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
                    published[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
        else:
            published[name] = value
    return published


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_vae) -> dict[str, Path]:
    """The same weights as our own checkpoint of each objective, and as a published file."""
    folder, model = tmp_path_factory.mktemp("checkpoints"), randomised_preset()
    paths = {"published": folder / "published.pt"}
    info = {
        "image_size": 16, "vae_path": str(tiny_vae), "model": "DiT-Ti/2",
        "class_names": ("ape", "bee", "cat", "dog"),
    }  # fmt: skip
    for objective in OBJECTIVES:
        paths[objective] = folder / f"{objective}.safetensors"
        record = Record(config=model.config, objective=objective, **info)
        save_model(paths[objective], model.state_dict(), record)
    weights = published_layout(model)
    torch.save(
        {
            "model": {name: torch.zeros_like(value) for name, value in weights.items()},
            "ema": weights,
            "opt": {},
            "args": argparse.Namespace(model="DiT-Ti/2", num_experts=4, num_experts_per_tok=2),
        },
        paths["published"],
    )
    return paths


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_alone_is_enough(checkpoints, objective, tmp_path, capsys):
    call_main(
        "sample.py", "--ckpt", checkpoints[objective], "--output", tmp_path / "grid.png",
        "--output-dir", tmp_path / "images", "--num-sampling-steps", 4, "--captions", False,
    )  # fmt: skip
    assert Image.open(tmp_path / "grid.png").size == (4 * 18 + 2, 20)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{i:06d}-class-{i:04d}.png" for i in range(4)]
    assert ("ddpm" if objective == "gaussian" else "euler") + " 4 steps" in capsys.readouterr().out


def test_the_published_command_gives_the_same_images_from_published_weights(
    checkpoints, tiny_vae, tmp_path
):
    common = ("--cfg-scale", 1.5, "--num-sampling-steps", 4, "--class-labels", 3, 1)
    common += ("--captions", False)  # which the published file has no names for
    run_script(
        "sample.py", "--model", "DiT-Ti/2", "--ckpt", checkpoints["published"],
        "--vae-path", tiny_vae, "--image-size", 16, "--num_experts", 4, *common,
        "--output", tmp_path / "published.png",
    )  # fmt: skip
    call_main(
        "sample.py", "--ckpt", checkpoints["gaussian"], *common, "--output", tmp_path / "own.png"
    )
    assert (tmp_path / "published.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_labels_may_be_names(checkpoints, tmp_path):
    for name, labels in (("names", ("cat", "ape")), ("numbers", (2, 0))):
        call_main(
            "sample.py", "--ckpt", checkpoints["rectified_flow"], "--num-sampling-steps", 2,
            "--class-labels", *labels, "--output", tmp_path / f"{name}.png",
        )  # fmt: skip
    assert (tmp_path / "names.png").read_bytes() == (tmp_path / "numbers.png").read_bytes()


def pixels(path: Path) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(Image.open(path)).astype(int))


def test_an_image_depends_on_its_seed_and_label_alone(checkpoints, tmp_path):
    common = ("--ckpt", checkpoints["gaussian"], "--num-sampling-steps", 5, "--cfg-scale", 2)
    for name, arguments in (
        ("together", ("--class-labels", 0, 1, 2, 3, "--seed", 10)),
        ("two by two", ("--class-labels", 0, 1, 2, 3, "--seed", 10, "--batch-size", 2)),
        ("alone", ("--class-labels", 2, "--seed", 12)),
    ):
        call_main(
            "sample.py", *common, *arguments, "--output", tmp_path / "grid.png",
            "--output-dir", tmp_path / name,
        )  # fmt: skip
    for other in ("two by two", "alone"):
        for path in (tmp_path / other).iterdir():
            difference = pixels(path) - pixels(tmp_path / "together" / path.name)
            assert difference.abs().max() <= 1, path.name
    first, second = sorted((tmp_path / "together").iterdir())[:2]
    assert (pixels(first) != pixels(second)).any()


BAD_FLAGS = [
    (("--class-labels", "fox"), "--class-labels: got fox, expected 0 to 3 or one of ape"),
    (("--class-labels", "4"), "--class-labels: got 4, expected 0 to 3"),
    (("--model", "DiT-S/2"), "another model: the flags say hidden_size 384, the checkpoint 128"),
    (("--num_experts", "8"), "another model: the flags say num_experts 8, the checkpoint 4"),
    (("--image-size", "64"), "--image-size: got 64, expected 16"),
    (("--rf", "True"), "--rf: got True, but"),
    (("--sampler", "euler"), "--sampler: got euler, expected one of ddpm, ddim"),
    (("--num-sampling-steps", "2000"), "--num-sampling-steps: got 2000, expected at most 1000"),
    (("--vae-path", "/nowhere"), "--vae-path: got /nowhere"),
    (("--output", "/dev/null/x/grid.png"), "--output: cannot write"),
    (("--output", "grid.jpg"), "--output: got grid.jpg, expected a name that ends in .png"),
    (("--seed", "5000000000"), "--seed: got an image seed of 5000000000"),
    (("--guided-channels", "9"), "--guided-channels: got 9, expected 1 to 4, or all"),
    (("--cfg-scale", "nan"), "--cfg-scale: got nan, expected a number"),
    (("--ckpt", "/nowhere"), "/nowhere: no such file or folder"),
]


@pytest.mark.parametrize("arguments, message", BAD_FLAGS, ids=[m for _, m in BAD_FLAGS])
def test_bad_input_is_one_line_and_exit_code_2(checkpoints, tmp_path, arguments, message, capsys):
    common = ("--ckpt", checkpoints["gaussian"], "--num-sampling-steps", 2)
    output = ("--output", tmp_path / "grid.png")
    assert message in expect_error(capsys, "sample.py", *common, *output, *arguments)
    assert not (tmp_path / "grid.png").exists()


def test_a_mistake_ends_the_process_with_one_line_and_exit_code_2():
    result = run_script("sample.py", "--ckpt", "/nowhere", check=False)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_rf_obeys_guidance_and_steps():
    model, calls = randomised_preset().eval(), []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    common = dict(labels=[1], seeds=[0], objective="rectified_flow", num_steps=7)
    plain = generate(model, **common)
    assert calls == [1] * 7
    calls.clear()
    guided = generate(model, **common, cfg_scale=3.0)
    assert calls == [2] * 7  # conditional and unconditional in one pass
    assert relative_error(guided, plain) > 1e-3


def test_a_model_without_label_dropout_refuses_guidance():
    model = randomised().eval()
    with pytest.raises(UserError, match="--cfg-scale: got 3.0, expected 1"):
        generate(model, [1], [0], objective="rectified_flow", cfg_scale=3.0)


def relative_error_of(dtype: torch.dtype, objective: str) -> float:
    def latents(model: DiT) -> torch.Tensor:
        return generate(
            model.eval(), [1, 3], [0, 1], objective=objective, num_steps=50, cfg_scale=1.5
        )

    return relative_error(latents(randomised_preset().to(dtype)), latents(randomised_preset()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fp16_stays_within_two_percent_over_fifty_steps(objective):
    assert 0 < relative_error_of(torch.float16, objective) < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sampler_state_is_fp32_whatever_the_model(objective):
    states = []
    latents = generate(
        randomised_preset().to(torch.bfloat16).eval(),
        [0],
        [0],
        objective=objective,
        num_steps=2,
        callback=lambda state: states.append(state["x"].dtype),
    )
    assert states == [torch.float32] * 2 and latents.dtype == torch.float32


def test_guided_sampling_equals_the_models_own_guided_forward():
    """Two ways to guide: diffusion's on any callable, and DiT.forward_with_cfg as published."""
    model = randomised_preset().eval()
    got = generate(
        model, [1, 2], [5, 6], objective="gaussian", sampler="ddim", num_steps=4, cfg_scale=3.0,
        guided_channels=3,
    )  # fmt: skip
    from diffusion import PerImageNoise

    z = PerImageNoise([5, 6]).randn((4, 8, 8))
    y = torch.tensor([1, 2, 4, 4])
    want = create_diffusion("4").ddim_sample_loop(
        model.forward_with_cfg,
        (4, 4, 8, 8),
        torch.cat([z, z]),
        clip_denoised=False,
        model_kwargs={"y": y, "cfg_scale": 3.0},
    )[:2]
    assert relative_error(got, want) < 1e-5
