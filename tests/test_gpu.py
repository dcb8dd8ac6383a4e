"""Checks that need a GPU: the CPU's results, and resumed runs."""

import shutil
from functools import partial
from statistics import fmean

import pytest
from helpers import call_main, needs_gpu, relative_error, rows, step_folder
from test_sampling import randomised_preset

from sampling.generate import SamplerSettings, generate


@needs_gpu
def test_a_gpu_samples_the_same_latents_as_a_cpu_for_the_same_seeds(at_most):
    model, settings = randomised_preset().eval(), SamplerSettings("rectified_flow", num_steps=20)
    cpu, gpu = (
        generate(model.to(device), [0, 1, 2, 3], range(4), settings).cpu()
        for device in ("cpu", "cuda")
    )
    at_most("difference of the latents", relative_error(gpu, cpu), 2e-2)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_run_learns_and_resumes_with_its_losses(at_most, train_flags, tmp_path, precision):
    flags = partial(train_flags, precision=precision, model="DiT-Ti/2", rf=True, lr=3e-3, **{
        "global-batch-size": 16, "max-steps": 60, "ckpt-every": 30, "log-every": 1,
        "run-name": "run",
    })  # fmt: skip
    call_main("train.py", *flags(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(step_folder(tmp_path / "again", 60))
    call_main("train.py", *flags(tmp_path / "again"))
    losses, again = ([row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "again"))
    at_most("last losses over the first", fmean(losses[-10:]) / fmean(losses[:3]), 0.8)
    difference = max(abs(a / b - 1) for a, b in zip(again[30:40], losses[30:40], strict=True))
    at_most("difference of a resumed run's losses", difference, 1e-2)
