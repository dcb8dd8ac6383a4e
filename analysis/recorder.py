"""Recorder that counts, while a DiT samples, the experts of the tokens in every layer.

The recorder stores only counts, so its memory does not depend on the number of images. The counts
stay on the model's device, so no step waits for them.

Shape legend:
    N images of a batch, T tokens per image in a block, R rows of a `Routing`, E experts,
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
from runtime.progress import progress_bar
from sampling.generate import parse_labels
from sampling.pipeline import SamplingPipeline, batches


def listen(model: DiT, listener: Callable[[int, Tensor, Routing], None]) -> ExitStack:
    """Calls listener(layer, x, routing) with the outputs of each sparse block, from layer 0.

    Closing the returned ExitStack removes the listener.
    """
    hooks = ExitStack()
    for layer, block in enumerate(model.config.sparse_layers):
        # If the hook were compiled with its block, every layer and step would need a new graph.
        hook = torch.compiler.disable(
            lambda module, inputs, output, layer=layer: listener(layer, *output)
        )
        hooks.enter_context(model.blocks[block].register_forward_hook(hook))
    return hooks


class RoutingRecorder:
    """Context manager that counts the assignments of each layer, for the conditional images only.

    Conditional images come first in a guided batch, or in the first of two passes. If a sampler
    calls the model several times per step, as Heun's does, only the first call is counted. For the
    tables see `RoutingCounts`. Here `by_class` has all classes, and an extra expert of the router
    is the last expert.
    """

    def __init__(self, model: DiT, num_steps: int):
        config, device = model.config, model.pos_embed.device
        self.model, self.labels, self.step = model, None, 0
        self.counted: set[int] = set()  # layers that were counted in this step
        self.num_patches = config.num_patches
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        layers, experts = len(config.sparse_layers), config.experts_per_layer
        self.by_class = zeros(config.num_classes, layers, experts)
        self.by_step = zeros(num_steps, layers, experts)
        self.by_position = zeros(self.num_patches, layers, experts)
        self.by_step_and_position = zeros(num_steps, self.num_patches, layers)
        self.times = torch.full((num_steps,), torch.nan, dtype=torch.float64, device=device)

    def __enter__(self) -> "RoutingRecorder":
        self.hooks = listen(self.model, self.count)
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.close()

    def start_batch(self, labels: Sequence[int]) -> None:
        """Prepares for a run of the sampler on images with these labels."""
        self.labels = torch.tensor(labels, device=self.by_class.device)  # (N,)
        self.step = 0
        self.counted.clear()

    def end_step(self, state: dict) -> None:
        """Sampler callback: records the time of the finished step."""
        self.times[self.step] = state["t"][0]
        self.step = state["step"] + 1
        self.counted.clear()

    def count(self, layer: int, x: Tensor, routing: Routing) -> None:
        """Adds the rows of a block's routing; x (N or 2N, T, D) is the block's output.

        Tokens that are no patches come first and have no position.
        """
        if layer in self.counted:  # unconditional pass, or second call within a step
            return
        self.counted.add(layer)
        num_images = len(self.labels)
        assert len(x) in (num_images, 2 * num_images), "the batch differs from start_batch"
        image = routing.token // x.shape[1]  # (R,)
        position = routing.token % x.shape[1] - (x.shape[1] - self.num_patches)
        one = (image < num_images).long()  # 0 for an unconditional image
        is_patch, position = (position >= 0).long(), position.clamp_min(0)
        label = self.labels[image.clamp(max=num_images - 1)]  # (R,)
        step = torch.full_like(label, self.step)
        for table, row, number in (
            (self.by_class, label, one), (self.by_step, step, one),
            (self.by_position, position, one * is_patch),
        ):  # fmt: skip
            table[:, layer].index_put_((row, routing.expert), number, accumulate=True)
        by_both = self.by_step_and_position[:, :, layer]
        by_both.index_put_((step, position), one * is_patch, accumulate=True)


def count_routing(
    pipeline: SamplingPipeline,
    labels: Sequence[int | str],
    images_per_class: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> RoutingCounts:
    """Samples images of each label, with seeds seed, seed + 1, ..., and counts their experts.

    Raises UserError for a dense model.
    """
    config, settings = pipeline.model.config, pipeline.settings
    if not config.num_experts:
        raise UserError(f"--ckpt: {pipeline.checkpoint.path} is a dense model, expected experts")
    labels = list(dict.fromkeys(parse_labels(labels, pipeline.class_names)))
    requests = batches(labels, images_per_class, seed, batch_size)
    with RoutingRecorder(pipeline.model, settings.num_steps) as recorder:
        for batch_labels, seeds in progress_bar(requests, len(requests)):
            recorder.start_batch(batch_labels)
            pipeline.sample(batch_labels, seeds, callback=recorder.end_step)
    name = pipeline.checkpoint.record.model_name
    by_class, experts = recorder.by_class[labels], config.num_experts  # omit the extra expert
    return RoutingCounts(
        by_class=by_class[..., :experts].cpu().numpy(),
        by_step=recorder.by_step[..., :experts].cpu().numpy(),
        by_position=recorder.by_position[..., :experts].cpu().numpy(),
        by_step_and_position=recorder.by_step_and_position.cpu().numpy(),
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
