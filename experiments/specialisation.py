r"""What experts specialise in: how many bits class, time and position tell of a token's expert.

    python -m experiments.specialisation --runs results/experiments/runs/*-0 \
        --val-path data/test-latents --output results/experiments/specialisation.csv

Held-out latents are noised to the middle of ten bins of time, each image to all of them, and every
sparse layer's assignments are counted. Beside the trained router stand two that know nothing:
    shuffled   the trained one's choices, but each image has the class of another, and in each image
               times and positions change places: what is left is the estimate's upward bias
    random     the model with the gates of a new one, thresholds fitted to these images: what
               likeness of the inputs brings together by itself
A second picture, ..._spending.png, maps the experts per token of each run by time and position.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis.heatmap import draw_experts_per_token, save_figure
from analysis.recorder import listen
from analysis.statistics import mutual_information, run_names
from benchmarks.common import open_device
from checkpoints import build_model, read_checkpoint
from diffusion import PerImageNoise, RectifiedFlow
from evaluation.heldout import BINS, latent_batches
from experiments.report import write_csv
from latents.cache import CachedLatents
from models import DiT
from routers import Routing, ThresholdRouter
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import flag, parse_config

FACTORS = ("class", "time", "position")


@dataclass(frozen=True, kw_only=True)
class SpecialisationConfig:
    runs: tuple[str, ...] = flag(help="run folders of rectified flow; dense ones are passed over")
    val_path: str = flag(help="held-out latents")
    val_images: int = flag(1000, least=1, help="how many of them to take")
    output: Path = flag(
        Path("results/experiments/specialisation.csv"), help="the table; a .png stands beside it"
    )


def noised(latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w) in the middle of a bin of time, and that time (N,); noises are fixed."""
    t = (
        RectifiedFlow()
        .time_quantile(torch.full((len(latents),), (step + 0.5) / BINS))
        .to(latents.device)
    )
    noise = PerImageNoise(range(len(latents))).randn_like(latents)
    time = t[:, None, None, None]
    return (1 - time) * latents + time * noise, t


class Assignments:
    """Counts (value of a factor, layer, expert) of a model's choices on labelled latents.

    `experts_per_token` (bins, T) is the mean over layers and images.
    """

    def __init__(self, model: DiT, latents: Tensor, labels: Tensor, *, shuffled: bool):
        images, patches = len(latents), model.x_embedder.num_patches
        self.labels, device = labels, latents.device
        self.times = torch.arange(BINS, device=device).expand(images, BINS)  # (N, bins)
        self.positions = torch.arange(patches, device=device).expand(images, patches)  # (N, T)
        if shuffled:
            torch.manual_seed(0)
            self.labels = labels[torch.randperm(images, device=device)]
            self.times, self.positions = (
                torch.rand(places.shape, device=device).argsort(1)
                for places in (self.times, self.positions)
            )
        shape = (len(model.config.sparse_layers), model.config.experts_per_layer)
        sizes = zip(FACTORS, (model.config.num_classes, BINS, patches), strict=True)
        self.tables = {
            name: torch.zeros(size, *shape, dtype=torch.int64, device=device)
            for name, size in sizes
        }
        self.experts_per_token = torch.zeros(BINS, patches, device=device)
        for step in range(BINS):
            with listen(model, partial(self.count, step)):
                model(*noised(latents, step), labels)

    def count(self, step: int, layer: int, x: Tensor, routing: Routing) -> None:
        """Adds a layer's rows; x is the block's output (N, T, D)."""
        image, position = routing.token // x.shape[1], routing.token % x.shape[1]
        values = {
            "class": self.labels[image],
            "time": self.times[image, step],
            "position": self.positions[image, position],
        }
        spent = torch.bincount(position, minlength=x.shape[1]) / len(x)
        self.experts_per_token[step] += spent / len(self.tables["class"][0])
        one = torch.ones_like(image)
        for name, value in values.items():
            self.tables[name][:, layer].index_put_((value, routing.expert), one, accumulate=True)

    def bits(self) -> dict[str, float]:
        """Mutual information of each factor with the expert, the mean over layers."""
        tables = {name: table.cpu().numpy() for name, table in self.tables.items()}
        return {name: float(mutual_information(table).mean()) for name, table in tables.items()}


