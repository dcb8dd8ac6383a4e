"""The sample grid that a training run draws from its first EMA.

grid = draw_preview(run, engine)     # (3, H, W) uint8 on the CPU
"""

import torch
from torch import Tensor

from latents.loading import collate, evenly
from sampling.generate import SamplerSettings, generate
from training.engine import Engine
from training.start import Run

DECODED = 4  # latents at a time: a decoder needs far more memory for an image than the model does


def draw_preview(run: Run, engine: Engine, is_main: bool) -> Tensor | None:
    """Draws images of fixed seeds, with labels spread over the classes, a row for each class where
    there are several images of each; all processes call it.

    A model of features, for which no single value would do, draws from those of training images.
    Returns the grid (3, H, W) uint8 on the main process, None on the others.
    """
    config, model = run.config, engine.model
    count, classes = config.run.num_sample, model.config.num_classes
    shown, conditions = min(count, classes), {}
    labels = [i * classes // shown for i in range(shown) for _ in range(count // shown)]
    if any(condition.has_width for condition in model.conditions.values()):
        places = evenly(len(run.dataset), count)
        conditions, _ = collate([run.dataset[place, False] for place in places])
        labels, shown = conditions.pop("label").tolist(), count
        conditions = {
            name: conditions[name] for name in conditions.keys() & model.conditions.keys()
        }
    is_guided = model.config.class_dropout_prob and not config.objective.guides_in_training
    settings = SamplerSettings(
        config.step.objective,
        sampler=config.objective.preview_sampler,
        num_steps=config.objective.preview_steps,
        cfg_scale=config.run.sample_cfg_scale if is_guided else 1.0,
        objective_options=config.objective.option_values(),
    )
    with engine.ema_weights():
        latents = generate(model, labels, range(len(labels)), settings, conditions=conditions)
    if not is_main:
        return None
    from sampling.grid import class_caption, image_grid  # and matplotlib, a second

    images = torch.cat([run.vae.decode(part).cpu() for part in latents.split(DECODED)])
    captions = [class_caption(run.dataset.classes[label], label) for label in labels]
    return image_grid(images, captions, len(labels) // shown)
