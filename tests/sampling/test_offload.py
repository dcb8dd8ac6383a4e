"""Offloading blocks to host memory gives the same latents with less memory."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    SMALL,
    call_main,
    expect_error,
    in_process,
    relative_error,
    resident,
    save_checkpoint,
)
from test_models import randomised
from torch import nn

from analysis.recorder import count_routing
from checkpoints import config_of
from checkpoints.quantizers import quantizer
from runtime.devices import DTYPES
from sampling.generate import SamplerSettings, generate
from sampling.memory_table import weights_in_memory
from sampling.offload import offload_blocks
from sampling.pipeline import open_pipeline
from sampling.sampling_config import SamplingConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = dict(class_dropout_prob=0.1, num_classes=4, depth=3)  # an odd number of blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_vae) -> str:
    path = tmp_path_factory.mktemp("offload") / "model.safetensors"
    facts = dict(image_size=16, vae_path=str(tiny_vae), objective="rectified_flow")
    return str(save_checkpoint(randomised(**{**SMALL, **FIELDS}), path, **facts))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("precision", DTYPES)
def test_offloaded_blocks_give_bit_identical_latents(precision, kind):
    """One block is dense and therefore smaller. The test also interrupts a forward pass."""
    settings = SamplerSettings("rectified_flow", num_steps=3, cfg_scale=2.0)
    plain, offloaded = (randomised(**FIELDS, sparse_layers=(0, 2)).eval() for _ in range(2))
    for model in (plain, offloaded):
        model.register_parameter("own", nn.Parameter(torch.ones(2)))  # of an edited model
        if kind:
            quantizer(kind).replace_experts(model)
    plain.to(DEVICE, DTYPES[precision])
    offload_blocks(offloaded, DEVICE, DTYPES[precision])
    assert offloaded.own.dtype == DTYPES[precision] and offloaded.own.device.type == DEVICE.type
    want = generate(plain, [1, 2], [0, 1], settings)
    assert generate(offloaded, [1, 2], [0, 1], settings).equal(want)

    def stop(*_):
        raise KeyboardInterrupt

    hook = offloaded.blocks[1].attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(offloaded, [1], [0], settings)
    hook.remove()
    assert generate(offloaded, [1, 2], [0, 1], settings).equal(want)
    for name, value in plain.state_dict().items():
        waiting = offloaded.state_dict()[name]
        assert waiting.to(value).equal(value), name
        assert waiting.device.type == ("cpu" if name.startswith("blocks.") else DEVICE.type)


def test_all_sampling_features_work_with_offloaded_blocks(checkpoint, quick_compile):
    """Tests autoguidance, compiled blocks and the routing recorder."""
    common = dict(ckpt=checkpoint, num_sampling_steps=3, cfg_scale=2.0)
    for options in ({}, {"guide_ckpt": checkpoint}, {"compile": True}):
        pair = [
            open_pipeline(SamplingConfig(**common, **options, offload=offload))
            for offload in (False, True)
        ]
        want, got = (pipeline.latents([1, 2], [0, 1]) for pipeline in pair)
        # With a guide, rounding has differed.
        assert relative_error(got, want) < 1e-5 if "guide_ckpt" in options else got.equal(want)
        tables = [count_routing(p, [1, 2], 1, seed=0, batch_size=2).by_class for p in pair]
        assert (tables[0] == tables[1]).all() and tables[0].any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_memory_plan_counts_pinned_tensors_as_pytorch_allocates_them():
    config = config_of("DiT-XL/2", num_experts=8)
    whole, offloaded = weights_in_memory(config, torch.bfloat16, None)
    assert whole[0] == pytest.approx(8.34e9, rel=0.01)
    assert offloaded[1] == pytest.approx(12.8e9, rel=0.01)


def test_offloading_on_a_cpu_leaves_the_weights_in_the_mapped_file(tmp_path, tiny_vae):
    """The model takes 100 MB in fp32, mostly for its experts; the system can drop mapped pages."""
    model = randomised(hidden_size=128, depth=8, num_experts=16, num_heads=4)
    size = sum(weight.nbytes for weight in model.parameters())
    facts = dict(image_size=16, vae_path=str(tiny_vae), objective="rectified_flow")
    path = save_checkpoint(model, tmp_path / "model.safetensors", **facts)
    grown = {offload: in_process(bytes_of_sampling, path, offload) for offload in (True, False)}
    assert grown[True] < 0.25 * size and grown[False] > 0.45 * size, grown


def bytes_of_sampling(path: Path, offload: bool) -> int:
    """Returns the memory, without mapped files, that a model in bf16 adds to this process."""
    config = SamplingConfig(ckpt=str(path), offload=True, num_sampling_steps=3, precision="bf16")
    open_pipeline(config).latents([1], [0], lambda _: None)  # so that modules are loaded
    gc.collect()
    before, seen = resident("RssAnon"), []
    config = replace(config, offload=offload)
    open_pipeline(config).latents([1], [0], lambda _: seen.append(resident("RssAnon")))
    return seen[-1] - before


def test_sample_py_dry_run_prints_the_memory_of_each_precision(checkpoint, capsys):
    call_main("sample.py", "--dry-run", "--model", "DiT-XL/2", "--num_experts", 8)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    numbers = {(" ".join(row[:-3]), row[-3]): [float(x) for x in row[-2:]] for row in rows}
    assert len(numbers) == 6
    total, host = numbers["16 bit", "no"]
    assert total == pytest.approx(2 * 4.1, rel=0.02) and host == 0  # 4.1 billion parameters
    for kind, share in (("16 bit", 1), ("int8", 0.55), ("int4", 0.4)):
        device, host = numbers[kind, "yes"]
        assert 0.9 * share * total < numbers[kind, "no"][0] <= share * total + 0.2
        assert numbers[kind, "no"][0] < host < 1.6 * numbers[kind, "no"][0]  # pinned tensors
        assert device < 0.12 * host
    call_main("sample.py", "--dry-run", "--model", "DiT-L/2")  # sampled in fp32
    assert "32 bit" in capsys.readouterr().out
    call_main("sample.py", "--dry-run", "--ckpt", checkpoint)
    assert "int4" in capsys.readouterr().out
    for flags, message in (
        ((), "--ckpt: is required"),
        (("--dry-run", "--model", "DiT-Z/9"), "--model: got DiT-Z/9, expected one of DiT-Ti/2"),
    ):
        assert message in expect_error(capsys, "sample.py", *flags)
