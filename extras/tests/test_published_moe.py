"""Published weights of ProMoE, DiffMoE and its baselines, and DSMoE give the official results.

tests/reference/published/ holds the outputs of the official code in fp32, with its conventions:
DiffMoE, its baselines and DSMoE have noise at t = 0 and predict data - noise. ProMoE's time input
is 1000 t.
"""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    TINY_MODEL,
    call_main,
    expect_error,
    only_run,
    relative_error,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_layouts import random_diffusers_model
from test_models import resolved
from torch import Tensor

from checkpoints import load_model, read_checkpoint
from checkpoints.layouts import to_stacked_layout
from checkpoints.weights import read_pickle
from diffusion import SAMPLERS, classifier_free_guidance, create_diffusion
from diffusion.objectives import Gaussian
from diffusion.rectified_flow import RectifiedFlow
from evaluate import EvaluateConfig, settings_of
from extras.moe_dits import from_moe_dit
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.pipeline import open_checkpoint, open_pipeline
from sampling.sampling_config import SamplingConfig
from training.step import update_routers

FOLDER = ROOT / "tests" / "reference" / "published"
PROMOE, DIFFMOE = ["promoe_tc", "promoe_tc_k2", "promoe_ec"], ["diffmoe", "diffmoe_ckpt"]
NAMES = [*PROMOE, *DIFFMOE, "diffmoe_tc", "diffmoe_ec", "diffmoe_dense", "dsmoe"]
SPARSE = [name for name in NAMES if name != "diffmoe_dense"]
CHANNELS = 4


def numbers(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.io.safetensors")


def hints(name: str) -> dict:
    """Hyperparameters that the file does not contain. Users pass them as flags of sample.py."""
    arguments = json.loads((FOLDER / f"{name}.config.json").read_text())["kwargs"]
    moe = arguments.get("MoE_config", {})
    chosen = moe.get("num_experts_per_tok") or moe.get("top_k") or moe.get("capacity") or 1
    found = {"num_heads": arguments["num_heads"], "num_experts_per_tok": chosen}
    if name == "promoe_ec":
        found["router"] = "prototype:choice=expert"
    if name in DIFFMOE:
        found["router"] = "batch_pool:inference=count"
    if name == "dsmoe":
        found["input_size"] = 8
    return found


def flags_of(name: str) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in hints(name).items()]


def weights_path(name: str) -> Path:
    (path,) = [p for p in (FOLDER / f"{name}.pt", FOLDER / f"{name}.safetensors") if p.exists()]
    return path


def load(name: str, training: bool = False, **overrides) -> DiT:
    if name == "diffmoe_dense":  # has the key names of the official dense DiT, which is no flow
        overrides.setdefault("objective", "rectified_flow")
    model = load_model(weights_path(name), **{**hints(name), **overrides})
    return model.train(training)


def our_time(name: str, t: Tensor) -> Tensor:
    return t.double() / 1000 if name in PROMOE else 1 - t.double()


def their_output(name: str, output: Tensor) -> Tensor:
    """Converts our prediction to the official one: most velocities have the opposite sign."""
    sign = torch.ones(output.shape[1])
    sign[:CHANNELS] = 1 if name in PROMOE else -1
    return output * sign[:, None, None]


