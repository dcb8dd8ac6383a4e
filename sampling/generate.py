"""Sampling: labels and seeds to latents, for sample.py, training grids, evaluation and analysis."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conditions import without_conditions
from diffusion import (
    OBJECTIVES,
    Objective,
    PerImageNoise,
    classifier_free_guidance,
    guidance_within,
)
from diffusion.samplers import Times
from models import DiT, DiTConfig
from options.parts import Word
from runtime.errors import UserError, did_you_mean


@dataclass(frozen=True)
class SamplerSettings:
    """Sampler settings. `resolve_settings` replaces None by the default and checks all values."""

    objective: str  # a word, such as rectified_flow:shift=3
    sampler: str | None = None  # None: the objective's first sampler
    num_steps: int | str | None = None  # None: the sampler's default
    # None: 1.5, or 1 (no guidance) if the model cannot be guided or was trained with guidance.
    cfg_scale: float | None = None
    guided_channels: int | str | None = None  # the first N, or "all"; None: the objective's default
    guidance_interval: tuple[float, float] | None = None  # None: the objective's default
    time_shift: float | None = None  # shift of a flow's times; None: the shift of training
    respacing: str | None = None  # spec such as "10,5,3", for num_steps None or 18


def resolve_settings(
    settings: SamplerSettings, config: DiTConfig, guide: DiTConfig | None = None
) -> SamplerSettings:
    """Checks settings, and fills in all defaults for a model. Resolved settings stay the same.

    guide: config of the guiding model, or None
    """
    objective, most = objective_of(settings), config.in_channels
    name = settings.sampler or next(iter(objective.samplers))
    if name not in objective.samplers:
        raise UserError(
            f"--sampler: got {name}, expected one of {', '.join(objective.samplers)} for a "
            f"model trained with {settings.objective.partition(':')[0]}"
        )
    settings = replace(settings, sampler=name)
    times = times_of(settings, objective)
    can_guide = config.dropout > 0 or guide is not None
    cfg_scale = settings.cfg_scale
    if cfg_scale is None:
        cfg_scale = 1.5 if can_guide and not objective.guides_in_training else 1.0
    if guide is not None and cfg_scale == 1:
        raise UserError("--guide-ckpt: has no effect with --cfg-scale 1; choose another scale")
    if cfg_scale != 1 and not can_guide:
        raise UserError(
            f"--cfg-scale: got {cfg_scale}, expected 1, because the model was trained without "
            "label dropout"
        )
    interval = settings.guidance_interval or objective.guidance_interval
    try:  # check now, before sampling starts
        guidance_within(interval, cfg_scale)
    except ValueError as error:
        raise UserError(f"--guidance-interval: {error}") from None
    published = most if guide else min(objective.guided_channels or most, most)
    channels = {None: published, "all": most}.get(
        settings.guided_channels, settings.guided_channels
    )
    if channels not in range(1, most + 1):
        raise UserError(f"--guided-channels: got {channels}, expected 1 to {most}, or all")
    spec = settings.num_steps if isinstance(settings.num_steps, str) else settings.respacing
    found = dict(num_steps=times.num_steps, cfg_scale=cfg_scale, guided_channels=channels,
                 guidance_interval=interval)  # fmt: skip
    return replace(settings, **found, respacing=spec)


def objective_of(settings: SamplerSettings) -> Objective:
    return Word.parse(settings.objective, OBJECTIVES).make(OBJECTIVES)


def times_of(settings: SamplerSettings, objective: Objective) -> Times:
    sampler, steps = objective.samplers[settings.sampler], settings.num_steps
    try:
        if settings.respacing is not None:
            times = objective.sampling_times(sampler, settings.respacing, settings.time_shift)
            if steps in (None, times.num_steps):
                return times
        return objective.sampling_times(sampler, steps, settings.time_shift)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from None


def parse_labels(
    names: Sequence[int | str] | Tensor, class_names: Sequence[str], source: str = "--class-labels"
) -> list[int]:
    """Converts labels, given as numbers or case-insensitive names, to numbers.

    source: flag or argument that the labels came from, for error messages
    """
    names = as_list(names, source, "a list of classes, by number or name")
    numbers: dict[int | str, int] = {str(i): i for i in range(len(class_names))}
    numbers |= {name.lower(): i for i, name in enumerate(class_names)}
    numbers |= {name: i for i, name in enumerate(class_names)}
    numbers |= {i: i for i in range(len(class_names))}  # an integer is never a name
    labels = [
        numbers.get(name, numbers.get(name.lower()) if isinstance(name, str) else None)
        if isinstance(name, str | int) else None
        for name in names
    ]  # fmt: skip
    if None in labels:
        wrong = str(names[labels.index(None)])
        similar = {} if wrong.isdecimal() else {name.lower(): name for name in class_names}
        hint = did_you_mean(wrong.lower(), similar)
        last, shown = len(class_names) - 1, ", ".join(class_names[:20])
        known = f"0 to {last} or one of {shown}" if last else f"0 or {shown}"
        more = ", ..." if last >= 20 else ""
        raise UserError(f"{source}: got {wrong:.80}, expected {known}{more}{hint}")
    return labels


def seeds_of(seeds: Sequence[int] | Tensor | torch.Generator, count: int) -> list[int]:
    """Returns the seeds of `count` images, from a sequence or drawn from a generator."""
    if isinstance(seeds, torch.Generator):
        return torch.randint(2**31, (count,), generator=seeds, device=seeds.device).tolist()
    seeds = as_list(seeds, "seeds", "a list of integers, one per label")
    if len(seeds) != count:
        raise UserError(f"seeds: got {len(seeds)}, expected {count}, one per label")
    if wrong := [seed for seed in seeds if not isinstance(seed, int)]:
        raise UserError(f"seeds: got {wrong[0]!r:.80}, expected integers")
    return seeds


def as_list(values: Sequence | Tensor, source: str, expected: str) -> list:
    """Converts a sequence, tensor or array to a list of Python values."""
    values = values.tolist() if hasattr(values, "tolist") else values  # tensors and arrays
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UserError(f"{source}: got {values!r:.80}, expected {expected}")
    return [value.item() if hasattr(value, "item") else value for value in values]


def checked_conditions(model: DiT, given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Moves conditions to the model's device; repeats a condition of one image for all images."""
    device = next(model.parameters()).device
    # Labels are a separate argument.
    known = {name: one for name, one in model.conditions.items() if name != "label"}
    if not isinstance(given, Mapping):
        raise UserError(f"conditions: got {given!r:.80}, expected tensors by name")
    checked = {}
    for name, value in given.items():
        if name not in known:
            names = ", ".join(known) or "no condition besides the label"
            raise UserError(f"conditions: got {name}, but the model has {names}")
        expected = tuple(known[name].default(count, torch.device("cpu")).shape)
        if (got := tuple(getattr(value, "shape", ()))) not in (expected, expected[1:]):
            raise UserError(f"conditions: got {name} of shape {got}, expected {expected}")
        checked[name] = value.to(device).expand(expected)
    return checked


