"""Quantised experts: rounding errors, accuracy, exported files and errors."""

import pytest
import test_moe
import torch
from helpers import SMALL, call_main, expect_error, relative_error, save_checkpoint
from safetensors.torch import load_file
from test_models import randomised, tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.recorder import count_routing
from checkpoints import config_of, load_model, read_checkpoint, save_model
from checkpoints.quantizers import quantizer
from extras.quantized import quantize_experts
from models import DiT
from moe_kernels.quantized import quantize
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate
from sampling.memory_table import weight_bytes
from sampling.pipeline import open_pipeline
from sampling.sampling_config import SamplingConfig

KINDS = ("int8", "int4")
low_rank = test_moe.low_rank
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_vae):
    """Checkpoint of a sparse model whose largest weights are its experts."""
    path = tmp_path_factory.mktemp("quantized") / "model.safetensors"
    model = randomised(num_classes=4, class_dropout_prob=0.1, num_experts=8, **SMALL)
    facts = dict(image_size=16, vae_path=str(tiny_vae), objective="rectified_flow")
    return save_checkpoint(model, path, **facts)


@pytest.mark.parametrize("most", [2e-6, 1e-5, 3e-4])
def test_rows_of_small_weights_are_quantised_to_the_precision_of_fp16(most):
    """A scale rounded to 0 would lose the row; one rounded down would cut its largest weights."""
    w = torch.linspace(-most, most, 64).view(1, 1, 64)
    got = quantize(w, "int8").to(torch.float32)
    assert (got - w).abs().max() <= max(2**-25, most / 127)


def test_quantising_weights_too_large_for_a_scale_raises():
    with pytest.raises(ValueError, match="got weights up to 1e"):
        quantize(torch.full((1, 32, 32), 1e8), "int8")