def predict(name: str, model: DiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    output, aux_loss = model(x, our_time(name, t), y)
    return their_output(name, output), aux_loss


def hooked(model: DiT) -> dict[int, Routing]:
    """Returns a dict that will have the routing of each sparse block's last pass."""
    routings = {}
    for number in model.config.sparse_blocks:
        model.blocks[number].moe.register_forward_hook(
            lambda *call, number=number: routings.update({number: call[2][1]})
        )
    return routings


def check_experts(name: str, mode: str, experts: int, routings: dict[int, Routing]) -> None:
    """Asserts that routings have the official experts and expert weights.

    mode: "eval" or "train"
    experts: number of experts of a layer
    """
    io, compared = numbers(name), 0
    for number, routing in routings.items():
        prefix = f"{mode}.block{number}."
        official = {k.split(".")[2]: v for k, v in io.items() if k.startswith(prefix)}
        rows = torch.zeros(io["x"].shape[0] * 16, experts)
        at = (routing.token, routing.expert)
        chosen = rows.index_put(at, torch.ones(())) > 0
        weights = rows.index_put(at, routing.weight.detach(), accumulate=True)
        if "expert_indices" in official:
            index = official["expert_indices"].flatten(0, -2)
            assert torch.equal(chosen, rows.scatter(1, index, 1.0) > 0)
            want = rows.scatter_add(1, index, official["router_weights"].flatten(0, -2))
            assert relative_error(weights, want) < 1e-5
        elif name == "promoe_ec":
            has_class = io["y"] != 1000
            by_image = chosen.unflatten(0, (-1, 16))
            assert torch.equal(by_image[has_class, :, :-1], official["chosen"].mT)
            assert by_image[~has_class, :, -1].all() and not by_image[~has_class, :, :-1].any()
            got, at = weights.unflatten(0, (-1, 16))[has_class, :, :-1].mT, official["chosen"]
            assert relative_error(got[at], official["weights"][at]) < 1e-5
        elif "chosen" in official:
            assert torch.equal(chosen, official["chosen"].flatten(0, 1))
        else:
            continue
        compared += 1
    # The reference has no experts of a dense model, and those of DSMoE only in eval mode.
    assert compared or name == "diffmoe_dense" or (name, mode) == ("dsmoe", "train")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_moe_weights_give_the_official_outputs_and_experts(name):
    io, model = numbers(name), load(name)
    routings = hooked(model)
    output, _ = predict(name, model, io["x"], io["t"], io["y"])
    assert relative_error(output, io["output"]) < 1e-5
    check_experts(name, "eval", model.config.experts_per_layer, routings)
    x, t, y = io["x"], our_time(name, io["t"]), io["cfg.y"]
    null_y = torch.full_like(y, model.config.num_classes)
    for key in [key for key in io if key.startswith(("guided_", "forward_with_cfg_"))]:
        scale = float(key.rpartition("_")[2])
        if key.startswith("guided_"):
            got = classifier_free_guidance(model, y, null_y, scale, model.out_channels)(x, t)
        else:
            both = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null_y]))
            got = model.forward_with_cfg(*both, scale)
        assert relative_error(their_output(name, got), io[key]) < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
def test_published_moe_weights_give_the_official_samples_after_four_steps(name):
    io, model = numbers(name), load(name)
    y = io["sample.y"]
    null_y = torch.full_like(y, model.config.num_classes)
    for key in [key for key in io if key.startswith("sample.euler4")]:
        scale, guide = float(key.partition("_cfg")[2]), model if model.depends_on_batch else None
        denoise = classifier_free_guidance(model, y, null_y, scale, guide=guide)
        euler = SAMPLERS["rectified_flow"]["euler"]
        got = euler(denoise, io["sample.noise"], RectifiedFlow().sampling_times(euler, 4))
        assert relative_error(got, io[key]) < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
def test_published_moe_weights_give_the_official_training_loss_and_gradient_norm(name):
    io, model = numbers(name), load(name, training=True)
    t = io["loss.u"] if name in PROMOE else 1 - io["loss.u"].double()
    terms = RectifiedFlow().losses(model, io["loss.x0"], io["loss.y"], t, io["loss.noise"])
    each = io["loss.mse_per_sample"] if name in PROMOE else io["loss.mse"]
    assert relative_error(terms["loss"], each) < 1e-5
    reported = terms["loss"].mean() + (terms["aux_loss"] if "loss.cp_loss" in io else 0)
    assert relative_error(reported, io["loss.loss"]) < 1e-5
    (terms["loss"].mean() + terms["aux_loss"]).backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert relative_error(torch.nn.utils.get_total_norm(gradients), io["loss.grad_norm"]) < 1e-4


