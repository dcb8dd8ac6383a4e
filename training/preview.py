"""Sample grids of a training run, generated with the first EMA.

grid = draw_preview(loop)            # (3, H, W) uint8 on the CPU
"""

from typing import TYPE_CHECKING

from torch import Tensor

from latents.loading import collate, evenly_spaced
from sampling.generate import SamplerSettings, generate

if TYPE_CHECKING:
    from training.loop import TrainingLoop


def draw_preview(run: "TrainingLoop") -> Tensor | None:
    """Generates images from fixed seeds, with labels spread over the classes.

    Several images of a class form a row. A model with feature conditions uses the features of
    training images. All processes call this function. Returns the grid (3, H, W) uint8 on the main
    process and None on the others.
    """
    config, model, engine = run.config, run.engine.model, run.engine
    count, classes = config.run.num_sample, model.config.num_classes
    shown, conditions = min(count, classes), {}
    labels = [i * classes // shown for i in range(shown) for _ in range(count // shown)]
    if any(condition.axes for condition in model.conditions.values()):
        indices = evenly_spaced(len(run.dataset), count)
        conditions, _ = collate([run.dataset[index, False] for index in indices])
        labels, shown = conditions.pop("label").tolist(), count
        conditions = {
            name: conditions[name] for name in conditions.keys() & model.conditions.keys()
        }
    is_guided = model.config.dropout and not config.objective.guides_in_training
    settings = SamplerSettings(
        config.step.objective.name,
        sampler=config.objective.preview_sampler,
        cfg_scale=config.run.sample_cfg_scale if is_guided else 1.0,
        objective_options=config.step.objective.options,
    )
    with engine.ema_weights():
        latents = generate(model, labels, range(len(labels)), settings, conditions=conditions)
    if not engine.dist.is_main:
        return None
    from sampling.grid import class_captions, image_grid  # imports matplotlib, which takes a second

    images = run.vae.decode(latents)
    captions = class_captions(model, run.dataset.classes, labels)
    return image_grid(images, captions, len(labels) // shown)
