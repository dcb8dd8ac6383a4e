"""Shared parts of the benchmarks: model flags, timing in turns, tables and JSON files."""

import json
import platform
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from checkpoints import config_of
from diffusion import Objective
from latents.sources import Batch
from models import DiTConfig
from options.parts import option
from presets import PRESETS
from runtime.devices import DTYPES, keep_freed_memory
from runtime.processes import ALONE, Distributed, setup_distributed
from training.config import TrainConfig
from training.engine import new_weights
from training.engines import engine_for
from training.engines.ddp import DDPEngine
from training.step import take_step

PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "diffusers", "numpy")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    precisions: tuple[str, ...] = option(
        ("fp32", "bf16"), group="measurement", choices=tuple(DTYPES), help="autocast precisions"
    )
    backends: tuple[str, ...] = option(
        ("loop", "grouped"), choices=("loop", "grouped"), help="computation of the experts"
    )
    seconds: float = option(5.0, help="duration of each measurement, after a warm-up")
    output: Path = option(
        Path("results/benchmark.json"), help="file for the rows and the facts of the machine"
    )


@dataclass(frozen=True, kw_only=True)
class ModelBenchmarkConfig(BenchmarkConfig):
    model: str = option("DiT-S/2", group="model", choices=tuple(PRESETS), help="preset")
    num_experts: int = option(8, ge=0, help="routed experts per block; 0: dense")
    num_experts_per_tok: int = option(2, ge=1, help="experts per token")
    depth: int | None = option(None, ge=1, help="number of blocks (default: as in the preset)")
    image_size: int = option(256, ge=1, help="pixels per side, 8 times the latent's side")
    batch_size: int = option(8, ge=1, help="images per batch")
    compile: bool = option(False, help="compile each block with torch.compile")

    def dit_config(self, backend: str) -> DiTConfig:
        return config_of(
            self.model, input_size=self.image_size // 8, num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok, expert_backend=backend,
            **({"depth": self.depth} if self.depth else {}),
        )  # fmt: skip


def open_processes() -> Distributed:
    """Sets up the processes of a launcher or, without launcher, this process; on GPUs if any.

    A CPU keeps freed memory, as in training.
    """
    dist = setup_distributed()
    keep_freed_memory(dist.device)
    return dist


def make_engine(config: TrainConfig, dist: Distributed) -> DDPEngine:
    """Makes the engine of train.py for a config, with new weights."""
    return engine_for(config.engine)(dist, config, new_weights(config))


def draw_batch(engine: DDPEngine, images: int) -> Batch:
    """Draws random latents (N, C, h, w), labels (N,) and tensors that auxiliary losses need."""
    config, device = engine.model.config, engine.dist.device
    shapes = {"latents": config.latent_shape}
    for one in engine.config.auxiliary:
        shapes |= {name: engine.config.shapes[name] for name in one.needs}
    batch = {name: torch.randn(images, *shape, device=device) for name, shape in shapes.items()}
    return batch | {"label": torch.randint(config.num_classes, (images,), device=device)}


def train_step(
    engine: DDPEngine, objective: Objective, images: int, micro_batches: int = 1
) -> None:
    """Takes one training step on new random latents.

    images: images per micro-batch
    """
    drawn = (draw_batch(engine, images) for _ in range(micro_batches))
    take_step(engine, objective, drawn, micro_batches, step=1, rate=1.0)


