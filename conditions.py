"""Conditions: what a DiT is told of an image beside the time, one class each.

    model = DiT(conditions=("label", "size", "vector:768"))
    prediction, aux_loss = model(x, t, {"label": y, "size": size, "vector": vector})

A condition turns one named tensor of the batch into a vector for each image, and the model adds
these vectors to the embedding of the time. To add a condition: a subclass of `Condition` with
`none`, `default` and `forward`, and its name in `CONDITIONS`. The tensor of that name comes from
the source of the images or from the cache of their latents.

Shape legend: N batch, D width of the model, F numbers of a feature
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

Conditions = Tensor | Mapping[str, Tensor]  # labels (N,), or tensors by the names of conditions
WAVES = 256  # sinusoids of a number


def sinusoids(t: Tensor, dim: int, frequency_shift: int = 0) -> Tensor:
    """Cosines, then sines, at dim/2 frequencies; t (N,) of any real value; returns (N, dim)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) / (half - frequency_shift) * steps)
    angles = t[:, None].float() * frequencies                               # (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def two_layers(inputs: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
    )


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time, then an MLP. Time is used as it comes: 0..999, or 0..1 for flow."""

    timestep_embedding = staticmethod(sinusoids)

    def __init__(self, hidden_size: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = two_layers(WAVES, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        t_freq = sinusoids(t, WAVES, self.frequency_shift)                  # (N, 256)
        return self.mlp(t_freq.to(self.mlp[0].weight.dtype))                # (N, D)


class Facts(NamedTuple):
    """What a condition is made from: facts of the model."""

    hidden_size: int
    num_classes: int
    dropout_prob: float  # how often conditions are dropped
    time_scale: float  # what times are multiplied by before they are embedded
    width: int | None  # F, the number in "vector:768"


class Condition(nn.Module):
    """Turns the tensor of its name (N, ...) into vectors (N, D)."""

    in_batch = True  # False: the objective or the sampler gives the tensor, not the source
    has_width = False  # whether the name is followed by the width F of a feature: "vector:768"
    starts_at_zero = False  # whether the last layer of the MLP starts at zero

    def __init__(self, facts: Facts):
        super().__init__()

    def none(self, values: Tensor) -> Tensor:
        """What stands for values (N, ...) where conditions are dropped; by default the values."""
        return values

    def default(self, count: int, device: torch.device) -> Tensor:
        """The values (count, ...) of images of which nothing is said."""
        raise NotImplementedError


class LabelEmbedder(Condition):
    """A vector for each class and, with label dropout, one more, index num_classes: no class."""

    def __init__(self, facts: Facts):
        super().__init__(facts)
        self.num_classes = facts.num_classes
        rows = facts.num_classes + (facts.dropout_prob > 0)
        self.embedding_table = nn.Embedding(rows, facts.hidden_size)

    def none(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.num_classes)

    def default(self, count: int, device: torch.device) -> Tensor:
        raise ValueError("conditions: got no label, expected the label of each image")

    def forward(self, labels: Tensor) -> Tensor:
        """Embeds labels (N,) in [0, num_classes]; returns (N, D)."""
        return self.embedding_table(labels)


class SizeEmbedder(Condition):
    """The size and the crop of the original image (SDXL, Podell et al. 2023, arXiv 2307.01952,
    section 2.2).

    The values (N, 4) are the height and the width of the original image, and the top and the left
    edge of the crop. The unit is the height or the width of the image that the model learns from:
    an original that was enlarged twice has 0.5. The default (1, 1, 0, 0) is an original of exactly
    that size. As in SDXL, guidance keeps the size.
    """

    def __init__(self, facts: Facts):
        super().__init__(facts)
        self.mlp = two_layers(4 * WAVES, facts.hidden_size)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.tensor([1.0, 1.0, 0.0, 0.0], device=device).repeat(count, 1)

    def forward(self, values: Tensor) -> Tensor:
        waves = sinusoids(1000 * values.flatten(), WAVES)                   # (4 N, 256)
        return self.mlp(waves.view(len(values), -1).to(self.mlp[0].weight.dtype))  # (N, D)


class VectorEmbedder(Condition):
    """A feature of the image (N, F), such as a text or CLIP embedding; zeros stand for none."""

    has_width = True

    def __init__(self, facts: Facts):
        super().__init__(facts)
        if facts.width is None:
            raise ValueError("conditions: got vector, expected a width too, such as vector:768")
        self.width = facts.width
        self.mlp = two_layers(facts.width, facts.hidden_size)

    def none(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, self.width, device=device)

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(values.to(self.mlp[0].weight.dtype))                # (N, D)


class SpanEmbedder(Condition):
    """The time span t - r (N,) that a step covers, which the objective gives (MeanFlow, Geng et al.
    2025, arXiv 2505.13447). Without one the span is 0. The last layer starts at zero, so a model
    that was trained without spans computes at first what that model computes."""

    in_batch = False
    starts_at_zero = True

    def __init__(self, facts: Facts):
        super().__init__(facts)
        self.time_scale = facts.time_scale
        self.mlp = two_layers(WAVES, facts.hidden_size)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, device=device)

    def forward(self, span: Tensor) -> Tensor:
        waves = sinusoids(span * self.time_scale, WAVES)                    # (N, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))                 # (N, D)


CONDITIONS: dict[str, type[Condition]] = {
    "label": LabelEmbedder,
    "size": SizeEmbedder,
    "vector": VectorEmbedder,
    "span": SpanEmbedder,
}


def split_condition(word: str) -> tuple[str, int | None]:
    """The name and the width in "vector:768"; the width is None where the word has none.

    ValueError for a word that names no condition.
    """
    name, colon, width = word.partition(":")
    kind = CONDITIONS.get(name)
    if kind is None or colon and not (kind.has_width and width.isdecimal() and int(width)):
        known = ", ".join(f"{n}[:WIDTH]" if c.has_width else n for n, c in CONDITIONS.items())
        raise ValueError(f"conditions: got {word}, expected some of {known}")
    return name, int(width) if width else None
