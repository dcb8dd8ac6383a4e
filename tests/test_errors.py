"""A mistake of the user is one line, with exit code 2, and leaves nothing behind.

Mistakes in weight files are in tests/checkpoints/test_bad_files.py.
"""

import shlex

import pytest
from helpers import expect_error

TRAIN = {  # flags, after those of a small run on images: part of the line
    # Names and values
    "--num-exprts 4": "--num-experts",
    "--shared-experts 1": "--n-shared-experts",
    "--batch-size 4": "--global-batch-size",
    "--steps 4": "--warmup-steps or --max-steps",
    "--weight-decay 1": "--optimizer adamw:weight_decay=",
    "--device cuda": "CUDA_VISIBLE_DEVICES=",
    "--model DiT-S/3": "--model: got 'DiT-S/3'",
    "--num_experts_per_tok 5": "--num-experts-per-tok: got 5",
    "--ema exponential:decay=1.5": "--ema",
    # Flags of version 0.2
    "--router-scale 2": "--router sigmoid:scale=",
    "--router-bias-step 0": "--router sigmoid:bias_step=",
    "--objective-mean 1": "--objective rectified_flow:mean=",
    "--optimizer-betas 0.9 0.95": "--optimizer adamw:betas=",
    "--optimizer-weight-decay 1": "--optimizer adamw:weight_decay=",
    "--ema-decay 0.9 0.99": "--ema exponential:decay=",
    "--ema-warmup True": "--ema exponential:warmup=",
    "--ema-length 0.1": "--ema power:length=",
    "--decay-share 0.2": "--lr-schedule trapezoid:decay_share=",
    "--lr-floor 0.1": "--lr-schedule cosine:lr_floor=",
    # A thing said in two ways
    "--epochs 5 --max-steps 9": "--epochs: cannot be combined with --max-steps",
    "--latents-path x --data-path y": "--latents-path: cannot be combined with --data-path",
    "--val-share 0.1 --val-path x": "--val-share: cannot be combined with --val-path",
    "--rf True --objective gaussian": "rf",
    "--rf False --objective flow_x": "rf",
    # Without effect
    "--num_experts 0 --router race": "--router",
    "--num_experts 0 --aux-loss-alpha 1": "--aux-loss-alpha",
    "--num_experts 0 --n-shared-experts 1": "--n-shared-experts",
    "--num_experts 0 --num-experts-per-tok 1": "--num-experts-per-tok",
    "--num_experts 0 --sparse-layers 1": "--sparse-layers",
    "--max-steps 5 --shard-size 2": "--shard-size",
    "--max-steps 5 --gpus 2": "--gpus",
    # What the data, the model or files contradict
    "--global-batch-size 9 --accum_iter 2": "--global-batch-size",
    "--image-size 18": "--image-size: got 18",
    "--num-classes 7": "--num-classes: got 7",
    "--conditions vector": "--conditions",
    "--model JiT-B/16": "--model: got JiT-B/16",
    "--shard True --precision fp16": "--precision",
    "--freeze *": "--freeze",
    "--freeze nothing.here": "--freeze",
    "--data-path /nowhere": "/nowhere",
    "--data-path None": "--data-path: images are required",
    "--vae-path /nowhere": "/nowhere",
    "--resume /nowhere": "/nowhere",
    "--finetune /nowhere": "/nowhere",
}


@pytest.mark.parametrize("words", TRAIN)
def test_a_wrong_command_is_a_one_line_error_that_creates_no_run(
    words, train_flags, tmp_path, capsys
):
    flags = train_flags(tmp_path / "results")
    line = expect_error(capsys, "train.py", *flags, *shlex.split(words))
    assert TRAIN[words] in line
    assert not (tmp_path / "results").exists()


RECIPES = {  # content of a recipe: part of the line
    "learning: 1": "--learning: unknown flag",
    "router-scale: 2.5": "--router sigmoid:scale=",
    "router: {sigmoid: {scale: 2.5}}": "--router: got {'sigmoid'",
    "ema: [exponential:decay=0.9,warmup=True]": "--ema: got 'warmup=True' without",
    "ema: [{exponential: {decay: 0.9}}]": "--ema: got {'exponential'",
    "config: x": "the key config",
    "run_name: x": "the key run_name",
    "lr: x": "--lr: got 'x'",
    "image-size: [[256], [256]]": "--image-size: got",
    "max-steps: [5, 5]": "--max-steps: got",
    "lr: 1e-3\nlr: 2e-3": "lr: is given twice",
    "lr: 1e-3\nstep: {lr: 2e-3}": "lr: is given twice",
    "epochs: 5\nmax-steps: 9": "--max-steps",
    "- 1": "expected a YAML file",
    "lr: [": "expected a YAML file",
    "#" * 200_000: "more than 100,000 bytes",
    "run_name: caf\udce9": "expected a YAML file in UTF-8",  # a byte of Latin-1
}


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_an_error_in_a_recipe_is_one_line_with_its_path(text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    line = expect_error(capsys, "train.py", "--config", recipe)
    assert RECIPES[text] in line and str(recipe) in line


def test_a_recipe_that_is_a_folder_is_a_one_line_error(tmp_path, capsys):
    assert "Is a directory" in expect_error(capsys, "train.py", "--config", tmp_path)
