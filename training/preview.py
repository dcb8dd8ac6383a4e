"""The sample grid that a training run draws from its first EMA.

grid = draw_preview(run, engine)     # (3, H, W) uint8 on the CPU
"""

import math

import torch
from torch import Tensor
from torchvision.utils import make_grid

from latents.autoencoder import decode
from sampling.generate import SamplerSettings, generate
from training.engine import Engine
from training.setup import Run

DECODED = 4  # latents at a time: a decoder needs far more memory for an image than the model does


def draw_preview(run: Run, engine: Engine, is_main: bool) -> Tensor | None:
    """Draws images of fixed seeds, with labels spread over the classes; all processes call it.

    Returns the grid (3, H, W) uint8 on the main process, None on the others.
    """
    config, model = run.config, engine.model
    count, classes = config.run.num_sample, model.config.num_classes
    labels = [i * classes // count for i in range(count)]
    settings = SamplerSettings(
        config.step.objective,
        sampler=config.objective.preview_sampler,
        num_steps=50,
        cfg_scale=config.run.sample_cfg_scale if model.config.class_dropout_prob else 1.0,
        objective_options=config.objective.option_values(),
    )
    with engine.ema_weights():
        latents = generate(model, labels, range(count), settings)
    if not is_main:
        return None
    images = torch.cat([decode(run.vae, part).cpu() for part in latents.split(DECODED)])
    return make_grid(images, nrow=math.ceil(count**0.5))
