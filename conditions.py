"""Conditions: the inputs of a DiT, other than the time, that describe an image.

    model = DiT(conditions=("label", "size", "vector:768"))
    prediction, aux_loss = model(x, t, {"label": y, "size": size, "vector": vector})

A condition embeds one named tensor of the batch. The model adds its vectors, one per image, to the
embedding of the time. A condition may also return a `TokenSequence`, whose tokens the blocks attend
to (PixArt-alpha, Chen et al. 2023, arXiv 2310.00426). To add a condition, write a subclass of
`Condition` with `default`, `forward` and, if guidance drops the condition, `none`, and add it to
`CONDITIONS`. The image source or the latent cache provides the tensor of that name. A condition
that owns a parameter or a buffer sets it in `reset_parameters`.

Shape legend: N batch, D width of the model, F width of a feature, L length of a sequence
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options.parts import Registry

Conditions = Tensor | Mapping[str, Tensor]  # labels (N,), or a tensor per condition, by name
WAVES = 256  # number of sinusoids that represent one scalar


def sinusoids(t: Tensor, dim: int, frequency_shift: int = 0) -> Tensor:
    """Returns the cosines, then the sines, of real t (N,) at dim/2 frequencies: (N, dim)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) / (half - frequency_shift) * steps)
    angles = t[:, None].float() * frequencies                               # (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class EmbedderLinear(nn.Linear):
    """Linear layer of an embedder, which starts with the standard deviation 0.02."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


def two_layers(
    inputs: int, hidden_size: int, last: type[nn.Linear] = EmbedderLinear
) -> nn.Sequential:
    return nn.Sequential(
        EmbedderLinear(inputs, hidden_size), nn.SiLU(), last(hidden_size, hidden_size)
    )


class TimestepEmbedder(nn.Module):
    """Embeds times (N,) by sinusoids and an MLP, without rescaling the times."""

    def __init__(self, hidden_size: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = two_layers(WAVES, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        t_freq = sinusoids(t, WAVES, self.frequency_shift)                  # (N, 256)
        return self.mlp(t_freq.to(self.mlp[0].weight.dtype))                # (N, D)


class EmbedderConfig(NamedTuple):
    """What a condition knows of its model."""

    hidden_size: int
    num_classes: int
    dropout_prob: float  # probability that the conditions of an image are dropped
    time_scale: float  # factor applied to times before they are embedded
    shape: tuple[int, ...]  # (F,) = (768,) of "vector:768"; (L, F) = (256, 768) of "tokens:256x768"


class TokenSequence(NamedTuple):
    """Tokens that the blocks attend to, and a vector that joins the embedding of the time."""

    vector: Tensor  # (N, D)
    tokens: Tensor  # (N, L, D)
    mask: Tensor  # (N, L) bool, true for a token, false for padding; at least one token per image


class Condition(nn.Module):
    """Base class: embeds the named tensor (N, ...) into vectors (N, D) or a `TokenSequence`."""

    is_sequence = False  # whether `forward` returns a `TokenSequence`
    in_batch = True  # False: the objective or the sampler provides the tensor
    # What follows the name: ("WIDTH",) in "vector:768", ("LENGTH", "WIDTH") in "tokens:256x768".
    axes: tuple[str, ...] = ()

    def __init__(self, config: EmbedderConfig):
        super().__init__()

    def none(self, values: Tensor) -> Tensor:
        """Returns what replaces values (N, ...) that are dropped; the base class keeps them."""
        return values

    def in_training(self, values: Tensor) -> Tensor:
        """Returns the values (N, ...) that training sees; the base class changes nothing."""
        return values

    def default(self, count: int, device: torch.device) -> Tensor:
        """Returns values (count, ...) for images whose condition is not specified."""
        raise NotImplementedError


class LabelEmbedder(Condition):
    """Embeds labels. With label dropout, the additional index num_classes means "no class"."""

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        self.num_classes = config.num_classes
        rows = config.num_classes + (config.dropout_prob > 0)
        self.embedding_table = nn.Embedding(rows, config.hidden_size)

    def none(self, values: Tensor) -> Tensor:
        return torch.full_like(values, self.num_classes)

    def default(self, count: int, device: torch.device) -> Tensor:
        raise ValueError("conditions: got no label, expected the label of each image")

    def forward(self, labels: Tensor) -> Tensor:
        """Embeds labels (N,) in [0, num_classes]; returns (N, D)."""
        return self.embedding_table(labels)


class VectorEmbedder(Condition):
    """Embeds an image feature (N, F), such as a text or CLIP embedding; zeros mean no feature."""

    axes = ("WIDTH",)

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        (self.width,) = config.shape
        self.mlp = two_layers(self.width, config.hidden_size)

    def none(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, self.width, device=device)

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(values.to(self.mlp[0].weight.dtype))                # (N, D)


class SequenceEmbedder(Condition):
    """Base class of sequences, which start with a learned null token.

    The null token alone stands for "none". The vector starts at zero, as does what the blocks add:
    a new model equals the one without the condition.
    """

    is_sequence = True
    drawn_last = True  # so that the same seed gives the same other weights

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        width = config.hidden_size
        self.length = config.shape[0]
        self.null = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, self.length, width))
        self.pool = two_layers(width, width, last=ZeroLinear)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.null, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def none(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens (N, L, D), without their positions, and their mask (N, L)."""
        raise NotImplementedError

    def forward(self, values: Tensor) -> TokenSequence:
        tokens, mask = self.embed(values)
        null = self.null.to(tokens.dtype).expand(tokens.shape[0], -1, -1)   # (N, 1, D)
        tokens = torch.cat([null, tokens + self.positions.to(tokens.dtype)], dim=1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])                    # (N, 1 + L, D)
        mask = F.pad(mask, (1, 0), value=True)                              # (N, 1 + L)
        weight = mask.unsqueeze(2).to(tokens.dtype)
        mean = (tokens * weight).sum(1) / weight.sum(1)                     # (N, D)
        return TokenSequence(self.pool(mean.to(self.pool[0].weight.dtype)), tokens, mask)


