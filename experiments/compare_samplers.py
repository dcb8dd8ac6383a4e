r"""KID of a checkpoint by sampler and evaluations of the network, over the same seeds and labels.

    python evaluate.py --backbone efficientnet-lite0 --images real --precompute-reference real.npz
    python -m experiments.compare_samplers --ckpt results/RUN --reference real.npz --cfg-scale 2
    python -m experiments.compare_samplers --ckpt results/RUN --reference real.npz \
        --samplers heun --evaluations 25 --scales 1 1.5 2 3

Each row goes to --output, a .csv, as it is measured.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from diffusion import SAMPLERS, function_evaluations
from evaluation.features import BACKBONES, load_extractor
from evaluation.generation import labels_of
from evaluation.images import ImageSet
from evaluation.metrics import collect, score
from evaluation.reference import open_reference
from latents.autoencoder import downsampling_of
from runtime.errors import exit_on_user_error
from runtime.files import prepare_output
from runtime.flags import flag, parse_config, positive_int
from sampling.config import SamplingConfig
from sampling.pipeline import SamplingPipeline, open_pipeline


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SamplingConfig):
    reference: Path = flag(group="comparison", help="statistics, or real images")
    backbone: str = flag("efficientnet-lite0", choices=tuple(BACKBONES), help="of the features")
    num_images: int = flag(1000, type=positive_int, help="drawn for each row, and a KID subset")
    samplers: tuple[str, ...] = flag((), nargs="+", help="default: all of the objective")
    evaluations: tuple[int, ...] = flag(
        (10, 25, 50, 100, 250), nargs="+", type=positive_int, help="of the network, for one image"
    )
    scales: tuple[float, ...] = flag((), nargs="+", help="of guidance; default: --cfg-scale")
    output: Path = flag(Path("results/samplers.csv"), help="the table")


def drawn_images(pipeline: SamplingPipeline, num_images: int) -> ImageSet:
    """The images that a pipeline draws of all classes by turns, from seeds 0 on, when read."""
    config = pipeline.model.config
    labels = labels_of(num_images, list(range(config.num_classes)), "balanced", 0)
    size = config.input_size * downsampling_of(pipeline.vae.config)

    def batches(batch_size: int) -> Iterator[Tensor]:
        for start in range(0, num_images, batch_size):
            part = labels[start : start + batch_size]
            yield pipeline.images(part, range(start, start + len(part)))

    return ImageSet("drawn", num_images, (size, size), batches)


def parse_args() -> CompareConfig:
    return parse_config(CompareConfig, __doc__)


@exit_on_user_error
def main(config: CompareConfig) -> None:
    prepare_output("--output", config.output)
    pipeline = open_pipeline(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_extractor(config.backbone, None, device)
    size = drawn_images(pipeline, config.num_images).size
    reference = open_reference(config.reference, extractor, size, None, config.batch_size)
    samplers = config.samplers or tuple(SAMPLERS[pipeline.settings.objective])
    scales = config.scales or (pipeline.settings.cfg_scale,)
    with config.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sampler", "steps", "evaluations", "cfg_scale", "kid", "kid_std"))
        for sampler, evaluations, scale in product(samplers, config.evaluations, scales):
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            settings = replace(pipeline.settings, sampler=sampler, num_steps=steps, cfg_scale=scale)
            images = drawn_images(replace(pipeline, settings=settings), config.num_images)
            got = collect(images, extractor, config.batch_size)
            kid = score(got, reference, ["kid"], config.num_images)
            row = (sampler, steps, function_evaluations(sampler, steps), scale, *kid.values())
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)


if __name__ == "__main__":
    main(parse_args())
