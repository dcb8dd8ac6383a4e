"""Speed of the layer, a step and sampling; peak memory against the plan of --dry-run."""

import torch

from benchmarks.bench_moe import MoEConfig
from benchmarks.bench_moe import measure as measure_layer
from benchmarks.bench_sample import SampleBenchmarkConfig
from benchmarks.bench_sample import measure as measure_sampling
from benchmarks.bench_train import TrainBenchmarkConfig
from benchmarks.bench_train import measure as measure_step
from benchmarks.common import make_engine, matrix_peaks, open_device, train_step
from checkpoints import config_of
from checks.common import NO_GPU, CheckConfig, Checks
from diffusion import create_diffusion
from training.config import DDPConfig
from training.plan import memory

WIDTHS = {"S": 384, "XL": 1152, "G": 1408}
TOKENS = 8192  # of 32 images
LEAST_SHARE = 0.4  # of the matrix peak that the layer of XL has to reach
PLAN_TOLERANCE = 0.1


def check(checks: Checks, config: CheckConfig) -> None:
    device = open_device()
    peaks = matrix_peaks(device, ("bf16",))
    for precision, peak in peaks.items():
        checks.inform(f"peak of a matrix product, {precision}, TFLOP/s", peak / 1e12)
    seconds = 0.1 if config.is_small else 0.5 if config.quick else 2.0
    check_layers(checks, config, peaks, seconds, device)
    small = dict(model="DiT-Ti/2", image_size=64, batch_size=2)
    large = dict(model="DiT-S/2" if config.quick else "DiT-B/2", batch_size=32)
    sizes = small if config.is_small else large
    for experts, backend in ((8, "grouped"), (8, "loop"), (0, "grouped")):
        settings = TrainBenchmarkConfig(num_experts=experts, seconds=seconds, **sizes)
        what = f"step of {settings.model}, {backend if experts else 'dense'}, bf16"
        with checks.guard(what):
            row = measure_step(settings, "bf16", backend, peaks["bf16"], device)
            checks.inform(what, {k: row[k] for k in ("step_ms", "images_per_sec", "of_peak")})
    for precision in ("bf16",) if config.is_small else ("bf16", "fp16"):
        settings = SampleBenchmarkConfig(
            **sizes, seconds=seconds, backends=("grouped",), num_sampling_steps=2
        )
        with checks.guard(f"sampling {settings.model}, {precision}"):
            (row,) = measure_sampling(settings, precision, device)
            what = f"sampling {settings.model}, {precision}, ms a step"
            checks.inform(what, row["ms_per_step"])


def check_layers(
    checks: Checks, config: CheckConfig, peaks: dict[str, float], seconds: float,
    device: torch.device,
) -> None:  # fmt: skip
    """The sparse layer against the loop, a dense layer and its products alone."""
    widths = {"a small model": 64} if config.is_small else WIDTHS
    for name, width in widths.items():
        settings = MoEConfig(width=width, seconds=seconds)
        sizes = (256 if config.is_small else TOKENS, 8, 2)
        with checks.guard(f"layer of {name}, bf16"):
            measured = measure_layer(settings, sizes, "bf16", peaks["bf16"], device)
            rows = {row["layer"]: row for row in measured}
            for layer, row in rows.items():
                values = {key: row[key] for key in ("forward_ms", "ms", "of_peak", "of_dense")}
                checks.inform(f"layer of {name}, {layer}, bf16", values)
            if name == "XL":
                ratio = rows["grouped"]["ms"] / rows["loop"]["ms"]
                checks.at_most("layer of XL, bf16, time over the loop's", ratio, 1.0)
                share = rows["grouped"]["of_peak"]
                checks.at_least("layer of XL, bf16, of the matrix peak", share, LEAST_SHARE)
        torch.cuda.empty_cache()
    if config.is_small:
        checks.skip("layer of XL faster than the loop, and 40% of the peak", NO_GPU)


def check_memory(checks: Checks, config: CheckConfig) -> None:
    """The peak of two steps of two micro-batches, in which gradients and activations meet."""
    if config.is_small:
        checks.skip("peak against the plan", f"{NO_GPU}: a CPU counts other memory too")
        return
    device = torch.device("cuda")
    for model, images in (("DiT-S/2", 32),) if config.quick else (("DiT-S/2", 32), ("DiT-B/2", 64)):
        for precision in ("bf16", "fp32"):
            what = f"peak of {model}, {images} images, {precision}"
            with checks.guard(what):
                check_peak(checks, what, (model, images, precision), device)
            torch.cuda.empty_cache()


def check_peak(checks: Checks, what: str, run: tuple[str, int, str], device: torch.device) -> None:
    name, images, precision = run
    model = config_of(name)
    flags = DDPConfig(model=name, precision=precision)
    plan, _, _ = memory(flags, model, 1, images)
    planned = sum(plan.values())
    free, _ = torch.cuda.mem_get_info(device)
    if 1.2 * planned > free:
        checks.skip(what, f"{planned / 2**30:.1f} GiB planned, {free / 2**30:.1f} free")
        return
    engine, diffusion = make_engine(flags, model, device), create_diffusion()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        train_step(engine, diffusion, images, micro_batches=2)
    ratio = torch.cuda.max_memory_allocated(device) / planned
    checks.inform(f"{what}, GiB planned", planned / 2**30)
    checks.at_most(f"{what}, of the plan", ratio, 1 + PLAN_TOLERANCE)
    checks.at_least(f"{what}, of the plan", ratio, 1 - PLAN_TOLERANCE)
