"""Sample grids of a training run, generated with the first EMA.

grid = draw_preview(engine, dataset, vae, requests)  # (3, H, W) uint8 on the CPU
"""

from contextlib import suppress

import torch
from torch import Tensor

from latents.autoencoder import DECODED_AT_ONCE, Autoencoder
from latents.loading import collate, evenly_spaced
from latents.sources import Source
from runtime.progress import progress
from runtime.signals import Requests
from sampling.generate import SamplerSettings, generate, resolve_settings
from training.engine import Engine


class Signalled(Exception):
    """A signal arrived during sampling."""


def draw_preview(
    engine: Engine, dataset: Source, vae: Autoencoder, requests: Requests
) -> Tensor | None:
    """Generates images from fixed seeds, with labels spread over the classes.

    Several images of a class form a row. A model with feature conditions uses the features of
    training images. All processes call this function, but only those that share a copy of the model
    sample. Returns the grid (3, H, W) uint8 on the main process, and None on the others or if a
    signal arrived.
    """
    config, model, dist = engine.config, engine.model, engine.dist
    if engine.copy_size == 1 and not dist.is_main:
        return None
    count, classes = config.run.num_sample, model.config.num_classes
    shown, conditions = min(count, classes), {}
    labels = [i * classes // shown for i in range(shown) for _ in range(count // shown)]
    if any(condition.axes for condition in model.conditions.values()):
        indices = evenly_spaced(len(dataset), count)
        conditions, _ = collate([dataset[index, False] for index in indices])
        labels, shown = conditions.pop("label").tolist(), count
        conditions = {
            name: conditions[name] for name in conditions.keys() & model.conditions.keys()
        }
    is_guided = model.config.dropout and not config.objective.guides_in_training
    settings = SamplerSettings(
        str(config.step.objective),
        sampler=config.objective.preview_sampler,
        cfg_scale=config.run.sample_cfg_scale if is_guided else 1.0,
    )
    steps = resolve_settings(settings, model.config).num_steps
    bar = progress(total=steps, desc="samples", leave=False, delay=5)

    def end_step(state: dict) -> None:
        bar.update()
        is_signalled = requests.is_signalled
        if engine.copy_size > 1:  # they compute together, so they stop after the same step
            is_signalled = any(dist.gather(is_signalled))
        if is_signalled:
            raise Signalled

    latents = None
    with bar, engine.ema_weights(), suppress(Signalled):
        latents = generate(
            model, labels, range(len(labels)), settings, conditions=conditions, callback=end_step
        )
    if latents is None or not dist.is_main:
        return None
    images = []
    for part in latents.split(DECODED_AT_ONCE):
        if requests.is_signalled:
            return None
        images.append(vae.decode(part))
    from latents.image_grid import (  # imports matplotlib, which takes a second
        class_captions,
        image_grid,
    )

    captions = class_captions(model, dataset.classes, labels)
    return image_grid(torch.cat(images), captions, len(labels) // shown)
