r"""Converts a dense DiT into a DiT-MoE that computes the same function at step 0.

    python upcycle.py --ckpt results/dense --output results/upcycled --num_experts 8
    python upcycle.py --ckpt DiT-XL-2-256x256.pt --model DiT-XL/2 --output upcycled-xl \
        --num_experts 16 --num_experts_per_tok 4 --split 2 --layers deep-half
    python train.py --finetune results/upcycled --data-path data/fashion-mnist --rf ...

The dense model is a path or a hub id of our format, the official DiT, or a diffusers
DiTTransformer2DModel.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints import MODEL_FILE, Checkpoint, build_model, config_of, read_checkpoint, save_model
from checkpoints.costs import count_parameters
from diffusion import OBJECTIVES
from extras.upcycle import upcycle, upcycled_config
from options.parts import option
from presets import PRESETS
from runtime.errors import reported_as, run_main
from runtime.files import check_new_folder
from runtime.flags import parse_config
from runtime.plugins import import_plugins


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    ckpt: str = option(help="the dense model: run, file, diffusers folder or hub id")
    output: Path = option(help="folder for the sparse model")
    model: str | None = option(
        None,
        help="preset of the dense model, if the width of the weights does not identify the preset",
        choices=list(PRESETS),
    )
    num_experts: int = option(8, help="routed experts per layer", ge=1)
    num_experts_per_tok: int = option(2, help="experts per token", ge=1)
    n_shared_experts: float = option(
        2, help="width of the shared expert (its output starts at zero), in model widths", ge=0
    )
    layers: str = option(
        "all",
        help="layers that become sparse: all, every-second, shallow-half, deep-half, or numbers "
        "such as 6,8,10",
    )
    split: int = option(1, help="parts of each dense layer, one expert per part", ge=1)
    renormalize: bool = option(
        True,
        help="scale the expert weights of a token to sum to 1, which keeps the function; False in "
        "the published models",
    )
    seed: int = option(0, help="seed of the router weights", ge=0)
    plugin: tuple[str, ...] = option(
        (), metavar="FILE.py", help="Python files that define components of the dense model"
    )


def parse_args() -> UpcycleConfig:
    return parse_config(UpcycleConfig, __doc__)


@torch.inference_mode()
def difference(before: Checkpoint, after: Checkpoint) -> float:
    """Relative difference between the predictions of two models on a batch of noise."""
    config, generator = before.config, torch.Generator().manual_seed(0)
    shape = (2, *config.latent_shape)  # (N, C, h, w)
    x = torch.randn(shape, generator=generator)
    objective = before.record.objective
    kind = OBJECTIVES[objective.name if objective else "gaussian"]
    t = torch.tensor([0.3, 0.8]) * kind.noise_time
    y = torch.tensor([0, config.num_classes - 1])
    want, got = (build_model(checkpoint)(x, t, y)[0] for checkpoint in (before, after))
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def main(config: UpcycleConfig) -> None:
    import_plugins(config.plugin)
    hints = {"num_heads": config_of(config.model).num_heads} if config.model else {}
    dense = read_checkpoint(config.ckpt, hints)
    check_new_folder("--output", config.output)
    names = ("num_experts", "num_experts_per_tok", "n_shared_experts", "split", "renormalize")
    flags = {name: getattr(config, name) for name in names}
    with reported_as(f"{config.ckpt}: cannot be converted with these flags", ValueError):
        model_config = upcycled_config(dense.config, layers=config.layers, **flags)
    state_dict = upcycle(dense.state_dict, model_config, split=config.split, seed=config.seed)
    record = replace(
        dense.record, config=model_config, step=0, model=dense.record.model_name,
        initialized_from=dense.origin, settings={}, facts={}, images=None,
        ema=None, ema_start_share=None,
    )  # fmt: skip
    sparse = Checkpoint(config.output / MODEL_FILE, state_dict, record)
    error = difference(dense, sparse)
    with reported_as(f"--output: cannot write to {config.output}", OSError):
        config.output.mkdir(parents=True, exist_ok=True)
        save_model(sparse.path, sparse.state_dict, sparse.record)
    total, active = count_parameters(sparse.config)
    print(
        f"{config.output}: {total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active), experts in "
        f"layers {', '.join(map(str, sparse.config.sparse_blocks))}"
    )
    kept = "same function as" if error < 1e-5 else "different function from"
    print(f"{kept} the dense model: predictions differ by {error:.1e} of their norm")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
