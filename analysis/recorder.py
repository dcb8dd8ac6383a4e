"""Counts, while a DiT samples, which experts the tokens of every layer chose.

The counts are all that is kept, so memory does not depend on the number of images, and they stay on
the model's device, so no step waits for one.

Shape legend:
    N images of a batch, T tokens per image, R rows of a `Routing`, E experts,
    L sparse layers, C classes, S sampling steps
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor

from analysis.counts import RoutingCounts
from models import DiT
from routers import Routing
from runtime.errors import UserError
from runtime.progress import tell_batches
from sampling.generate import parse_labels
from sampling.pipeline import SamplingPipeline, batches


def listen(model: DiT, listener: Callable[[int, Tensor, Routing], None]) -> ExitStack:
    """Has listener(layer, x, routing) called with what each sparse block returns, from layer 0.

    Until what this returns is closed.
    """

    hooks = ExitStack()
    for layer, block in enumerate(model.config.sparse_layers):
        # Not compiled with its block, or a graph would be built for every layer and step.
        hook = torch.compiler.disable(
            lambda module, inputs, output, layer=layer: listener(layer, *output)
        )
        hooks.enter_context(model.blocks[block].register_forward_hook(hook))
    return hooks


class RoutingRecorder:
    """Context manager that counts every layer's choices of experts, of the conditional rows only.

    These come first, as many as there are labels; so does their pass where guidance takes two. Of
    several calls in a step, as Heun's sampler makes, the first is counted. The tables are those of
    `RoutingCounts`, `by_class` of all classes; a router's extra expert is the last.
    """

    def __init__(self, model: DiT, num_steps: int):
        config, device = model.config, model.pos_embed.device
        self.model, self.labels, self.step = model, None, 0
        self.counted: set[int] = set()  # layers, in this step
        self.num_tokens = model.x_embedder.num_patches
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        layers, experts = len(config.sparse_layers), config.experts_per_layer
        self.by_class = zeros(config.num_classes, layers, experts)
        self.by_step = zeros(num_steps, layers, experts)
        self.by_position = zeros(self.num_tokens, layers, experts)
        self.spent = zeros(num_steps, self.num_tokens, layers)
        self.times = torch.full((num_steps,), torch.nan, dtype=torch.float64, device=device)

    def __enter__(self) -> "RoutingRecorder":
        self.hooks = listen(self.model, self.count)
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.close()

    def start_batch(self, labels: Sequence[int]) -> None:
        """Announces a run of the sampler for images of these labels."""
        self.labels = torch.tensor(labels, device=self.by_class.device)  # (N,)
        self.step = 0
        self.counted.clear()

    def end_step(self, state: dict) -> None:
        """The sampler's callback: notes the time of the step just done; the next one follows."""
        self.times[self.step] = state["t"][0]
        self.step = state["step"] + 1
        self.counted.clear()

    def count(self, layer: int, x: Tensor, routing: Routing) -> None:
        """Adds the rows of a block's routing; x (N or 2N, T, D) is the block's output."""
        if layer in self.counted:  # the pass without classes, or a step's second call
            return
        self.counted.add(layer)
        num_images = len(self.labels)
        assert len(x) in (num_images, 2 * num_images), "start_batch announced another batch"
        image, position = routing.token // self.num_tokens, routing.token % self.num_tokens  # (R,)
        one = (image < num_images).long()  # 0 without a class
        label = self.labels[image.clamp(max=num_images - 1)]  # (R,)
        step = torch.full_like(label, self.step)
        for table, row in (
            (self.by_class, label), (self.by_step, step), (self.by_position, position),
        ):  # fmt: skip
            table[:, layer].index_put_((row, routing.expert), one, accumulate=True)
        self.spent[:, :, layer].index_put_((step, position), one, accumulate=True)


def count_routing(
    pipeline: SamplingPipeline,
    labels: Sequence[int | str],
    images_per_class: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> RoutingCounts:
    """Samples images of each label, from seed, seed + 1, ..., and counts their experts.

    UserError for a dense model.
    """
    config, settings = pipeline.model.config, pipeline.settings
    if not config.num_experts:
        raise UserError(f"--ckpt: got {pipeline.checkpoint.path}, dense, expected experts in it")
    labels = list(dict.fromkeys(parse_labels(labels, pipeline.class_names)))
    requests = batches(labels, images_per_class, seed, batch_size)
    with RoutingRecorder(pipeline.model, settings.num_steps) as recorder:
        for batch_labels, seeds in tell_batches(requests, len(requests)):
            recorder.start_batch(batch_labels)
            pipeline.sample(batch_labels, seeds, callback=recorder.end_step)
    name = pipeline.checkpoint.record.model_name
    by_class, experts = recorder.by_class[labels], config.num_experts  # the extra one's are 0
    return RoutingCounts(
        by_class=by_class[..., :experts].cpu().numpy(),
        by_step=recorder.by_step[..., :experts].cpu().numpy(),
        by_position=recorder.by_position[..., :experts].cpu().numpy(),
        spent=recorder.spent.cpu().numpy(),
        times=recorder.times.cpu().numpy(),
        labels=np.array(labels, dtype=np.int64),
        class_names=np.array([pipeline.class_names[label] for label in labels]),
        settings={
            "model": f"{name}-{config.num_experts}E{config.num_experts_per_tok}A",
            "seed": seed,
            "images_per_class": images_per_class,
            "grid": config.grid,
            **asdict(settings),
        },
    )