def randomise_gates(model: DiT, latents: Tensor, labels: Tensor) -> None:
    """Gives a model the gates of a new one; thresholds become those of its training rule here."""
    torch.manual_seed(0)
    new = DiT(**vars(model.config)).to(latents.device)
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    others = [block.moe.gate for block in new.blocks if block.moe is not None]
    for gate, other in zip(gates, others, strict=True):
        gate.load_state_dict(other.state_dict())
    if isinstance(gates[0], ThresholdRouter):
        model.train()
        model(*noised(latents, BINS // 2), labels)
        model.eval()
        for gate, seen in zip(gates, model.observed, strict=True):
            gate.threshold.copy_(seen)


@torch.no_grad()
def measure(
    path: str, images: CachedLatents, num_images: int, device: torch.device
) -> tuple[list[dict], np.ndarray | None]:
    """Measures a run; of a dense one there is nothing.

    Returns three lines, its router, shuffled, and a random router, and its experts per token.
    """
    checkpoint = read_checkpoint(path)
    model, names = build_model(checkpoint, device), list(checkpoint.record.class_names)
    if not model.config.sparse_layers:
        print(f"{path}: dense, passed over")
        return [], None
    batches = latent_batches(images, None, names, num_images=num_images, batch_size=num_images)
    latents, labels = (tensor.to(device) for tensor in next(batches))
    lines, spent = [], None
    for kind in ("trained", "shuffled", "random"):
        if kind == "random":
            randomise_gates(model, latents, labels)
        found = Assignments(model, latents, labels, shuffled=kind == "shuffled")
        if kind == "trained":
            spent = found.experts_per_token.cpu().numpy()
        lines.append({"run": Path(path).name, "router": kind, **found.bits()})
        print(*(f"{v:.4f}" if isinstance(v, float) else f"{v:16}" for v in lines[-1].values()))
    return lines, spent


def draw(lines: list[dict], path: Path) -> None:
    """Draws a panel for each factor: a group of three bars for each run."""
    runs = list(dict.fromkeys(line["run"] for line in lines))
    figure = Figure(figsize=(12, 3.4), layout="tight")
    axes = figure.subplots(1, len(FACTORS), sharey=True)
    for axis, factor in zip(axes, FACTORS, strict=True):
        for place, kind in enumerate(("trained", "random", "shuffled")):
            bits = [line[factor] for line in lines if line["router"] == kind]
            axis.bar([i + 0.27 * place for i in range(len(runs))], bits, 0.25, label=kind)
        axis.set_xticks(
            [i + 0.27 for i in range(len(runs))], run_names(runs), rotation=35, ha="right"
        )
        axis.set(title=f"what the {factor} tells of the expert, bits")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def parse_args() -> SpecialisationConfig:
    return parse_config(SpecialisationConfig, __doc__)


def main(config: SpecialisationConfig) -> None:
    prepare_output("--output", config.output)
    device, images, lines, spent = open_device(), CachedLatents(config.val_path), [], {}
    for run in config.runs:
        found, spent_by_run = measure(run, images, config.val_images, device)
        if found:
            lines += found
            spent[Path(run).name] = spent_by_run
            write_csv(config.output, lines)
    if not lines:
        raise UserError(f"--runs: got {', '.join(config.runs)}, expected one with experts in it")
    picture = config.output.with_suffix(".png")
    draw(lines, picture)
    times = RectifiedFlow().time_quantile((torch.arange(BINS) + 0.5) / BINS).flip(0).tolist()
    maps = np.stack(list(spent.values()))[:, ::-1]  # (runs, bins, T), from noise to image
    spending = picture.with_stem(f"{picture.stem}_spending")
    save_figure(draw_experts_per_token(maps, run_names(list(spent)), times, maps.mean()), spending)
    print(f"written: {config.output}, {picture}, {spending}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
