"""Published weights of JiTMoE give the official results; class tokens work with every tool.

In the published code, data is at t = 1 and noise at t = 0.
"""

import argparse

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, only_run, relative_error, save_checkpoint
from safetensors.torch import load_file
from test_models import randomised, tiny_batch
from test_published_moe import FOLDER

from checkpoints import load_model, read_checkpoint
from checkpoints.layouts import to_stacked_layout
from diffusion import OBJECTIVES, classifier_free_guidance, guidance_within
from extras.moe_dits import from_moe_dit
from models import DiT
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate
from wrappers import wrap_blocks

PATH, IO = FOLDER / "jitmoe.safetensors", load_file(FOLDER / "jitmoe.io.safetensors")
HINTS = {"num_heads": 1, "class_tokens_start": 1}
FIELDS = dict(
    norm="rms", qk_norm=True, rope=True, class_tokens=3, class_tokens_start=1, patch_bottleneck=6,
    mlp_type="swiglu_bias", sparse_layers=(1,), learn_sigma=False,
)  # fmt: skip
FLOW = OBJECTIVES["flow_x"](mean=0.8, std=0.8)


def load(**overrides) -> DiT:
    return load_model(PATH, **HINTS, **overrides)


def test_jitmoe_weights_give_the_official_outputs_experts_and_gradients():
    model, routings = load(), []
    model.blocks[1].moe.register_forward_hook(lambda *call: routings.append(call[2][1]))
    inputs = IO["x"], 1 - IO["t"].double(), IO["y"]
    with torch.no_grad():
        assert relative_error(model(*inputs)[0], IO["output"]) < 1e-5
    index, weights = (IO[f"eval.block1.{n}"] for n in ("expert_indices", "router_weights"))
    table = torch.zeros(len(index), 4)
    want = table.scatter(1, index, weights)
    at = (routings[0].token, routings[0].expert)
    assert relative_error(table.index_put(at, routings[0].weight), want) < 1e-5
    output, _ = model.train()(*inputs)
    assert relative_error(output, IO["output_train"]) < 1e-5
    (output * IO["cotangent"]).sum().backward()
    official, gradients = load_file(PATH), load_file(FOLDER / "jitmoe.grads.safetensors")
    want = to_stacked_layout(from_moe_dit({**official, **gradients}, HINTS)[0])
    for name, weight in model.named_parameters():
        assert relative_error(weight.grad, want[name]) < 1e-5, name


def test_jitmoe_weights_give_the_official_loss_and_gradient_norm():
    model = load().train()
    t = 1 - (0.8 * IO["loss.normal"].double() - 0.8).sigmoid()
    terms = FLOW.losses(model, IO["loss.x0"], IO["loss.y"], t, IO["loss.noise"])
    assert relative_error(terms["loss"].mean(), IO["loss.loss"]) < 1e-5
    terms["loss"].mean().backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    assert relative_error(torch.nn.utils.get_total_norm(gradients), IO["loss.grad_norm"]) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 2.9])
def test_jitmoe_weights_give_the_official_samples_after_four_steps(sampler, scale):
    y, guidance = IO["sample.y"], guidance_within((0, 0.9), scale)
    denoise = classifier_free_guidance(load(), y, torch.full_like(y, 10), guidance)
    sample = FLOW.samplers[sampler]
    times = FLOW.sampling_times(sample, 4)
    got = sample(FLOW.denoiser(denoise), IO["sample.noise"], times)
    assert relative_error(got, IO[f"sample.{sampler}4_cfg{scale}"]) < 1e-5


def test_a_jitmoe_checkpoint_has_two_averages_and_its_settings(tmp_path):
    weights = load_file(PATH)
    halved = {name: value / 2 for name, value in weights.items()}
    args = argparse.Namespace(P_mean=-0.4, noise_scale=2.0, num_heads=1, class_tokens_start=1)
    stored = {"model": halved, "model_ema1": weights, "model_ema2": halved, "args": args}
    torch.save(stored | {"optimizer": {}, "epoch": 3}, tmp_path / "checkpoint-last.pth")
    first = read_checkpoint(tmp_path / "checkpoint-last.pth")
    second = read_checkpoint(tmp_path / "checkpoint-last.pth", ema="model_ema2")
    options = {"mean": 0.4, "std": 0.8, "clamp": 0.05, "noise_scale": 2.0}
    assert first.record.objective.name == "flow_x"
    assert options.items() <= first.record.objective.options.items()
    assert (first.record.vae_path, first.record.image_size) == ("pixels", 12)
    weight = "final_layer.linear.bias"
    assert first.state_dict[weight].equal(2 * second.state_dict[weight])
    with pytest.raises(UserError, match="--ema: got 0.9, but .* has model, model_ema1"):
        read_checkpoint(tmp_path / "checkpoint-last.pth", ema="0.9")


