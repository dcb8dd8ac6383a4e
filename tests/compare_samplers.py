r"""Compares samplers on a checkpoint: KID and classifier accuracy by evaluations and by guidance.

    python tests/compare_samplers.py --ckpt results/demo --reference held_out.npz \
        --classifier results/classifier.pt --output results/compare.csv
    python tests/compare_samplers.py --plot flow.csv gaussian.csv --cfg-scale 2 --output plot.png

Each row draws the same seeds and labels. KID is of the efficientnet-lite0 backbone. Rows that the
.csv has already are not drawn again. The classifier is that of tests/score_samples.py.
"""

import csv
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from score_samples import Classifier, classify

from diffusion import function_evaluations
from evaluation.features import load_extractor
from evaluation.generation import labels_of
from evaluation.metrics import Statistics, collect, load_statistics, score
from runtime import options
from sampling.pipeline import SamplingPipeline, open_pipeline

EVALUATIONS = (10, 25, 50, 100, 250)
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
FIELDS = ("sampler", "steps", "evaluations", "cfg_scale", "interval", "kid", "kid_std", "accuracy")
BATCH = 100


def rows_of(args: Namespace, samplers: list[str]) -> Iterator[dict]:
    """Every sampler at every number of evaluations, then guidance scales and an interval."""
    for evaluations in args.evaluations:
        for sampler in samplers:
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            yield dict(sampler=sampler, steps=steps, cfg_scale=args.cfg_scale, interval="0 1")
    for scale in () if args.only_samplers else SCALES:
        for interval in ("0 1", "0.2 0.8"):
            if scale != 1 or interval == "0 1":
                row = dict(sampler=args.guided_sampler, steps=args.guided_steps)
                yield {**row, "cfg_scale": scale, "interval": interval}


def measure(pipeline: SamplingPipeline, row: dict, labels: list[int], tools: tuple) -> dict:
    """Draws the images of a row and returns it with evaluations, KID and accuracy."""
    reference, extractor, classifier = tools
    pipeline.sampler, pipeline.num_steps = row["sampler"], row["steps"]
    pipeline.cfg_scale = row["cfg_scale"]
    pipeline.guidance_interval = tuple(map(float, row["interval"].split()))
    images = torch.cat(
        [
            pipeline.images(labels[start : start + BATCH], range(start, start + BATCH))
            for start in range(0, len(labels), BATCH)
        ]
    )
    generated: Statistics = collect(images.split(BATCH), extractor)
    values = score(generated, reference, ["kid"], kid_subset_size=min(len(labels), 1000))
    grey = images.float().mean(1, keepdim=True).round().to(torch.uint8)  # (N, 1, H, W)
    accuracy = (classify(classifier, grey) == torch.tensor(labels)).float().mean().item()
    evaluations = function_evaluations(row["sampler"], row["steps"])
    return {**row, **values, "evaluations": evaluations, "accuracy": accuracy}


def compare(args: Namespace) -> None:
    pipeline = open_pipeline(args)
    samplers = args.samplers or (
        ["euler", "heun", "sde", "dpm-solver++", "unipc"]
        if pipeline.objective == "rectified_flow"
        else ["ddpm", "ddim", "dpm-solver++", "unipc"]
    )
    classifier = Classifier(len(pipeline.class_names))
    classifier.load_state_dict(torch.load(args.classifier, weights_only=True))
    extractor = load_extractor("efficientnet-lite0", None, torch.device("cpu"))
    tools = (load_statistics(args.reference), extractor, classifier.eval())
    classes = list(range(len(pipeline.class_names)))
    labels = labels_of(args.num_images, classes, "balanced", 0)
    done = read_rows(args.output) if args.output.exists() else []
    finished = {tuple(str(row[name]) for name in ("sampler", "steps", "cfg_scale", "interval"))
                for row in done}  # fmt: skip
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for row in rows_of(args, samplers):
            key = tuple(str(row[name]) for name in ("sampler", "steps", "cfg_scale", "interval"))
            if key in finished:
                continue
            finished.add(key)
            row = measure(pipeline, row, labels, tools)
            writer.writerow(row)
            file.flush()
            print(row, flush=True)


def read_rows(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def plot(args: Namespace) -> None:
    """Draws KID and accuracy: by evaluations, a column for each .csv, then by guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tables = {path.stem.replace("_", " "): read_rows(path) for path in args.plot}
    columns = [*tables, f"guidance scale ({args.guided_sampler}, {args.guided_steps} steps)"]
    size = (3.6 * len(columns), 6.4)
    figure, panels = plt.subplots(2, len(columns), figsize=size, sharey="row", layout="constrained")
    for line, quantity in enumerate(("kid", "accuracy")):
        for panel, (title, rows) in zip(panels[line], tables.items(), strict=False):
            for sampler in dict.fromkeys(row["sampler"] for row in rows):
                chosen = [row for row in rows if is_compared(row, sampler, args.cfg_scale)]
                draw(panel, chosen, "evaluations", quantity, sampler)
            panel.set_xscale("log")
            panel.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
            panel.minorticks_off()
            panel.set_title(title)
            panel.set_xlabel("evaluations of the network")
        for interval in ("0 1", "0.2 0.8"):
            chosen = [
                row for rows in tables.values() for row in rows
                if (row["sampler"], row["interval"]) == (args.guided_sampler, interval)
                and int(row["steps"]) == args.guided_steps
            ]  # fmt: skip
            draw(panels[line, -1], chosen, "cfg_scale", quantity, f"guidance in t {interval}")
        panels[line, -1].set_xlabel(columns[-1])
        for panel in panels[line]:
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    panels[0, 0].set_ylabel("KID (efficientnet-lite0-64px)")
    panels[1, 0].set_ylabel("class recognised")
    figure.savefig(args.output, dpi=110)


def is_compared(row: dict, sampler: str, cfg_scale: float) -> bool:
    """Whether a row is one of the comparison of samplers, at one scale and at all times."""
    scale = float(row["cfg_scale"])
    return (row["sampler"], scale, row["interval"]) == (sampler, cfg_scale, "0 1")


def draw(panel, rows: list[dict], x: str, y: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: float(row[x]))
    xs, ys = [float(row[x]) for row in rows], [float(row[y]) for row in rows]
    panel.plot(xs, ys, "o-", label=label, markersize=4)


def parse_args() -> Namespace:
    parser = options.make_parser(__doc__)
    options.add_sampling_flags(parser, ckpt_required=False)
    parser.add_argument("--reference", type=Path, help="statistics from --precompute-reference")
    parser.add_argument("--classifier", help="weights that tests/score_samples.py wrote")
    parser.add_argument("--num-images", type=int, default=1000, help="a multiple of 100")
    parser.add_argument("--samplers", nargs="+", help="default: all of the objective")
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--only-samplers", action="store_true", help="no guidance rows")
    parser.add_argument("--guided-sampler", default="heun", help="sampler of the guidance rows")
    parser.add_argument("--guided-steps", type=int, default=13, help="its steps")
    parser.add_argument(
        "--plot", type=Path, nargs="+", help="draw these .csv files instead of measuring"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .csv, or the .png")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    (plot if arguments.plot else compare)(arguments)
