"""The memory plan of --dry-run, and its note about the EMA."""

import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, call_main, run_script

from checkpoints import config_of
from training.config import TrainConfig
from training.memory import copied_bytes, model_activations, planned_weights
from training.plan import disk_notes, disk_use, in_gib


def test_the_memory_plan_for_gpus_includes_no_attention_weights():
    """A GPU keeps one number per head and token; a CPU in bf16 keeps T x T attention weights."""
    config = replace(config_of("DiT-S/2"), depth=2, sparse_layers=(0, 1))
    few, many = (
        model_activations(replace(config, num_heads=heads), 4, "bf16", "nothing")
        for heads in (3, 12)
    )
    tokens, heads = (config.input_size // config.patch_size) ** 2, 12 - 3
    assert many - few == 2 * 4 * heads * tokens * torch.float32.itemsize


def test_the_plan_for_selective_checkpointing_adds_the_outputs_of_attention_and_experts():
    """Compared with complete checkpointing, in each block except the recomputed one."""
    config, images = replace(config_of("DiT-S/2"), depth=3, sparse_layers=(0, 1, 2)), 4
    size = {
        recomputed: model_activations(config, images, "bf16", recomputed)
        for recomputed in ("nothing", "selective", "all")
    }
    tokens, width = images * 16 * 16, config.hidden_size
    rows = tokens * config.num_experts_per_tok * 2 * 4 * width  # gate and up
    kept = 2 * (rows + 2 * tokens * width) + 4 * tokens * config.num_heads  # outputs, log-sum-exp
    assert size["selective"] - size["all"] == 2 * kept
    assert size["all"] < size["selective"] < size["nothing"]


def test_the_plan_of_the_host_includes_the_rounding_of_pinned_memory():
    """PyTorch allocates the next power of two for each pinned tensor; two copies share the work."""
    config = replace(TrainConfig.default(), model=config_of("DiT-Ti/2"))
    exact = [4 * weight.numel() for weight in planned_weights(config).values()]
    alone = copied_bytes(config, copies=1)["copy at a save"]
    steps = 4 * len(exact)  # AdamW's counts
    assert alone - steps == sum(4 * 2 ** math.ceil(math.log2(size)) for size in exact)
    assert alone / 2 <= copied_bytes(config, copies=2)["copy at a save"] < alone


@pytest.mark.parametrize(("size", "text"), [
    (2**36, "64.00 GiB"), (0.01 * 2**30, "0.01 GiB"), (9.6e6, "9.2 MiB"), (2**16, "0.062 MiB"),
])  # fmt: skip
def test_small_sizes_are_in_mib(size, text):
    assert in_gib(size) == text


def test_the_plan_of_a_small_model_has_no_size_of_zero(capsys):
    small = "--model=DiT-Ti/2", "--depth=1", "--hidden-size=32", "--num-heads=2", "--max-steps=9"
    call_main("train.py", "--dry-run", *small, "--global-batch-size=1")
    assert not re.search(r"\b0\.00\b", capsys.readouterr().out)


def test_a_run_notes_that_its_disk_is_too_small(tmp_path, monkeypatch):
    """Checkpoints that the run has already written count as space for its checkpoints."""
    config = replace(TrainConfig.default(), model=config_of("DiT-Ti/2"))
    needed, _ = disk_use(config, 1000)
    (tmp_path / "0000500").mkdir()
    with (tmp_path / "0000500" / "model.safetensors").open("wb") as file:
        file.truncate(needed // 4)
    for free, count in ((needed - needed // 4, 0), (needed - needed // 4 - 1, 1)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        notes = disk_notes(config, 1000, tmp_path)
        assert len(notes) == count and all("--keep-last" in note for note in notes)


def test_the_plan_counts_the_images_of_a_range_of_shards(tmp_path, capsys, monkeypatch):
    """Also under a launcher, without the other processes."""
    for number, name in enumerate(("train", "held-out")):
        (tmp_path / f"s-{number}.tar").symlink_to(ROOT / "assets" / "emoji" / f"{name}.tar")
    data = ("--data-path", tmp_path / "s-{0..1}.tar", "--image-size", 64, "--depth", 2)
    call_main("train.py", "--dry-run", *data, "--vae-path", ROOT / "assets" / "vae-emoji")
    assert "epochs of 3,391 images" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    named = (*data, "--results-dir", tmp_path, "--run-name", "new")
    call_main("train.py", "--dry-run", *named, "--vae-path", ROOT / "assets" / "vae-emoji")
    assert "(2 processes x " in capsys.readouterr().out


def test_the_plan_asks_a_source_of_a_plugin_for_its_size(tmp_path):
    np.savez(tmp_path / "my.npz", images=np.zeros((48, 16, 16, 3), np.uint8), labels=[0, 1, 2] * 16)
    plugin = tmp_path / "numbers.py"
    plugin.write_text(
        "import numpy as np\n"
        "from PIL import Image\n"
        "from latents import sources\n"
        "class Numbers(sources.Source):\n"
        "    spelling, expected = 'numbers:.*', 'an .npz file'\n"
        "    def __init__(self, path, image_size):\n"
        "        stored, self.image_size = np.load(path.removeprefix('numbers:')), image_size\n"
        "        self.images, self.labels = stored['images'], stored['labels']\n"
        "        self.classes = ['a', 'b', 'c']\n"
        "    def name(self, index):\n"
        "        return str(index)\n"
        "    def read(self, index):\n"
        "        return Image.fromarray(self.images[index])\n"
        "sources.SOURCES = (Numbers, *sources.SOURCES)\n"
    )
    text = run_script(
        "train.py", "--dry-run", "--plugin", plugin, "--data-path", f"numbers:{tmp_path}/my.npz",
        "--vae-path", "pixels", "--image-size", 16, "--model", "DiT-Ti/2", "--depth", 2,
        "--global-batch-size", 8, "--max-steps", 6,
    ).stdout  # fmt: skip
    assert "3 classes" in text and "1.0 epochs of 48 images" in text and "assuming" not in text


def test_the_plan_assumes_images_for_a_cache_that_is_not_there(capsys):
    small = "--model", "DiT-Ti/2", "--depth", 2
    call_main("train.py", "--dry-run", *small, "--latents-path", "no/latents")
    text = capsys.readouterr().out
    assert "no/latents is not on this machine; assuming ImageNet's" in text and "fits" in text


def test_the_plan_warns_of_initial_weights_in_the_ema_and_of_a_batch_larger_than_the_data(capsys):
    plan = ("train.py", "--dry-run", "--model", "DiT-Ti/2", "--depth", 2, "--max-steps", 1000)
    call_main(*plan)
    assert (
        "after 1,000 steps 90% of EMA 0.9999 will still be the weights" in capsys.readouterr().out
    )
    call_main(*plan, "--ema", "exponential:warmup=True", "--global-batch-size", 2 * 1_281_167)
    output = capsys.readouterr().out
    assert "of EMA" not in output and "each step uses every image 2 times" in output


def test_without_a_gpu_the_plan_says_the_memory_of_this_machine_and_what_is_smaller(capsys):
    pixels = ("--vae-path", "pixels", "--image-size", 64, "--depth", 4)
    call_main("train.py", "--dry-run", *pixels, "--gpu-memory", 8)
    (fits,) = re.findall("fits +(.*)", capsys.readouterr().out)
    assert (
        fits.startswith("NO: ") and "GiB usable of 8 (--gpu-memory); try --config config/" in fits
    )
    call_main("train.py", "--dry-run", *pixels, "--model", "DiT-Ti/2", "--global-batch-size", 8)
    (fits,) = re.findall("fits +(.*)", capsys.readouterr().out)
    here = 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if torch.cuda.is_available():
        return
    assert fits.startswith("on a GPU, yes: ") and "; on this processor, yes: " in fits
    assert f" {here:.2f} GiB usable of this machine's " in fits
    large = ("--model", "DiT-XL/2", "--depth", 2, "--global-batch-size", 2**18)
    call_main("train.py", "--dry-run", *large)
    (fits,) = re.findall("fits +(.*)", capsys.readouterr().out)
    assert "on this processor, NO: " in fits and "; try " in fits