def test_a_width_without_preset_needs_its_heads_and_first_block_with_class_tokens(capsys):
    assert "num_heads: is required" in expect_error(capsys, "sample.py", "--ckpt", PATH)
    with pytest.raises(UserError, match="class_tokens_start: is required"):
        load_model(PATH, num_heads=1)


def test_noise_of_another_scale_is_data_of_the_inverse_scale():
    """z = (1 - t) x + t s noise is s times the path of the data x / s."""
    torch.manual_seed(0)
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    scaled = OBJECTIVES["flow_x"](noise_scale=2.0)
    want = 2 * FLOW.noised(x / 2, noise, t)
    torch.testing.assert_close(scaled.noised(x, noise, t), want)

    def network(z, t, y):
        return 0.3 * z, torch.zeros(())

    pairs = (scaled, x), (FLOW, x / 2)
    got, want = (one.losses(network, data, None, t, noise)["loss"] for one, data in pairs)
    torch.testing.assert_close(got, 4 * want)
    model, images = randomised(learn_sigma=False).eval(), []
    model.forward = lambda z, t, y: network(z, t, y)  # linear, so images scale with the noise
    for sampler in ("heun", "sde", "unipc"):
        pair = [
            generate(model, [1, 2], [0, 1], SamplerSettings(word, sampler, 4, 1.0))
            for word in ("flow_x:noise_scale=1", "flow_x:noise_scale=2")
        ]
        torch.testing.assert_close(pair[1], 2 * pair[0])
        images.append(pair[0])
    assert relative_error(images[0], images[1]) > 1e-2


def test_class_tokens_are_not_rotated_and_are_cut_off_at_the_end():
    model, (x, _, y) = randomised(**FIELDS).eval(), tiny_batch()
    t = torch.linspace(0.1, 0.9, len(x))
    inputs = {}
    for layer, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda _, args, n=layer: inputs.update({n: args}))
    with torch.no_grad():
        assert model(x, t, y)[0].shape == x.shape
    (before, rotation), (after, more) = inputs[0], inputs[1]
    assert (before.shape[1], after.shape[1]) == (16, 19)
    cos, sin = more[:3].chunk(2, dim=1)
    assert (cos == 1).all() and not sin.any() and more[3:].equal(rotation) and rotation[1:].any()
    assert [model.config.tokens_of(layer) for layer in range(2)] == [16, 19]


def test_class_tokens_are_compiled_and_recomputed_with_the_same_gradients(quick_compile):
    gradients = []
    for change in ("none", "compiled", "checkpointed"):
        model = randomised(**FIELDS).train()
        torch._dynamo.reset()
        recomputed = "all" if change == "checkpointed" else "nothing"
        wrap_blocks(model, recomputed=recomputed, compiled=change == "compiled")
        prediction, aux_loss = model(*tiny_batch())
        (prediction.square().sum() + aux_loss).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for other in gradients[1:]:
        for name, want in gradients[0].items():
            assert relative_error(other[name], want) < 1e-5, name


def test_a_model_with_class_tokens_is_fine_tuned_on_pixels_and_mapped(tmp_path, train_flags):
    model = randomised(**FIELDS, in_channels=3, input_size=16, num_classes=4, patch_size=4)
    flags = {
        "vae-path": "pixels", "model": None, "num_experts": None, "objective": "flow_x",
        "max-steps": 2, "global-batch-size": 8, "num-sample": 2,
    }  # fmt: skip
    facts = dict(objective="flow_x", vae_path="pixels", image_size=16)
    path = save_checkpoint(model, tmp_path / "jit.safetensors", **facts)
    call_main("train.py", *train_flags(tmp_path / "runs", **flags, finetune=path))
    run = only_run(tmp_path / "runs")
    assert read_checkpoint(run).config.class_tokens == 3
    call_main(
        "expert_data.py", "--ckpt", run, "--class-labels", 1, 2, "--images-per-class", 1,
        "--num-sampling-steps", 2, "--cfg-scale", 1, "--output", tmp_path / "x.npz",
    )  # fmt: skip
    counts = np.load(tmp_path / "x.npz")
    assert counts["by_class"].sum() == 2 * 2 * 16 * 2  # images, steps, patches, K
    assert counts["other_by_step"].sum() == 2 * 2 * 3 * 2  # class tokens
