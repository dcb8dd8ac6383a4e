"""Recorder that counts, while a model samples, the experts of the tokens in every layer.

Its memory does not depend on the number of images. The counts stay on the model's device, so no
step waits for them.

Shape legend:
    N conditional images of a batch, T tokens per image, P patches per image, R rows of a
    `Routing`, E experts, L sparse layers, C classes, S sampling steps
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from analysis.counts import RoutingCounts
from analysis.gallery import Gallery
from analysis.sparse_layers import sparse_layers, weight_similarity
from analysis.token_places import OTHER, DiTPlaces, TokenPlaces
from latents.autoencoder import weights_digest
from models import DiT
from routers import Routing
from runtime.errors import UserError
from runtime.progress import progress
from sampling.generate import parse_labels
from sampling.pipeline import SamplingPipeline, batches


def listen(model: nn.Module, listener: Callable[[int, Tensor, Routing], None]) -> ExitStack:
    """Calls listener(layer, x, routing) with the outputs x (N, T, D) of the sparse layers, from 0.

    model: a DiT, or a sparse transformer of diffusers, see analysis/sparse_layers.py

    Closing the returned ExitStack removes the listener.
    """
    hooks = ExitStack()
    for number, layer in enumerate(sparse_layers(model)):
        hooks.enter_context(layer.listen(partial(listener, number)))
    return hooks


# The tables of `RoutingCounts` and their axes.
TABLES = {
    "by_class": ("class", "layer", "expert"),
    "by_step": ("step", "layer", "expert"),
    "by_position": ("place", "layer", "expert"),
    "weight_by_class": ("class", "layer", "expert"),
    "weight_by_step": ("step", "layer", "expert"),
    "weight_by_position": ("place", "layer", "expert"),
    "by_step_and_position": ("step", "place", "layer"),
    "kept": ("step", "place", "layer"),
    "together": ("pair", "expert", "expert"),
    "other_by_step": ("step", "layer", "expert"),
    "times": ("step",),
}
FLOATS = ("weight_by_class", "weight_by_step", "weight_by_position", "times")  # in fp64


class RoutingRecorder:
    """Context manager that counts the assignments of each layer, for the conditional images only.

    Only the first call of a step is counted: guidance in two passes and Heun's method have several.
    `tables` are those of `RoutingCounts` by name, made by the first pass; here `by_class` has all
    classes, and an extra expert of the router is the last expert.
    """

    def __init__(
        self, model: nn.Module, num_steps: int, num_classes: int | None = None,
        places: TokenPlaces | None = None,
    ):  # fmt: skip
        """Only for a DiT, `num_classes` and `places` have defaults."""
        self.model, self.layers = model, sparse_layers(model)
        self.num_steps, self.device = num_steps, None
        self.num_classes, self.places = num_classes, places
        self.tables: dict[str, Tensor] = {}
        self.counted: set[int] = set()  # layers that were counted in this step
        self.gallery = Gallery(len(self.layers), self.layers[0].num_experts)
        self.num_images = 0  # in the gallery
        if isinstance(model, DiT):
            self.num_classes, self.places = model.config.num_classes, DiTPlaces(model)
            self.allocate(model.pos_embed.device)  # now, so that no step waits for it

    def allocate(self, device: torch.device) -> None:
        """Makes the tables; only a DiT's grid and device are known before the first call."""
        self.device, layers = device, len(self.layers)
        sizes = {
            "class": self.num_classes, "step": self.num_steps, "place": math.prod(self.places.grid),
            "layer": layers, "pair": layers - 1,
            "expert": max(layer.num_experts + layer.extra_experts for layer in self.layers),
        }  # fmt: skip
        for name, axes in TABLES.items():
            dtype = torch.float64 if name in FLOATS else torch.int64
            shape = [sizes[axis] for axis in axes]
            self.tables[name] = torch.zeros(shape, dtype=dtype, device=device)
        self.tables["times"].fill_(torch.nan)

    def __enter__(self) -> "RoutingRecorder":
        self.hooks = listen(self.model, self.count)
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.close()

    def start_batch(self, labels: Sequence[int]) -> None:
        """Prepares for a run of the sampler on images with these labels."""
        self.labels, self.step = torch.tensor(labels, device=self.device), 0  # (N,)
        self.counted.clear()
        self.chosen: dict[int, Tensor] = {}  # by layer: (N * P, E), whether a patch has the expert
        self.weights: dict[int, Tensor] = {}  # by layer: (N * P, E), sum over the steps

    def end_step(self, state: dict) -> None:
        """Sampler callback: records the time of the finished step."""
        self.tables["times"][self.step] = state["t"][0]
        self.step = state["step"] + 1
        self.counted.clear()

    def end_batch(self, decode: Callable[[list[int]], Tensor]) -> None:
        """Adds the batch to the gallery of each expert's patches; decode: see `Gallery.add`."""
        self.gallery.add(self.mean_weights(), self.places.grid, self.num_images, decode)
        self.num_images += len(self.labels)

    def mean_weights(self) -> list[Tensor]:
        """Returns the weight of each routed expert at each patch of the batch, (N, P, E) per layer:
        means over the steps so far, with 0 where a patch does not have the expert.
        """
        experts = self.layers[0].num_experts
        sums = [self.weights[layer][:, :experts] for layer in range(len(self.layers))]
        return [x.unflatten(0, (len(self.labels), -1)) / max(self.step, 1) for x in sums]

    def count(self, layer: int, x: Tensor, routing: Routing) -> None:
        """Adds the rows of a layer's routing; x (B, T, D) is the layer's output."""
        if layer in self.counted:  # unconditional pass, or second call within a step
            return
        self.counted.add(layer)
        if self.device is None:
            self.allocate(x.device)
            self.labels = self.labels.to(x.device)
        images, (batch, tokens) = len(self.labels), x.shape[:2]
        assert batch in (images, 2 * images), "the batch differs from start_batch"
        places = self.places.places(tokens).expand(images, tokens)  # (N, T)
        image = routing.token // tokens - self.places.first_conditional(batch, images)
        is_counted = (image >= 0) & (image < images)  # (R,)
        image = image.clamp(0, images - 1)
        place = places[image, routing.token % tokens]  # (R,)
        other = (is_counted & (place == OTHER)).long()
        one = (is_counted & (place >= 0)).long()
        place = place.clamp(min=0)
        step = torch.full_like(place, self.step)
        self.add(
            layer, routing, one, {"class": self.labels[image], "step": step, "position": place}
        )
        add = partial(torch.Tensor.index_put_, accumulate=True)
        add(self.tables["other_by_step"][:, layer], (step, routing.expert), other)
        add(self.tables["by_step_and_position"][:, :, layer], (step, place), one)
        self.compare(layer, routing, one, image * math.prod(self.places.grid) + place)

    def add(self, layer: int, routing: Routing, one: Tensor, rows: dict[str, Tensor]) -> None:
        """Adds the assignments where `one` (R,) is 1, and their weights, to three tables."""
        weight = routing.weight.double() * one
        for name, row in rows.items():
            for table, values in ((f"by_{name}", one), (f"weight_by_{name}", weight)):
                counts = self.tables[table][:, layer]
                counts.index_put_((row, routing.expert), values, accumulate=True)

    def compare(self, layer: int, routing: Routing, one: Tensor, patch: Tensor) -> None:
        """Counts what the patches of the batch share with the last step and the layer before."""
        images, index = len(self.labels), (patch, routing.expert)
        shape = images * math.prod(self.places.grid), self.tables["by_class"].shape[-1]
        zeros = torch.zeros(shape, device=one.device)  # (N * P, E)
        chosen = zeros.index_put(index, one.float(), accumulate=True)
        if self.step > 0:
            kept = (self.chosen[layer] * chosen).sum(-1).unflatten(0, (images, -1)).sum(0)
            self.tables["kept"][self.step - 1, :, layer] += kept.long()
        self.chosen[layer] = chosen
        if layer > 0:
            self.tables["together"][layer - 1] += (self.chosen[layer - 1].T @ chosen).round().long()
        weights = self.weights.setdefault(layer, zeros)
        weights.index_put_(index, routing.weight.float() * one, accumulate=True)

    def counts(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the tables and the gallery of `RoutingCounts`, of the routed experts.

        rows: classes to return
        """
        shown = {"class": list(rows), "expert": slice(self.layers[0].num_experts)}
        shown["step"] = slice(int((~self.tables["times"].isnan()).sum()))
        tables = {
            name: self.tables[name][tuple(shown.get(axis, slice(None)) for axis in axes)]
            for name, axes in TABLES.items()
        }
        tables["similarity"] = torch.stack([weight_similarity(layer) for layer in self.layers])
        return {n: table.cpu().numpy() for n, table in tables.items()} | self.gallery.arrays()


def count_routing(
    pipeline: SamplingPipeline,
    labels: Sequence[int | str],
    images_per_class: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> RoutingCounts:
    """Samples images of each label, with seeds seed, seed + 1, ..., and counts their experts."""
    config, settings = pipeline.model.config, pipeline.settings
    if not config.num_experts:
        raise UserError(f"--ckpt: {pipeline.checkpoint.path} is a dense model, expected experts")
    labels = list(dict.fromkeys(parse_labels(labels, pipeline.class_names)))
    requests = batches(labels, images_per_class, seed, batch_size)
    bar = progress(total=len(requests) * settings.num_steps, unit="step")
    with bar, RoutingRecorder(pipeline.model, settings.num_steps) as recorder:

        def end_step(state: dict) -> None:
            recorder.end_step(state)
            bar.update()

        for batch_labels, seeds in requests:
            recorder.start_batch(batch_labels)
            latents = pipeline.latents(batch_labels, seeds, callback=end_step)
            recorder.end_batch(lambda chosen, latents=latents: pipeline.decode(latents[chosen]))
    name, folder = pipeline.checkpoint.record.model_name, pipeline.checkpoint.path.absolute().parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent  # the run
    return RoutingCounts(
        **recorder.counts(labels),
        labels=np.array(labels, dtype=np.int64),
        class_names=np.array([pipeline.class_names[label] for label in labels]),
        settings={
            "model": f"{name}-{config.num_experts}E{config.num_experts_per_tok}A",
            "run": folder.name,
            "router": str(config.router),
            "step": pipeline.checkpoint.record.step,
            "precision": pipeline.precision,
            "checkpoint_sha256": weights_digest(pipeline.model),
            "seed": seed,
            "images_per_class": images_per_class,
            "images": len(labels) * images_per_class,
            "grid": config.grid,
            "layers": [layer.name for layer in recorder.layers],
            **asdict(settings),
        },
    )