class WordsEmbedder(SequenceEmbedder):
    """Embeds the numbers (N, L) of the words of a caption, from 1; 0 is no word.

    "text:LENGTHxWORDS"; `latents.words` numbers the words. An unknown word is no word. In training
    each word is left out with the probability of dropped conditions, so that a caption in which
    words are unknown is no surprise.
    """

    axes = ("LENGTH", "WORDS")

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        self.num_words, self.dropout_prob = config.shape[1], config.dropout_prob
        self.table = nn.Embedding(self.num_words + 1, config.hidden_size)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, self.length, dtype=torch.int64, device=device)

    def in_training(self, values: Tensor) -> Tensor:
        is_kept = torch.rand(values.shape, device=values.device) >= self.dropout_prob
        values = values * is_kept                                           # (N, L)
        return values.gather(1, (values == 0).long().argsort(dim=1, stable=True))

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(values.long()), values > 0


class TokensEmbedder(SequenceEmbedder):
    """Embeds features (N, L, F) of tokens; a row of zeros is no token."""

    axes = ("LENGTH", "WIDTH")

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        self.width = config.shape[1]
        self.project = EmbedderLinear(self.width, config.hidden_size)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, self.length, self.width, device=device)

    def embed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(values.to(self.project.weight.dtype)), values.ne(0).any(-1)


CONDITIONS = Registry(
    {"label": LabelEmbedder, "vector": VectorEmbedder, "text": WordsEmbedder,
     "tokens": TokensEmbedder},
    elsewhere={"size": "extras.size", "span": "extras.mean_flow"},
)


def split_condition(spec: str) -> tuple[str, tuple[int, ...]]:
    """Splits "vector:768" into name and shape, which is () without numbers."""
    name, colon, numbers = spec.partition(":")
    kind, sizes = CONDITIONS.get(name), numbers.split("x") if colon else []
    is_known = kind is not None and len(sizes) in (0, len(kind.axes))
    if not is_known or not all(size.isdecimal() and int(size) for size in sizes):
        known = ", ".join(f"{n}[:{'x'.join(c.axes)}]" if c.axes else n
                          for n, c in CONDITIONS.items())  # fmt: skip
        raise ValueError(f"conditions: got {spec}, expected some of {known}")
    return name, tuple(map(int, sizes))


def spell_condition(name: str, shape: tuple[int, ...]) -> str:
    """Returns "vector:768" for the shape (..., 768) of the values of one image."""
    numbers = "x".join(map(str, shape[len(shape) - len(CONDITIONS[name].axes) :]))
    return f"{name}:{numbers}" if numbers else name


def without_conditions(
    conditions: Mapping[str, Condition], y: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Replaces the conditions of all images by null values, such as the label "no class".

    conditions: of a model, `DiT.conditions`
    y: tensors (N, ...) by name; the result contains only the conditions of the model

    "size" and "span" have no null values and stay as they are, see `Condition.none`.
    """
    return {name: one.none(y[name]) for name, one in conditions.items() if name in y}


def drop_conditions(
    conditions: Mapping[str, Condition], y: Mapping[str, Tensor], probability: float
) -> dict[str, Tensor]:
    """Replaces the conditions of random images by null values; see `without_conditions`.

    All conditions of an image are dropped together. In a model with sequences beside others, such
    as a text beside the label, as many images lose only the sequences, and as many only the others,
    so that either suffices to sample. Training calls this once per micro-batch, with the
    probability `DiTConfig.dropout`.
    """
    none = without_conditions(conditions, y)
    if not probability or not none:
        return {name: y[name] for name in none}
    count, device = next((len(value), value.device) for value in none.values())
    is_dropped = torch.rand(count, device=device) < probability             # (N,)
    dropped = dict.fromkeys(none, is_dropped)
    if len({conditions[name].is_sequence for name in none}) == 2:
        alone = torch.rand(count, device=device)                            # (N,)
        for name in none:
            part = alone if conditions[name].is_sequence else 1 - alone
            dropped[name] = is_dropped | (part < probability)
    kept = {name: conditions[name].in_training(y[name]) for name in none}
    return {
        name: torch.where(dropped[name].view(-1, *[1] * (value.ndim - 1)), value, kept[name])
        for name, value in none.items()
    }