def in_our_layout(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts official weights or gradients. The conversion is orthogonal, so it fits both."""
    values = {**hints(name), "objective": "rectified_flow"}
    return to_stacked_layout(from_moe_dit(tensors, values)[0])


def official_weights(name: str) -> dict[str, Tensor]:
    path = weights_path(name)
    if path.suffix == ".safetensors":
        return load_file(path)
    stored = read_pickle(path)
    return dict(stored.get("ema", stored.get("ema_model_state_dict")))


@pytest.mark.parametrize("name", NAMES)
def test_published_moe_weights_give_the_official_training_outputs_experts_and_gradients(name):
    io, model = numbers(name), load(name, training=True)
    routings = hooked(model)
    output, aux_loss = predict(name, model, io["x"], io["t"], io["y"])
    assert relative_error(output, io["output_train"]) < 1e-5
    check_experts(name, "train", model.config.experts_per_layer, routings)
    layers = [v for k, v in io.items() if k.startswith("train.") and k.endswith(".aux_loss")]
    want = sum(layers, torch.zeros(())) * io.get("train.aux_loss_weight", 1)
    assert relative_error(aux_loss, want) < 1e-5
    ((output * io["cotangent"]).sum() + aux_loss).backward()
    gradients, official = load_file(FOLDER / f"{name}.grads.safetensors"), official_weights(name)
    table = "y_embedder.embedding_table.weight"
    if f"{table}.rows" in gradients:
        rows, values = gradients.pop(f"{table}.rows"), gradients.pop(f"{table}.values")
        gradients[table] = torch.zeros_like(official[table]).index_put((rows,), values)
    want = in_our_layout(name, {**official, **gradients})
    largest = max(value.norm() for value in gradients.values())
    for key, weight in model.named_parameters():
        got = torch.zeros_like(weight) if weight.grad is None else weight.grad
        # Some weights do not affect the softmax, so their gradients are rounding errors.
        allowed = 1e-4 * max(want[key].norm(), 1e-3 * largest)
        assert (got - want[key]).norm() < allowed, key
    if name in DIFFMOE:
        update_routers(model, model.observed)
        for layer in model.config.sparse_blocks:
            got = model.blocks[layer].moe.gate.threshold
            assert relative_error(got, io[f"train.block{layer}.threshold_after"]) < 1e-5


@pytest.mark.parametrize("name", DIFFMOE)
def test_diffmoe_images_depend_on_their_batch_only_with_count_inference(name):
    io = numbers(name)
    inputs = [(io["x"][[i]], io["t"][[i]], io["y"][[i]]) for i in range(len(io["x"]))]
    with torch.no_grad():
        counting, model = load(name), load(name, router="batch_pool:inference=threshold")
        assert counting.depends_on_batch and not model.depends_on_batch
        single = [
            torch.cat([predict(name, m, *one)[0] for one in inputs]) for m in (counting, model)
        ]
        batch = predict(name, model, io["x"], io["t"], io["y"])[0]
    assert relative_error(single[0], io["output_one_by_one"]) < 1e-5
    assert relative_error(single[0], io["output"]) > 1e-2
    assert relative_error(single[1], batch) < 1e-5
    assert relative_error(batch, io["output"]) > 1e-2  # the paper's rule gives a different output
    for layer in counting.config.sparse_blocks:
        counting.blocks[layer].moe.gate.threshold.zero_()
    with torch.no_grad():
        every = predict(name, counting, io["x"], io["t"], io["y"])[0]
    assert relative_error(every, io["output_zero_thresholds"]) < 1e-5


def test_published_moe_files_load_with_their_objective():
    records = {name: read_checkpoint(weights_path(name), **hints(name)).record for name in SPARSE}
    assert {record.objective.name for record in records.values()} == {"rectified_flow"}
    assert records["promoe_tc"].objective.options["times"] == "logit-normal"
    assert records["dsmoe"].objective.options["times"] == "uniform"
    ddpm = read_checkpoint(weights_path("diffmoe"), {"objective": "gaussian"}, num_heads=2)
    assert ddpm.record.objective.name == "gaussian"


def test_the_word_of_a_router_changes_options_of_a_file_and_not_its_router(tmp_path):
    config = SamplingConfig(ckpt=weights_path("dsmoe"), **hints("dsmoe"), router="sigmoid:scale=3")
    published = open_checkpoint(replace(config, router=None)).config.router.options
    assert open_checkpoint(config).config.router.options == published | {"scale": 3.0}
    model = DiT(**SMALL, num_experts=4, router="sigmoid:scale=2.5,bias_step=0.1")
    config = SamplingConfig(ckpt=save_checkpoint(model, tmp_path / "ours.safetensors"))
    options = open_checkpoint(replace(config, router="sigmoid:scale=3")).config.router.options
    assert (options["scale"], options["bias_step"]) == (3.0, 0.1)
    for word in ("topk", "race:momentum=0.5"):
        with pytest.raises(UserError, match="router: got .*, expected sigmoid"):
            open_checkpoint(replace(config, router=word))
    model = DiT(**SMALL, num_experts=0)
    dense = save_checkpoint(model, tmp_path / "dense.safetensors")
    with pytest.raises(UserError, match="--router: has no effect on a dense model"):
        open_checkpoint(replace(config, ckpt=dense, router="topk"))


def test_shared_weight_names_are_resolved_by_arguments_and_file_keys(tmp_path):
    """DiffMoE's dense baseline shares its weight names with the official DiT, and ProMoE's
    baselines share theirs with DiffMoE."""
    name, official = "t_embedder.mlp.0.weight", official_weights("diffmoe_dense")
    model = load_model(weights_path("diffmoe_dense"), num_heads=2)
    assert torch.equal(model.state_dict()[name], official[name])
    assert not torch.equal(load("diffmoe_dense").state_dict()[name], official[name])
    official = official_weights("diffmoe_tc")
    torch.save({"step": 1, "ema_model_state_dict": official}, tmp_path / "ckpt_step_1.pth")
    model = load_model(tmp_path / "ckpt_step_1.pth", num_heads=2)
    assert model.config.time_scale == 1000
    assert torch.equal(model.state_dict()[name], official[name])


def test_bare_files_of_our_models_are_not_mistaken_for_other_projects(tmp_path):
    """The first model is DiT's, whose function test_layouts.py compares with diffusers'."""
    for changes in (dict(num_experts=0), dict(num_experts=0, mlp_type="swiglu"),
                    dict(sparse_layers="every-second")):  # fmt: skip
        model = DiT(**{**TINY_MODEL, **changes})
        torch.save(model.state_dict(), tmp_path / "bare.pt")
        loaded = load_model(tmp_path / "bare.pt", num_heads=2)
        assert resolved(loaded.config) == resolved(model.config)
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name


def test_promoe_with_other_than_1000_classes_never_uses_the_unconditional_expert(tmp_path):
    weights, table = official_weights("promoe_tc"), "y_embedder.embedding_table.weight"
    save_file({**weights, table: weights[table][-11:].clone()}, tmp_path / "a.safetensors")
    few, io = load_model(tmp_path / "a.safetensors", num_heads=2), numbers("promoe_tc")
    assert few.config.num_classes == 10 and not few.config.router.options["unconditional_expert"]
    routed = []
    few.blocks[1].moe.register_forward_hook(lambda *call: routed.append(call[2][1]))
    with torch.no_grad():
        few(io["x"], our_time("promoe_tc", io["t"]), torch.full((4,), 10))
    assert routed[0].expert.max() < few.config.num_experts


def test_a_model_without_absolute_positions_loads_for_any_grid():
    model = load("dsmoe", input_size=12)
    x, t, y = torch.randn(2, 4, 12, 12), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    assert model(x, t, y)[0].shape == (2, 8, 12, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("dsmoe_grouped.pt", "RMSNorm"),
        ({"blocks.0.attn.sinks": torch.zeros(2)}, "sinks"),
        ({"blocks.0.attn.q_proj.weight": torch.zeros(16, 16)}, "KDA"),
        ({"blocks.1.mlp.shared_experts.gate_proj.weight": None,
          "blocks.1.mlp.shared_experts.up_proj.weight": None,
          "blocks.1.mlp.shared_experts.down_proj.weight": None}, "blocks.1.moe"),
        ({"blocks.1.mlp.experts.blocks.0.up_proj.weight": None}, "expert weight"),
    ],
)  # fmt: skip
def test_unsupported_published_files_are_one_line_errors(changes, words, tmp_path, capsys):
    """Uses unsupported files and damaged copies of DSMoE's weights."""
    path = tmp_path / "dsmoe.safetensors" if isinstance(changes, dict) else FOLDER / changes
    if isinstance(changes, dict):
        weights = {**official_weights("dsmoe"), **changes}
        save_file({key: value for key, value in weights.items() if value is not None}, path)
    arguments = ("--ckpt", path, "--num-heads", 2, "--input-size", 8)
    assert words in expect_error(capsys, "sample.py", *arguments)


@pytest.mark.parametrize("name", ["diffmoe_dense", "dsmoe"])
def test_sample_py_samples_from_published_moe_files(name, tmp_path, tiny_vae):
    arguments = flags_of(name)
    if name == "diffmoe_dense":
        arguments += ["--objective=rectified_flow", "--num-experts=0"]
        arguments.remove("--num-experts-per-tok=1")
    call_main(
        "sample.py", "--ckpt", weights_path(name), *arguments, "--vae-path", tiny_vae,
        "--num-sampling-steps", 2, "--class-labels", 1, 2, "--output", tmp_path / "grid.png",
    )  # fmt: skip
    assert (tmp_path / "grid.png").is_file()


def test_published_moe_files_can_be_fine_tuned(tmp_path, train_flags):
    name = "diffmoe"
    flags = train_flags(
        tmp_path / "runs", model=None, num_experts=None, finetune=weights_path(name), lr=1e-4,
        **{"max-steps": 2, "global-batch-size": 8, "num-sample": 2},
        **{key: value for key, value in hints(name).items() if key != "input_size"},
    )  # fmt: skip
    call_main("train.py", *flags)
    before = read_checkpoint(weights_path(name), **hints(name))
    after = read_checkpoint(only_run(tmp_path / "runs"))
    want = replace(before.config, num_classes=4, input_size=8)
    assert resolved(after.config) == resolved(want)
    times = [one.record.objective.options["times"] for one in (before, after)]
    assert times[0] == times[1]
    weight = "t_embedder.mlp.2.weight"
    assert 0 < relative_error(after.state_dict[weight], before.state_dict[weight]) < 1e-2


def test_expert_counts_of_published_files_exclude_the_unconditional_pass(tmp_path, tiny_vae):
    def count(name: str, *flags) -> np.ndarray:
        call_main(
            "expert_data.py", "--ckpt", weights_path(name), *flags_of(name), "--vae-path", tiny_vae,
            "--class-labels", 1, 2, "--images-per-class", 2, "--output", tmp_path / "x.npz", *flags,
        )  # fmt: skip
        return np.load(tmp_path / "x.npz")["by_class"]  # (classes, layers, experts)

    counts = count("promoe_tc", "--num-sampling-steps", 2)
    assert counts.sum() == 2 * 2 * 2 * 16 * 2 * 1  # classes, images, steps, tokens, layers, K
    assert counts.shape[-1] == load("promoe_tc").config.num_experts  # without the extra expert
    one, two_passes = (
        count("diffmoe", "--num-sampling-steps", 1, "--cfg-scale", scale) for scale in (1, 1.5)
    )
    assert (one == two_passes).all() and one.sum() > 0


def test_diffmoe_as_ddpm_gives_the_official_losses_and_samples():
    io, model = numbers("diffmoe"), load("diffmoe", training=True, objective="gaussian")
    terms = Gaussian().losses(model, io["loss.x0"], io["loss.y"], io["ddpm.t"], io["loss.noise"])
    for key in ("mse", "vb"):
        assert relative_error(terms[key], io[f"ddpm.{key}"]) < 1e-5
    assert relative_error(terms["loss"].mean() + terms["aux_loss"], io["ddpm.loss"]) < 1e-5
    y, noises = io["sample.y"], iter(io["ddpm.noise"])
    denoise = classifier_free_guidance(model.eval(), y, torch.full_like(y, 10), 1.5, channels=3)
    got = create_diffusion("4").p_sample_loop(
        denoise, io["sample.noise"].shape, io["sample.noise"], clip_denoised=False,
        noise_fn=lambda z: next(noises)[: len(z)],
    )  # fmt: skip
    assert relative_error(got, io["ddpm.sample4_cfg1.5"]) < 1e-5


def test_evaluation_settings_identify_the_weights_and_the_model_flags(tmp_path, tiny_vae):
    """Flags that change a published model change the settings. A diffusers folder has a digest."""

    def settings(ckpt: Path, **flags) -> dict:
        config = EvaluateConfig(ckpt=str(ckpt), vae_path=str(tiny_vae), **flags)
        return settings_of(open_pipeline(config), config)

    flags = dict(num_heads=hints("diffmoe")["num_heads"], num_experts_per_tok=1)
    choices = [
        settings(
            weights_path("diffmoe"),
            **flags,
            batch_size=size,
            router=f"batch_pool:inference={choice}",
        )
        for choice, size in (("threshold", 4), ("threshold", 8), ("count", 4), ("count", 8))
    ]
    assert choices[0] == choices[1] and all(a != b for a, b in combinations(choices[1:], 2))
    random_diffusers_model().save_pretrained(tmp_path / "dit")
    assert len(settings(tmp_path / "dit")["checkpoint_sha256"]) == 64
