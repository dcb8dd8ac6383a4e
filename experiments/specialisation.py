r"""Measures specialisation: the mutual information of class, time and position with the expert.

    python -m experiments.specialisation --runs results/experiments/runs/*-0 \
        --val-path data/test-latents --output results/experiments/specialisation.csv

Each held-out latent is noised to the middle of each of ten bins of time, and the assignments of
every sparse layer are counted. "class given position" is the information of the class about the
expert of a patch whose position is known. The trained router is compared with two baselines:
    shuffled   the choices of the trained router, but with shuffled classes and, within each image,
               shuffled times and positions; the remaining information is the bias of the estimate
    random     the trained model with newly initialised gates, and thresholds fitted to these
               images; the information comes from the similarity of the inputs
A second figure, ..._spending.png, maps the experts per token of each run by time and position.

--spans is for mean flows: the time is 1, where sampling starts, and ten spans replace the ten
times. With a span of 1, the model generates an image in one step.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor

from analysis.counts import mutual_information, run_names
from analysis.figures import save_figure
from analysis.heatmap import Heatmap, experts_per_token_cells
from analysis.recorder import RoutingRecorder, listen
from checkpoints import build_model, read_checkpoint
from diffusion import PerImageNoise, RectifiedFlow
from evaluation.heldout import BINS, latent_batches
from experiments.rows import read_log
from latents.autoencoder import LatentNorm
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from models import DiT
from options.parts import option
from routers import Routing, ThresholdRouter
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from tools.benchmarks.common import open_processes


@dataclass(frozen=True, kw_only=True)
class SpecialisationConfig:
    runs: tuple[str, ...] = option(help="run folders of flows; dense models are skipped")
    val_path: str = option(help="held-out latents")
    val_images: int = option(1000, ge=1, help="number of held-out latents to use")
    spans: bool = option(False, help="vary the span of a mean flow at time 1, instead of the time")
    output: Path = option(
        Path("results/experiments/specialisation.csv"),
        help="file of the table; the figures are written next to it",
    )


class FactorRecorder(RoutingRecorder):
    """Also counts by class and position, and by step and position: `joint`, each (R, T, L, E)."""

    def allocate(self, device: torch.device) -> None:
        super().allocate(device)
        positions, *others = self.tables["by_position"].shape
        self.joint = [
            torch.zeros(len(table), positions, *others, dtype=torch.int64, device=device)
            for table in (self.tables["by_class"], self.tables["by_step"])
        ]

    def add(self, layer: int, routing: Routing, one: Tensor, rows: dict[str, Tensor]) -> None:
        super().add(layer, routing, one, rows)
        for table, row in zip(self.joint, (rows["class"], rows["step"]), strict=True):
            index = row, rows["position"], routing.expert
            table[:, :, layer].index_put_(index, one, accumulate=True)


def middles(spans: bool) -> Tensor:
    """Returns the middles of the bins (BINS,), of spans or of times."""
    quantiles = (torch.arange(BINS) + 0.5) / BINS
    return quantiles if spans else RectifiedFlow().time_quantile(quantiles)


def call(model: DiT, latents: Tensor, labels: Tensor, bins: Tensor, spans: bool) -> Tensor:
    """Calls the model on latents (N, C, h, w) with fixed noise, and returns the times (N,).

    bins: the bins (N,) of the times or, with `spans`, of the spans; the times are then 1
    """
    value = middles(spans).to(latents.device)[bins]
    t = torch.ones_like(value) if spans else value
    noise = PerImageNoise(range(len(latents))).randn_like(latents)
    time = t[:, None, None, None]
    y = {"label": labels, "span": value} if spans else labels
    model((1 - time) * latents + time * noise, t, y)
    return t


def count_choices(
    model: DiT, latents: Tensor, labels: Tensor, *, shuffled: bool = False, spans: bool = False
) -> FactorRecorder:
    """Counts a model's choices on latents (N, C, h, w) with labels (N,), one step per bin.

    shuffled: count the choices under labels of other images, and other bins and positions
    spans: the bins are bins of the span, not of the time
    """
    images, patches = len(latents), model.config.num_patches
    bins = torch.arange(BINS, device=latents.device).expand(images, BINS)
    counted, order = labels, torch.arange(patches, device=latents.device).expand(images, patches)
    if shuffled:
        torch.manual_seed(0)
        counted = labels[torch.randperm(images, device=latents.device)]
        bins, order = (
            torch.rand(images, number, device=latents.device).argsort(1)
            for number in (BINS, patches)
        )
    recorder = FactorRecorder(model, BINS)
    recorder.start_batch(counted.tolist())

    def count(layer: int, x: Tensor, routing: Routing) -> None:
        tokens = torch.arange(images * x.shape[1], device=x.device).view(images, -1)  # (N, T)
        first = x.shape[1] - patches
        tokens[:, first:] = tokens[:, first:].gather(1, order)
        recorder.count(layer, x, routing._replace(token=tokens.flatten()[routing.token]))

    with listen(model, count):
        for step in range(BINS):
            t = call(model, latents, labels, bins[:, step], spans)
            recorder.end_step({"step": step, "t": t})
    return recorder


def bits(recorder: FactorRecorder, spans: bool = False) -> dict[str, float]:
    """Returns the information of each factor about the expert: bits, mean over layers.

    I(class; expert | position) = I(class and position; expert) - I(position; expert)
    """
    step = "span" if spans else "time"
    tables = {"class": "by_class", step: "by_step", "position": "by_position"}
    found = {name: mean_information(recorder.tables[of]) for name, of in tables.items()}
    for name, table in zip(("class", step), recorder.joint, strict=True):
        found[f"{name} given position"] = mean_information(table.flatten(0, 1)) - found["position"]
    return found


def mean_information(table: Tensor) -> float:
    """Returns the mean over the layers of counts (R, L, E)."""
    return float(mutual_information(table.cpu().numpy()).mean())


def randomise_gates(model: DiT, latents: Tensor, labels: Tensor, spans: bool) -> None:
    """Replaces the gates by newly initialised gates, and fits thresholds to these latents."""
    torch.manual_seed(0)
    new = DiT(model.config).to(latents.device)
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    others = [block.moe.gate for block in new.blocks if block.moe is not None]
    for gate, other in zip(gates, others, strict=True):
        gate.load_state_dict(other.state_dict())
    if isinstance(gates[0], ThresholdRouter):
        model.train()
        call(model, latents, labels, torch.full_like(labels, BINS // 2), spans)
        model.eval()
        for gate, seen in zip(gates, model.observed, strict=True):
            gate.threshold.copy_(seen)


@torch.no_grad()
def measure(
    path: str,
    images: CachedLatents,
    norm: LatentNorm,
    num_images: int,
    device: torch.device,
    spans: bool,
) -> dict[str, FactorRecorder]:
    """Counts the choices of a run's trained, shuffled and random router; {} for a dense model.

    norm: of the latents if the checkpoint has none
    """
    checkpoint = read_checkpoint(path)
    objective = checkpoint.record.objective
    if objective and objective.name in ("gaussian", "gaussian_v"):
        raise UserError(f"--runs: {path} was trained with {objective}, expected a flow")
    if objective and objective.options.get("noise_scale", 1) != 1:
        raise UserError(f"--runs: {path} was trained with {objective}, expected noise_scale=1")
    images.norm = checkpoint.record.norm or norm
    model, names = build_model(checkpoint, device), list(checkpoint.record.class_names)
    if spans and "span" not in model.config.conditions:
        raise UserError(f"--spans: {path} was trained with {objective}, expected mean_flow")
    if not model.config.sparse_blocks:
        print(f"{path}: skipped, because the model is dense")
        return {}
    chosen = evenly_spaced(len(images), num_images)
    (batch,) = latent_batches(images, chosen, None, names, batch_size=num_images)
    latents, labels = (batch[name].to(device) for name in ("latents", "label"))
    trained = count_choices(model, latents, labels, spans=spans)
    shuffled = count_choices(model, latents, labels, shuffled=True, spans=spans)
    randomise_gates(model, latents, labels, spans)
    random = count_choices(model, latents, labels, spans=spans)
    return {"trained": trained, "shuffled": shuffled, "random": random}


def draw(lines: DataFrame, path: Path) -> None:
    """Draws one panel per factor, with a group of three bars per run."""
    figure = Figure(figsize=(18, 3.4), layout="tight")
    factors = lines.columns.drop(["run", "router"])
    axes = figure.subplots(1, len(factors), sharey=True)
    for axis, factor in zip(axes, factors, strict=True):
        bars = lines.pivot_table(factor, "run", "router", sort=False)
        bars = bars.set_axis(run_names(list(bars.index)))
        title = f"bits of {factor} about expert"
        bars.plot.bar(ax=axis, width=0.8, rot=35, xlabel="", title=title, legend=axis is axes[0])
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def parse_args() -> SpecialisationConfig:
    return parse_config(SpecialisationConfig, __doc__)


def main(config: SpecialisationConfig) -> None:
    prepare_output("--output", config.output)
    for run in config.runs:
        read_log(Path(run))  # refuses a run that was changed
    device = open_processes().device
    images = CachedLatents(config.val_path, "--val-path")
    lines, per_token, norm = [], {}, images.norm
    for run in config.runs:
        found = measure(run, images, norm, config.val_images, device, config.spans)
        name = Path(run).name
        for kind, recorder in found.items():
            lines.append({"run": name, "router": kind, **bits(recorder, config.spans)})
            print(*(f"{v:.4f}" if isinstance(v, float) else f"{v:16}" for v in lines[-1].values()))
        if found:
            counts = found["trained"].tables["by_step_and_position"].cpu().numpy()  # (bins, T, L)
            per_token[name] = counts.mean(-1) / len(found["trained"].labels)
            DataFrame(lines).to_csv(config.output, index=False)
    if not lines:
        raise UserError(f"--runs: got only dense models ({', '.join(config.runs)})")
    picture = config.output.with_suffix(".png")
    draw(DataFrame(lines), picture)
    times = middles(config.spans).flip(0).tolist()
    maps = np.stack(list(per_token.values()))[:, ::-1]  # (runs, bins, T), largest time first
    spending = picture.with_stem(f"{picture.stem}_spending")
    down = ("", run_names(list(per_token)))
    side = math.isqrt(maps.shape[-1])  # the experiments use square images
    cells = experts_per_token_cells(maps, (side, side), times, maps.mean())
    cells |= {"across": ("span", np.round(times, 3))} if config.spans else {}
    heatmap = Heatmap(title="", down=down, **cells)
    save_figure(heatmap.draw(), spending)
    print(f"written: {config.output}, {picture}, {spending}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
