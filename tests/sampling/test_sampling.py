"""sample.py and the Python pipeline: seeds, labels, guidance, precision, pictures and errors."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, relative_error, save_checkpoint
from PIL import Image, ImageFont
from test_models import randomised

from analysis.pictures import Trajectory
from checkpoints import config_of, load_model
from checkpoints.published import to_published
from diffusion import PerImageNoise, create_diffusion
from latents.fonts import FONT
from latents.image_grid import class_captions, image_grid
from models import DiT
from runtime.errors import UserError, run_main
from runtime.progress import progress
from sampling.generate import SamplerSettings, generate, parse_labels, resolve_settings
from sampling.pipeline import choose_precision, open_pipeline
from sampling.sampling_config import SamplingConfig

NAMES = ("ape", "Bee", "cat", "dog")
OBJECTIVES = ("gaussian", "rectified_flow")


def randomised_preset(**fields) -> DiT:
    sizes = dict(input_size=8, num_classes=4, num_experts=4)
    return randomised(0.02, **vars(config_of("DiT-Ti/2", **sizes, **fields)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_vae) -> dict[str, Path]:
    """The same weights as a checkpoint in our format for each objective and as a published file."""
    folder, model = tmp_path_factory.mktemp("checkpoints"), randomised_preset()
    paths = {"published": folder / "published.pt"}
    facts = dict(image_size=16, vae_path=str(tiny_vae), model="DiT-Ti/2", class_names=NAMES)
    for objective in OBJECTIVES:
        path = folder / f"{objective}.safetensors"
        paths[objective] = save_checkpoint(model, path, objective=objective, **facts)
    weights = to_published(model.state_dict(), model.config)
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    args = argparse.Namespace(model="DiT-Ti/2", num_experts=4, num_experts_per_tok=2)
    torch.save({"model": zeros, "ema": weights, "opt": {}, "args": args}, paths["published"])
    return paths


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sample_py_needs_only_a_checkpoint(checkpoints, objective, tmp_path, capsys):
    call_main(
        "sample.py", "--ckpt", checkpoints[objective], "--output", tmp_path / "new" / "grid.png",
        "--output-dir", tmp_path / "images", "--num-sampling-steps", 4,
        "--trajectory", tmp_path / "steps.png", "--batch-size", 3,
    )  # fmt: skip
    assert Image.open(tmp_path / "new" / "grid.png").width > 4 * 18
    width, height = Image.open(tmp_path / "steps.png").size  # the first batch, enlarged 7 times
    assert width > 4 * 112 and 3 * 112 < height < 4 * 112
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{i:06d}-class-{i:04d}-{name}.png" for i, name in enumerate(NAMES)]
    sampler = "ddpm" if objective == "gaussian" else "euler"
    assert f": {sampler} 4 steps" in capsys.readouterr().out.splitlines()[1]


def test_pictures_of_many_images_show_some_of_every_class(checkpoints, tmp_path, capsys):
    call_main(
        "sample.py", "--ckpt", checkpoints["rectified_flow"], "--num-sampling-steps", 2,
        "--images-per-class", 6, "--output", tmp_path / "grid.png",
        "--trajectory", tmp_path / "steps.gif", "--experts", tmp_path / "experts.gif",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "steps.gif shows 16 of 24 images" in out and "experts.gif shows 4 of 24 images" in out
    picture = Trajectory(num_steps=1)
    picture(
        {"step": 0, "t": torch.ones(24), "pred_xstart": torch.arange(24.0)[:, None, None, None]}
    )
    assert len(picture.shown) == 16 and {i // 6 for i in picture.shown} == {0, 1, 2, 3}
    assert picture.frames[0][1].flatten().tolist() == picture.shown


def test_the_published_command_samples_published_weights(checkpoints, tiny_vae, tmp_path):
    common = ("--cfg-scale", 1.5, "--num-sampling-steps", 4, "--class-labels", 3, 1)
    published = ("--model", "DiT-Ti/2", "--vae-path", tiny_vae, "--image-size", 16)
    for name, flags in (("published", (*published, "--num_experts", 4)), ("gaussian", ())):
        output = ("--output", tmp_path / "grid.png", "--output-dir", tmp_path / name)
        call_main("sample.py", "--ckpt", checkpoints[name], *flags, *common, *output)
    folders = (sorted((tmp_path / name).iterdir()) for name in ("published", "gaussian"))
    for ours, theirs in zip(*folders, strict=True):  # file names differ: one has class names
        assert ours.read_bytes() == theirs.read_bytes()


def test_labels_are_class_names_in_any_case_or_numbers():
    assert parse_labels(["Cat", "bee", "BEE", 0, "3"], NAMES) == [2, 1, 1, 0, 3]
    assert parse_labels(["1", 1, "0", 0], ("1", "10", "2")) == [0, 1, 0, 0]


def test_an_unknown_label_is_an_error_that_lists_the_first_20_names():
    for names, message in (
        (
            [f"name-{i}" for i in range(21)],
            r"expected 0 to 20 or one of name-0, .*, name-19, \.\.\.$",
        ),
        (["only"], "got x, expected 0 or only$"),
        (["7", "8"], "got x, expected 0 to 1 or one of 7, 8$"),
    ):
        with pytest.raises(UserError, match=message):
            parse_labels(["x"], names)


def test_a_folder_with_the_images_of_an_earlier_call_is_noted(checkpoints, tmp_path, capsys):
    flags = ("--num-sampling-steps", 1, "--output", tmp_path / "grid.png")
    for labels, is_noted in (("0", "1"), False), (("0",), True):
        call_main(
            "sample.py", "--ckpt", checkpoints["rectified_flow"], *flags, "--class-labels", *labels,
            "--output-dir", tmp_path,
        )  # fmt: skip
        note = f"note: {tmp_path} has 2 images of earlier calls; this call replaces 1 of them"
        out = capsys.readouterr().out
        assert (note in out) == is_noted and "euler 1 step, " in out


def test_sampling_says_what_it_does_and_how_far_it_is(checkpoints, tmp_path, capsys):
    """In a file, the bar is only refreshed every 20 seconds."""
    flags = ("--num-sampling-steps", 20, "--class-labels", 0, "--output", tmp_path / "grid.png")
    call_main("sample.py", "--ckpt", checkpoints["rectified_flow"], *flags)
    output = capsys.readouterr()
    assert re.match(r"loading .*\nsampling 1 image: euler 20 steps, .*\n1 image in .*", output.out)
    first, *between, last = re.findall(r"(\d+)/20 ", output.err)
    assert (first, last) == ("0", "20") and len(between) <= 1


def test_only_the_main_process_has_a_bar(capsys, monkeypatch):
    for rank, shown in (("0", True), ("3", False)):
        monkeypatch.setenv("RANK", rank)
        assert [*progress(range(3), unit="batch")] == [0, 1, 2]
        assert ("3/3" in capsys.readouterr().err) == shown


def test_a_sampled_image_depends_only_on_its_seed_and_label(checkpoints, tmp_path):
    common = ("--ckpt", checkpoints["gaussian"], "--num-sampling-steps", 5, "--cfg-scale", 2)
    for name, arguments in (
        ("batch", ("--class-labels", 0, 1, 2, 3, "--seed", 10)),
        ("pairs", ("--class-labels", 0, 1, 2, 3, "--seed", 10, "--batch-size", 2)),
        ("single", ("--class-labels", 2, "--seed", 12)),
    ):
        output = ("--output", tmp_path / "grid.png", "--output-dir", tmp_path / name)
        call_main("sample.py", *common, *arguments, *output)
    for path in [*(tmp_path / "pairs").iterdir(), *(tmp_path / "single").iterdir()]:
        difference = pixels(path) - pixels(tmp_path / "batch" / path.name)
        assert np.abs(difference).max() <= 1, path.name
    first, second = sorted((tmp_path / "batch").iterdir())[:2]
    assert (pixels(first) != pixels(second)).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sample_py_reproduces_the_sample_grid_of_training(
    objective, train_flags, tmp_path, monkeypatch
):
    """Includes names and layout. 10 images of 4 classes become two images per class.

    The grid of a Gaussian has the steps that it has by default, see `short_previews`.
    """
    steps = 50 if objective == "gaussian" else 4
    if steps == 50:
        monkeypatch.setattr("training.preview.SamplerSettings", SamplerSettings)
    changes = {"num-sample": 10, "max-steps": 4, "lr": 0.03, "global-batch-size": 4}
    flags = train_flags(tmp_path, **changes, rf=objective == "rectified_flow")
    call_main(
        "train.py", *flags, "--run-name=run", "--sample-cfg-scale=4", "--ema=exponential:decay=0.1"
    )
    grid = pixels(tmp_path / "run" / "samples-0000004.png")
    common = ["--ckpt", tmp_path / "run", "--cfg-scale", 4, "--num-sampling-steps", steps]
    common += ["--sampler", "ddim"] if objective == "gaussian" else []

    def draw(*flags) -> np.ndarray:
        call_main("sample.py", *common, *flags, "--output", tmp_path / "g.png")
        return pixels(tmp_path / "g.png")

    assert np.abs(draw("--images-per-class", 2) - grid).max() <= 1
    if objective == "gaussian":
        assert (draw("--images-per-class", 2, "--guided-channels", 2) != grid).any()


BAD_FLAGS = [
    (("--class-labels", "fox"), "--class-labels: got fox, expected 0 to 3 or one of ape"),
    (("--class-labels", "4"), "--class-labels: got 4, expected 0 to 3"),
    (("--class-labels", "caat"), "; did you mean cat?"),
    (("--router", "sigmoid:scale=2"), "router: got sigmoid:scale=2.0, expected topk"),
    (("--router-scale", "2"), "--router sigmoid:scale=VALUE"),
    (("--router-inference", "count"), "--router batch_pool:inference=VALUE"),
    (("--model", "DiT-S/2"), "depth: got 12, expected 6"),
    (("--model", "DiT-S/3"), "--model: got DiT-S/3, expected one of"),
    (("--num_experts", "8"), "different model: num_experts: got 8, expected 4"),
    (("--image-size", "64", "48"), "--image-size 64 x 48: got latents of 32 x 24, expected 8 x 8"),
    (("--rf", "True"), "--objective: got rectified_flow"),
    (("--sampler", "euler"), "--sampler: got euler, expected one of ddpm, ddim"),
    (("--num-sampling-steps", "2000"), "--num-sampling-steps: got 2000, expected 1 to 1000"),
    (("--vae-path", "/nowhere"), "--vae-path: got /nowhere"),
    (("--output", "/dev/null/x/grid.png"), "--output: cannot write"),
    (("--seed", "5000000000"), "--seed: got 5000000000, expected an integer from 0 to"),
    (("--guided-channels", "9"), "--guided-channels: got 9, expected 1 to 4, or all"),
    (("--guidance-interval", "0", "0.5", "--cfg-scale", "1"), "--guidance-interval: has no effect"),
    (("--guided-channels", "3", "--cfg-scale", "1"), "--guided-channels: has no effect without gu"),
    (("--vae-path", "pixels"), "--vae-path pixels: got latents of 16 x 16, expected 8 x 8"),
]


@pytest.mark.parametrize("arguments, message", BAD_FLAGS, ids=[m for _, m in BAD_FLAGS])
def test_wrong_sample_py_arguments_are_one_line_errors(
    checkpoints, tmp_path, arguments, message, capsys
):
    common = ("--ckpt", checkpoints["gaussian"], "--output", tmp_path / "grid.png")
    assert message in expect_error(capsys, "sample.py", *common, *arguments)
    assert not (tmp_path / "grid.png").exists()


def test_class_labels_are_rejected_and_not_drawn_without_the_condition(tiny_vae, tmp_path, capsys):
    model = randomised_preset(conditions=("vector:6",), class_dropout_prob=0.0)
    facts = dict(image_size=16, vae_path=str(tiny_vae), objective="gaussian", class_names=NAMES)
    path = save_checkpoint(model, tmp_path / "model.safetensors", **facts)
    for script in ("sample.py", "expert_data.py"):
        line = expect_error(capsys, script, "--ckpt", path, "--class-labels", "cat")
        assert "--class-labels: has no effect" in line
    assert class_captions(model, NAMES, [0, 1]) == ["", ""]
    assert class_captions(randomised_preset(), NAMES, [0, 1]) == ["ape", "Bee"]


def test_sampling_with_another_autoencoder_than_in_training_is_noted(tiny_vae, tmp_path, capsys):
    model, path = randomised_preset(), tmp_path / "model.safetensors"
    info = {"image_size": 16, "vae_path": str(tiny_vae), "objective": "gaussian"}
    for digest, is_noted in ((None, False), ("0" * 64, True)):
        save_checkpoint(model, path, vae_sha256=digest, **info)
        open_pipeline(SamplingConfig(ckpt=str(path)))
        assert ("note: " in capsys.readouterr().out) == is_noted


def test_what_a_checkpoint_says_cannot_control_the_terminal(tiny_vae, tmp_path, capsys):
    escape = "\x1b]0;x\x07\r\n\x9b2J"
    (tmp_path / f"vae{escape}").symlink_to(tiny_vae)
    facts = dict(
        image_size=16, vae_path=str(tmp_path / f"vae{escape}"), vae_sha256="another",
        objective="gaussian", step=1, ema=f"0.9{escape}", ema_start_share=0.9,
        class_names=[f"{name}{escape}" for name in NAMES],
    )  # fmt: skip
    path = save_checkpoint(randomised_preset(), tmp_path / "forged.safetensors", **facts)
    output = ("--output", tmp_path / "a.png", "--num-sampling-steps", 2)
    call_main("sample.py", "--ckpt", path, *output)
    printed = capsys.readouterr()
    lines = [*printed.out.split("\n"), *re.split("[\r\n]", printed.err)]  # \r of the bar
    assert all(line.isprintable() for line in lines)
    assert any("EMA 0.9?]0;x?" in line for line in lines)
    assert any("differ from the autoencoder" in line for line in lines)


def test_ctrl_c_prints_one_line_and_exits_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_rectified_flow_sampling_uses_the_given_guidance_and_steps():
    model, calls = randomised_preset().eval(), []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    plain, guided = (
        generate(model, [1], [0], SamplerSettings("rectified_flow", None, 7, scale))
        for scale in (1.0, 3.0)
    )
    assert calls == [1] * 7 + [2] * 7  # conditional and unconditional in one pass
    assert relative_error(guided, plain) > 1e-3


def test_guidance_uses_three_or_all_channels_and_requires_label_dropout():
    config, model = randomised_preset().config, randomised().eval()
    assert resolve_settings(SamplerSettings("gaussian"), config).guided_channels == 3
    assert (
        resolve_settings(SamplerSettings("gaussian", guided_channels="all"), config).guided_channels
        == 4
    )
    assert resolve_settings(SamplerSettings("rectified_flow"), config).guided_channels == 4
    assert resolve_settings(SamplerSettings("gaussian"), model.config).cfg_scale == 1
    with pytest.raises(UserError, match="--cfg-scale: got 3.0, expected 1"):
        generate(model, [1], [0], SamplerSettings("rectified_flow", cfg_scale=3.0))


def test_fp16_sampling_differs_from_fp32_by_rounding_over_fifty_steps():
    settings = SamplerSettings("rectified_flow", num_steps=50, cfg_scale=1.5)
    half, full = (
        generate(randomised_preset(depth=2).to(dtype).eval(), [1, 3], [0, 1], settings)
        for dtype in (torch.float16, torch.float32)
    )
    assert 0 < relative_error(half, full) < 3e-4  # with the blocks' outputs in bf16: 4.2e-4


def test_respacing_and_time_shift_settings_are_resolved_and_checked():
    config = randomised_preset().config
    sections = resolve_settings(SamplerSettings("gaussian", num_steps="10,5,3"), config)
    assert (sections.num_steps, sections.respacing) == (18, "10,5,3")
    assert resolve_settings(replace(sections, num_steps=7), config).num_steps == 7
    for wrong, message in (
        (SamplerSettings("gaussian", num_steps="ddim51"), "--num-sampling-steps: .*ddim50"),
        (SamplerSettings("gaussian", num_steps=0), "--num-sampling-steps: got 0, expected 1 to"),
        (SamplerSettings("rectified_flow", num_steps="10,5"), "--num-sampling-steps: got 10,5"),
        (SamplerSettings("gaussian", time_shift=3.0), "--time-shift: has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_settings(wrong, config)


def test_guided_sampling_equals_the_models_forward_with_cfg():
    """Compares classifier_free_guidance with the published DiT.forward_with_cfg."""
    model = randomised_preset().eval()
    got = generate(model, [1, 2], [5, 6], SamplerSettings("gaussian", "ddim", 4, 3.0))
    z = PerImageNoise([5, 6]).randn((4, 8, 8))
    arguments = (model.forward_with_cfg, (4, 4, 8, 8), torch.cat([z, z]))
    model_kwargs = {"y": torch.tensor([1, 2, 4, 4]), "cfg_scale": 3.0}
    sample = create_diffusion("4").ddim_sample_loop
    want = sample(*arguments, clip_denoised=False, model_kwargs=model_kwargs)
    assert relative_error(got, want[:2]) < 1e-5


def test_xl_and_g_are_sampled_in_half_precision_by_default():
    for model, on_cpu, on_gpu in (
        ("DiT-L/2", "fp32", "fp32"), ("DiT-XL/2", "bf16", "fp16"), ("DiT-G/2", "bf16", "fp16"),
    ):  # fmt: skip
        width, (cpu, gpu) = config_of(model).hidden_size, map(torch.device, ("cpu", "cuda"))
        assert choose_precision(None, width, cpu) == on_cpu
        assert choose_precision(None, width, gpu) == on_gpu
        assert choose_precision("fp32", width, gpu) == "fp32"


def test_grid_captions_show_accents_and_are_truncated_to_fit():
    font = ImageFont.truetype(FONT, 12)
    letters = [bytes(font.getmask(letter)) for letter in "éèжф"]
    assert len(set(letters)) == 4  # the font has all four letters
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for images_per_class, names in ((1, "abcd"), (2, "aabb")):
        short = image_grid(images, list(names), images_per_class)
        long = image_grid(images, ["word " * 100, *names[1:]], images_per_class)
        assert short.shape[0] == 3 and short.any()
        assert short.shape[2] < long.shape[2] < 4 * 200


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    return open_pipeline(SamplingConfig(ckpt=checkpoints["rectified_flow"], num_sampling_steps=2))


def test_labels_and_seeds_may_be_lists_tensors_or_arrays(pipeline):
    want = pipeline.latents(["bee", 2], [3, 4])
    for kind in (torch.tensor, np.array, list):
        assert pipeline.latents(kind([1, 2]), kind([3, 4])).equal(want)
    assert pipeline.latents([torch.tensor(1), np.int64(2)], range(3, 5)).equal(want)


def test_settings_of_a_call_may_be_numbers_of_numpy_or_text(pipeline):
    want = pipeline.latents([1], [0], cfg_scale=2.0, steps=3)
    for scale, steps in ((np.float32(2), np.int64(3)), (torch.tensor(2.0), "3"), ("2", 3)):
        assert pipeline.latents([1], [0], cfg_scale=scale, steps=steps).equal(want)


def test_settings_passed_to_one_pipeline_call_do_not_affect_later_calls(checkpoints, pipeline):
    other = dict(sampler="heun", cfg_scale=4.0, guidance_interval=(0.1, 0.9))
    config = SamplingConfig(ckpt=checkpoints["rectified_flow"], num_sampling_steps=3, **other)
    before = pipeline.latents([1], [0])
    want = open_pipeline(config).latents([1], [0])
    assert pipeline.latents([1], [0], **other, steps=3).equal(want)
    assert pipeline.with_settings(sampler="heun").settings.num_steps == 25  # heun's own default
    assert pipeline.latents([1], [0]).equal(before)


BAD_CALLS = {
    "labels: got 1, expected a list": lambda p: p.images(1, [0]),
    "labels: got 'cat', expected a list": lambda p: p.images("cat", [0]),
    "labels: got none": lambda p: p.images([], []),
    "labels: got 1.5, expected 0 to 3": lambda p: p.images([1.5], [0]),
    r"labels: got \[1\], expected 0 to 3": lambda p: p.images([[1]], [0]),
    "seeds: got 0, expected a list": lambda p: p.images([1], 0),
    "seeds: got 2, expected 1": lambda p: p.images([1], [0, 1]),
    "seeds: got 0.5, expected integers": lambda p: p.images([1], torch.tensor([0.5])),
    "seed: got -1, expected an integer from 0": lambda p: p.images([1], [-1]),
    "callback: got 3, expected a function": lambda p: p.images([1], [0], callback=3),
    "conditions: got 'size', expected tensors": lambda p: p.images([1], [0], conditions="size"),
    "steps: given twice": lambda p: p.images([1], [0], steps=3, num_sampling_steps=4),
    "guidance-interval: got 1 0, expected": lambda p: p.images([1], [0], guidance_interval=(1, 0)),
    "guidance_interval: got 1, expected 2 numbers": lambda p: SamplingConfig(
        ckpt="x", guidance_interval=1
    ),
    "image_size: got '32x', expected an integer or 2 integers": lambda p: SamplingConfig(
        ckpt="x", image_size="32x"
    ),
    "got None, expected a path or a hub id": lambda p: load_model(None),
    "cfgscale: unknown setting, expected one of steps": lambda p: p.images([1], [0], cfgscale=2),
    "cfg_scale: got '2x', expected a number": lambda p: p.images([1], [0], cfg_scale="2x"),
    "steps: got 0, expected": lambda p: p.images([1], [0], steps=0),
    "got ddpm, expected one of euler": lambda p: p.images([1], [0], sampler="ddpm"),
    "ckpt: got 3, expected text": lambda p: SamplingConfig(ckpt=3),
    "precision: got 'fp8', expected one of": lambda p: SamplingConfig(ckpt="x", precision="fp8"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_wrong_python_call_raises_a_user_error_at_once(pipeline, message):
    with pytest.raises(UserError, match=message):
        BAD_CALLS[message](pipeline)


def test_a_guide_of_the_same_kind_has_the_router_of_the_flag(tmp_path, tiny_vae):
    """Published files do not record the options of a router, so that flags fill them in."""
    ckpt = str(save_checkpoint(randomised(router="batch_pool"), tmp_path / "model.safetensors"))
    config = SamplingConfig(
        ckpt=ckpt, guide_ckpt=ckpt, vae_path=str(tiny_vae), cfg_scale=2.0,
        router="batch_pool:inference=count",
    )  # fmt: skip
    pipeline = open_pipeline(config)
    for model in (pipeline.model, pipeline.guide):
        assert model.blocks[0].moe.gate.inference == "count"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_one_step_of_the_chain_is_said_to_return_noise(checkpoints, sampler, capsys):
    for steps in (1, 2):
        config = dict(ckpt=checkpoints["gaussian"], sampler=sampler, num_sampling_steps=steps)
        open_pipeline(SamplingConfig(**config))
        assert ("returns noise" in capsys.readouterr().out) == (steps == 1)