@kinds
def test_the_error_of_a_quantised_weight_is_at_most_half_a_step_in_any_dtype(kind):
    torch.manual_seed(0)
    weight = torch.randn(3, 40, 96) * torch.logspace(-3, 0, 40)[:, None]
    weight[1, 7] = 0
    quantized = quantize(weight, kind)
    assert quantized.shape == weight.shape
    step = quantized.scale.float().repeat_interleave(96 // quantized.scale.shape[-1], -1)
    error = (quantized.to(torch.float32) - weight).abs()
    # Scales are rounded to bf16 (8 bits), which may clip the largest weight of a row.
    assert (error <= 0.5 * step + weight.abs() / 256).all()
    assert not quantized.to(torch.float32)[1, 7].any()
    assert relative_error(quantized.to(torch.float32), weight) < {"int8": 0.01, "int4": 0.12}[kind]
    for dtype in (torch.float16, torch.bfloat16):
        assert quantized.scale.to(dtype).float().equal(quantized.scale.float())
        assert quantized.to(dtype).equal(quantized.to(torch.float32).to(dtype))


@pytest.mark.parametrize(
    "router, mlp_type",
    [("topk", "swiglu"), ("topk", "gelu"), ("sigmoid", "swiglu_bias"), ("prototype", "swiglu")],
)
def test_quantised_predictions_stay_close_and_the_back_ends_agree(router, mlp_type):
    fields = dict(router=router, mlp_type=mlp_type, class_dropout_prob=0.1)
    settings, inputs = SamplerSettings("rectified_flow", num_steps=4), tiny_batch()
    whole = randomised(**fields).eval()
    with torch.no_grad():
        want = whole(*inputs)[0], generate(whole, [1, 2], [0, 1], settings)
    for kind, bound in (("int8", 0.02), ("int4", 0.3)):
        pair = [randomised(**fields, expert_backend=name).eval() for name in ("grouped", "loop")]
        for model in pair:
            quantize_experts(model, kind)
        with torch.no_grad():
            got = pair[0](*inputs)[0], generate(pair[0], [1, 2], [0, 1], settings)
            assert relative_error(got[0], pair[1](*inputs)[0]) < 1e-5
            half = pair[0].bfloat16()(*inputs)[0]
        assert relative_error(half, got[0]) < 0.05
        for a, b in zip(got, want, strict=True):
            assert 0 < relative_error(a, b) < bound


def test_experts_that_share_a_parameter_are_not_quantised(low_rank):
    with pytest.raises(UserError, match="--quantize: got int8 .*got LowRankExperts with .*up_base"):
        quantizer("int8").convert(DiT(low_rank).state_dict(), low_rank)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest floating-point tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if torch.is_tensor(x) and x.is_floating_point() and not x.is_meta:
                self.most = max(self.most, x.numel())
        return result


@kinds
def test_a_quantised_export_gives_the_images_of_the_flag(checkpoint, kind, tmp_path):
    flags = ("--ckpt", checkpoint, "--quantize", kind, "--output", tmp_path / "out")
    call_main("export.py", *flags, "--samples", 2, "--num-sampling-steps", 2, "--precision", "bf16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    with LargestTensor() as seen:
        model = load_model(tmp_path / "out")
    down_proj = stored["blocks.1.moe.experts.down_proj"]
    assert model.blocks[1].moe.experts.down_proj.equal(down_proj)
    assert 0 < seen.most < down_proj.numel()
    want = load_model(checkpoint, quantize=kind)
    for name, value in model.blocks[0].moe.experts.state_dict().items():
        assert value.equal(want.blocks[0].moe.experts.state_dict()[name].to(value.dtype)), name
    common, draws = dict(precision="bf16", num_sampling_steps=5), []
    for path, options in (
        (checkpoint, {"quantize": kind}), (tmp_path / "out", {}),
        (tmp_path / "out", {"quantize": kind}), (checkpoint, {}),
    ):  # fmt: skip
        pipeline = open_pipeline(SamplingConfig(ckpt=str(path), **common, **options))
        draws.append(pipeline.images([0, 3], [5, 6]))
    assert draws[0].equal(draws[1]) and draws[0].equal(draws[2]) and not draws[0].equal(draws[3])


def test_all_sampling_features_work_with_quantised_experts(checkpoint, tmp_path, quick_compile):
    """Tests autoguidance, compiled blocks and the routing recorder."""
    common = dict(ckpt=str(checkpoint), quantize="int4", num_sampling_steps=3, cfg_scale=2.0)
    plain = open_pipeline(SamplingConfig(**common))
    want = plain.latents([1, 2], [0, 1])
    compiled = open_pipeline(SamplingConfig(**common, compile=True))
    assert relative_error(compiled.latents([1, 2], [0, 1]), want) < 1e-4
    guided = [
        open_pipeline(SamplingConfig(**common, guide_ckpt=str(checkpoint), offload=offload))
        for offload in (False, True)
    ]
    assert guided[0].guide.blocks[0].moe.experts.down_proj.dtype == torch.uint8
    latents = [pipeline.latents([1], [0]) for pipeline in guided]
    assert latents[0].isfinite().all() and relative_error(latents[1], latents[0]) < 1e-5
    counts = count_routing(plain, [1, 2], 1, seed=0, batch_size=2)
    assert counts.by_class.sum() == 2 * 3 * 2 * 16 * 2  # images, steps, layers, patches, experts


def test_quantising_an_unsupported_model_is_a_one_line_error(
    checkpoint, train_flags, tmp_path, capsys
):
    dense, narrow = tmp_path / "dense.safetensors", tmp_path / "narrow.safetensors"
    for path, fields in ((dense, {"num_experts": 0}), (narrow, {"mlp_ratio": 0.5})):
        save_checkpoint(randomised(**fields), path, objective="gaussian")
    int8 = tmp_path / "int8"
    flags = ("--ckpt", checkpoint, "--samples", 0, "--quantize")
    call_main("export.py", *flags, "int8", "--output", int8)
    for path, kind, message in (
        (dense, "int8", "--quantize: got int8, expected a model with experts"),
        (narrow, "int4", "int4: got 16 inputs, expected a multiple of 32"),
        (int8, "int4", "--quantize: got int4, expected int8, as the file stores them"),
    ):
        flags = ("--ckpt", path, "--quantize", kind, "--output", tmp_path / "grid.png")
        assert message in expect_error(capsys, "sample.py", *flags)
    for name in ("published", "pipeline"):
        flags = ("--ckpt", int8, "--vae-path", "pixels", "--format", name, "--output")
        assert "got experts in int8" in expect_error(capsys, "export.py", *flags, tmp_path / name)
    line = expect_error(capsys, "train.py", *train_flags(tmp_path), "--finetune", int8)
    assert "--finetune" in line and "got experts in int8, expected weights of 16 or 32" in line


def test_a_damaged_quantised_file_is_rejected(checkpoint, tmp_path):
    stored = read_checkpoint(checkpoint, quantize="int4")
    name = "blocks.1.moe.experts.down_proj"
    for key, value in (
        (name, stored.state_dict[name].view(torch.int8)[..., :5].clone()),
        (f"{name}_scale", None),
    ):
        changed = {**stored.state_dict, key: value}
        changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_model(tmp_path / "changed.safetensors", changed, stored.record)
        with pytest.raises(UserError, match="changed.safetensors"):
            read_checkpoint(tmp_path / "changed.safetensors")


def test_weights_of_g_take_at_most_18_gb_in_int8_and_12_in_int4():
    for kind, most in (("int8", 18e9), ("int4", 12e9)):
        with torch.device("meta"):
            model = DiT(**vars(config_of("DiT-G/2", num_experts=16))).to(torch.float16)
            quantize_experts(model, kind)
        assert 0.9 * most < weight_bytes(model.state_dict().values()) < most