def best_times(
    functions: dict[str, Callable[[], object]], *, seconds: float, device: torch.device,
    dist: Distributed = ALONE,
) -> dict[str, float]:  # fmt: skip
    """Returns the shortest time of each function in seconds.

    The functions take turns, so that other load on the machine affects all of them equally. Each
    function runs twice as a warm-up, then for about `seconds` and at least three times.

    dist: processes that call this function together; the times of the first process decide
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for function in functions.values():
        function()
        function()
    best, total, rounds = dict.fromkeys(functions, float("inf")), 0.0, 0
    while dist.broadcast(rounds < 3 or total < seconds * len(functions)):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            elapsed = time.perf_counter() - start
            best[name], total = min(best[name], elapsed), total + elapsed
        rounds += 1
    return best


KERNELS = {  # kind of GPU kernel: parts of names in lower case; the first match counts
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "grouped products": ("group",),
    "expert rows": ("gather_kernel", "combine_kernel", "activate", "transpose_kernel"),
    "dense products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "wgmma"),
    "optimizer and EMA": ("multi_tensor", "adam", "foreach", "lerp"),
    "compiled elementwise": ("triton_",),
    "copies and casts": ("memcpy", "memset", "copy", "cat_array", "catarray"),
}


def time_by_kind(times: dict[str, float]) -> dict[str, float]:
    """Returns each kind's fraction of the total time, given the time of each kernel."""
    kinds = Counter()
    for name, seconds in times.items():
        named = [kind for kind, parts in KERNELS.items() if any(p in name.lower() for p in parts)]
        kinds[(*named, "others")[0]] += seconds
    return {kind: seconds / kinds.total() for kind, seconds in kinds.most_common()}


def kernel_times(function: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Returns the seconds that each GPU kernel takes per call, in decreasing order."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e6 / calls
    return dict(times.most_common())


def matrix_peaks(device: torch.device, precisions: tuple[str, ...]) -> dict[str, float]:
    """Measures the FLOP/s of the fastest square matrix product in each precision.

    Other layers reach a fraction of this peak, and the fractions of two machines are comparable.
    The sides grow only while a product is fast, because bf16 takes minutes on a CPU without bf16.
    """
    peaks = {}
    for precision in dict.fromkeys(precisions):
        for side in (4096, 8192) if device.type == "cuda" else (256, 1024, 2048):
            a, b = torch.randn(2, side, side, dtype=DTYPES[precision], device=device)
            times = best_times({"mm": lambda a=a, b=b: a @ b}, seconds=0.5, device=device)
            peaks[precision] = max(peaks.get(precision, 0), 2 * side**3 / times["mm"])
            if times["mm"] > 0.1:  # seconds
                break
        print(f"matrix-product peak in {precision}: {peaks[precision] / 1e12:.3g} TFLOP/s")
    return peaks


def describe_machine(device: str) -> dict:
    """Returns the commit, GPUs, versions of packages, and the compilers for kernels."""
    query = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader"
    gpus, facts = answer(*query.split()) if device == "cuda" else "none", {}
    if device == "cuda":
        clocks = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        facts = {
            "clocks_power_heat": answer("nvidia-smi", f"--query-gpu={clocks}", "--format=csv"),
            "topology": answer("nvidia-smi", "topo", "-m"),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": answer("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"),
        "gpus": gpus.replace("\n", "; "),
        "versions": versions,
        # Triton and Inductor compile with these.
        "compiler": answer("gcc", "--version").partition("\n")[0],
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        **{name: text.replace("\n", "; ") for name, text in facts.items()},
    }


def answer(*command: str) -> str:
    """Returns the output of a program; "unknown" if the program is missing or fails."""
    options = dict(cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=30)
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, **options).strip()
    return "unknown"


def report(config: Any, rows: list[dict], device: torch.device, peaks: dict | None = None) -> None:
    """Prints rows as a Markdown table, and writes them to a file with the facts of the machine.

    config: dataclass of the benchmark's flags, with `output`
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    print(markdown([columns, *cells]), end="")
    cpu = torch.backends.cpu.get_cpu_capability()  # such as AVX512
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    machine = {"device": name, "threads": torch.get_num_threads(), **describe_machine(device.type)}
    content = {"machine": machine, "peaks": peaks, "settings": asdict(config), "rows": rows}
    config.output.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"rows and machine: {config.output}")


def markdown(rows: Sequence[Iterable[str]]) -> str:
    """Returns a Markdown table of a header and lines, with the first column aligned left."""
    head, *lines = (list(row) for row in rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *lines))


def cell(value: object) -> str:
    """Formats a value for a table: floats with four digits, thousands separators, "" for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
