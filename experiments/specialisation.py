r"""What experts specialise in: how many bits class, time and position tell of a token's expert.

    python -m experiments.specialisation --runs results/experiments/runs/*-0 \
        --val-path data/test-latents --output results/experiments/specialisation

Question 7, on what questions 1 and 2 trained. Held-out latents are noised to the middle of ten bins
of time, every image to all of them, and each sparse layer's assignments are counted. Beside the
trained router stand two things that know nothing of the data:
    shuffled   labels, times and positions dealt out anew, an image's or a token's rows together;
               what is left is the upward bias of the estimate
    random     the same model, its gates drawn anew: what similar inputs alone bring together
"""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.recorder import listen
from analysis.statistics import mutual_information
from benchmarks.common import open_device
from checkpoints import build_model, read_checkpoint
from diffusion import PerImageNoise, RectifiedFlow
from evaluation.heldout import BINS, latent_batches
from latents.cache import CachedLatents
from models import DiT
from routers import Routing
from runtime.errors import UserError, exit_on_user_error
from runtime.flags import flag, parse_config, positive_int

FACTORS = ("class", "time", "position")


@dataclass(frozen=True, kw_only=True)
class SpecialisationConfig:
    runs: tuple[str, ...] = flag(nargs="+", help="run folders of rectified flow with experts")
    val_path: str = flag(help="held-out latents")
    val_images: int = flag(1000, type=positive_int, help="how many of them to take")
    output: Path = flag(Path("results/experiments/specialisation"), help=".csv and .png")


class Assignments:
    """Counts of (value of a factor, layer, expert) for a model, on the images it is shown."""

    def __init__(self, model: DiT, num_classes: int, shuffle: bool):
        self.num_tokens, self.shuffle = model.x_embedder.num_patches, shuffle
        sizes = dict(zip(FACTORS, (num_classes, BINS, self.num_tokens), strict=True))
        shape = (len(model.config.sparse_layers), model.config.experts_per_layer)
        self.tables = {name: torch.zeros(size, *shape) for name, size in sizes.items()}

    def show(self, model: DiT, latents: Tensor, labels: Tensor) -> None:
        """Runs the model on latents (N, C, h, w) at every bin of time, and counts."""
        noise = PerImageNoise(range(len(latents))).randn_like(latents)
        for step in range(BINS):
            t = RectifiedFlow().time_at(torch.full((len(latents),), (step + 0.5) / BINS))
            time = t[:, None, None, None]
            count = partial(self.count, labels, torch.full_like(labels, step))
            handles = listen(model, count)
            model((1 - time) * latents + time * noise, t, labels)
            for handle in handles:
                handle.remove()

    def count(self, labels: Tensor, steps: Tensor, layer: int, x: Tensor, routing: Routing) -> None:
        """Adds a layer's rows; x is the block's output (N, T, D)."""
        image, position = routing.token // self.num_tokens, routing.token % self.num_tokens
        values = {"class": labels[image], "time": steps[image], "position": position}
        if self.shuffle:
            generator = torch.Generator().manual_seed(layer)
            dealt = torch.randperm(len(labels), generator=generator)
            values["class"] = labels[dealt][image]
            values["time"] = torch.randint(BINS, (len(labels),), generator=generator)[image]
            token = torch.randint(self.num_tokens, x.shape[:2], generator=generator).flatten()
            values["position"] = token[routing.token]
        for name, value in values.items():
            one = torch.ones(len(value))
            self.tables[name][:, layer].index_put_((value, routing.expert), one, accumulate=True)

    def bits(self) -> dict[str, float]:
        """Mutual information of each factor with the expert, the mean over layers."""
        return {name: mutual_information(t.numpy()).mean() for name, t in self.tables.items()}


@torch.no_grad()
def measure(path: str, latents: Tensor, labels: Tensor) -> list[dict]:
    """Three lines of a run: its router, shuffled factors, and a random router."""
    model = build_model(read_checkpoint(path)).float().eval()
    if not model.config.sparse_layers:
        raise UserError(f"--runs: got {path}, dense, expected experts in it")
    lines = []
    for kind in ("trained", "shuffled", "random"):
        if kind == "random":
            torch.manual_seed(0)
            for block in model.blocks:
                if block.moe is not None:
                    block.moe.gate.reset_parameters()
        found = Assignments(model, model.config.num_classes, kind == "shuffled")
        found.show(model, latents, labels)
        lines.append({"run": Path(path).name, "router": kind, **found.bits()})
        print(*(f"{v:.4f}" if isinstance(v, float) else f"{v:16}" for v in lines[-1].values()))
    return lines


def draw(lines: list[dict], path: Path) -> None:
    """Draws a panel for each factor: a group of three bars for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = list(dict.fromkeys(line["run"] for line in lines))
    figure, axes = plt.subplots(1, len(FACTORS), figsize=(12, 3.4), sharey=True)
    for axis, factor in zip(axes, FACTORS, strict=True):
        for place, kind in enumerate(("trained", "random", "shuffled")):
            bits = [line[factor] for line in lines if line["router"] == kind]
            axis.bar([i + 0.27 * place for i in range(len(runs))], bits, 0.25, label=kind)
        axis.set_xticks([i + 0.27 for i in range(len(runs))], runs, rotation=35, ha="right")
        axis.set(title=f"what the {factor} tells of the expert, bits")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args() -> SpecialisationConfig:
    return parse_config(SpecialisationConfig, __doc__)


@exit_on_user_error
def main(config: SpecialisationConfig) -> None:
    open_device()
    images, lines = CachedLatents(config.val_path), []
    number = config.val_images
    batches = latent_batches(images, None, images.classes, num_images=number, batch_size=number)
    latents, labels = next(batches)
    for run in config.runs:
        lines += measure(run, latents, labels)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    draw(lines, config.output.with_suffix(".png"))
    print(f"written: {config.output}.csv, {config.output}.png")


if __name__ == "__main__":
    main(parse_args())
