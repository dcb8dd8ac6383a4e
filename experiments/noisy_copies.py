r"""Adds noise to the routed experts of a model, so that upcycled copies differ from the start.

    python -m experiments.noisy_copies --ckpt results/upcycled --noise 0.01 \
        --output results/upcycled-noise
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import MODEL_FILE, read_checkpoint, save_model
from options.parts import option
from runtime.errors import run_main
from runtime.files import check_new_folder
from runtime.flags import parse_config


@dataclass(frozen=True, kw_only=True)
class NoisyCopiesConfig:
    ckpt: str = option(help="a sparse model, from upcycle.py")
    noise: float = option(0.01, ge=0, help="standard deviation, relative to that of each weight")
    seed: int = option(0, ge=0, help="seed of the noise")
    output: Path = option(help="folder of the new model")


def with_noise(weights: dict[str, Tensor], noise: float, seed: int) -> dict[str, Tensor]:
    """Adds normal noise to routed experts; its deviation is `noise` times that of each tensor."""
    generator, result = torch.Generator().manual_seed(seed), dict(weights)
    for name, weight in weights.items():
        if ".moe.experts." in name:
            drawn = torch.randn(weight.shape, generator=generator)  # (E, ...)
            result[name] = weight + noise * weight.std() * drawn
    return result


def main(config: NoisyCopiesConfig) -> None:
    source = read_checkpoint(config.ckpt)
    check_new_folder("--output", config.output)
    config.output.mkdir(parents=True)
    record = replace(source.record, initialized_from=source.origin)
    noised = with_noise(source.state_dict, config.noise, config.seed)
    save_model(config.output / MODEL_FILE, noised, record)


def parse_args() -> NoisyCopiesConfig:
    return parse_config(NoisyCopiesConfig, __doc__)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