def no_class(config: DiTConfig) -> int:
    """Returns the label of an image without a class."""
    if "label" not in config.conditions:
        return 0  # which the model does not read
    if not config.dropout:
        raise UserError("labels: got none, expected a class: the model was trained without dropout")
    return config.num_classes


@torch.no_grad()  # not inference_mode: weights that FSDP gathers in it could not be trained later
def generate(
    model: DiT,
    labels: Sequence[int | None],
    seeds: Sequence[int],
    settings: SamplerSettings,
    *,
    conditions: Mapping[str, Tensor] | None = None,
    negative: Mapping[str, Tensor] | None = None,
    guide: DiT | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples one latent for each (label, seed); returns (N, C, h, w) fp32.

    All random numbers of an image come from its seed, so it does not depend on the rest of the
    batch, unless the router does (`DiT.depends_on_batch`). The sampler's state is fp32 for any
    precision of the model. With guidance the model gets the batch [conditional; unconditional];
    without guidance, or with a `guide`, only the conditional half.

    labels: None for no class
    conditions: tensors (N, ...), or (...) for all images, of further conditions, by name; missing
        ones get their default
    negative: the same for the unconditional half, in place of null values
    guide: weaker model to guide by, or None
    callback: called after each step, see `diffusion.samplers`
    progress: show a progress bar
    """
    config = model.config
    settings = resolve_settings(settings, config, guide and guide.config)
    known = range(config.num_classes)
    if wrong := [label for label in labels if label is not None and label not in known]:
        raise UserError(f"labels: got {wrong[0]}, expected 0 to {config.num_classes - 1}")
    labels = [no_class(config) if label is None else label for label in labels]
    device = next(model.parameters()).device
    y = {"label": torch.tensor(labels, device=device)}  # (N,)
    y |= checked_conditions(model, conditions or {}, len(labels))
    objective = objective_of(settings)
    scale = guidance_within(settings.guidance_interval, settings.cfg_scale, objective.noise_time)
    null_y, second = y, guide
    if guide is None and settings.cfg_scale != 1:
        null_y = {**y, **without_conditions(model.conditions, y)}
        null_y |= checked_conditions(model, negative or {}, len(labels))
        if model.depends_on_batch and not objective.guides_in_one_batch:
            second = model
    denoise = classifier_free_guidance(
        model, y, null_y, scale, settings.guided_channels, guide=second
    )
    try:
        noise = PerImageNoise(seeds)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    factor = objective.noise_scale
    z = factor * noise.randn(config.latent_shape, device)
    return objective.samplers[settings.sampler](
        objective.denoiser(denoise), z, times_of(settings, objective), callback,
        noise_fn=lambda x: factor * noise.randn_like(x), progress=progress,
    )  # fmt: skip
