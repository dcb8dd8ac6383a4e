"""What the benchmarks share: flags of a model, times taken in turns, a table, and a JSON file."""

import json
import os
import platform
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from checkpoints import config_of
from cpu import keep_freed_memory
from diffusion import Objective
from engines.ddp import DDPEngine
from engines.fsdp import FSDPEngine
from latents.sources import Batch
from models import DiT_models, DiTConfig
from runtime.devices import DTYPES
from runtime.flags import flag
from runtime.processes import ALONE, Distributed, setup_distributed
from training.config import TrainConfig
from training.step import take_step

PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "diffusers", "numpy")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    precisions: tuple[str, ...] = flag(
        ("fp32", "bf16"), group="measurement", choices=tuple(DTYPES), help="of autocast"
    )
    backends: tuple[str, ...] = flag(
        ("loop", "grouped"), choices=("loop", "grouped"), help="how experts are computed"
    )
    seconds: float = flag(5.0, help="measured for each time, after a warm-up")
    output: Path = flag(Path("results/benchmark.json"), help="where the rows go, with the machine")


@dataclass(frozen=True, kw_only=True)
class ModelBenchmarkConfig(BenchmarkConfig):
    model: str = flag("DiT-S/2", group="model", choices=tuple(DiT_models), help="preset")
    num_experts: int = flag(8, least=0, help="0: dense")
    num_experts_per_tok: int = flag(2, least=1, help="experts of a token")
    depth: int | None = flag(None, least=1, help="blocks (default: the preset's)")
    image_size: int = flag(256, least=1, help="pixels a side, 8 times the latent's")
    batch_size: int = flag(8, least=1, help="images at a time")
    compile: bool = flag(False, help="compile each block with torch.compile")

    def dit_config(self, backend: str) -> DiTConfig:
        return config_of(
            self.model, input_size=self.image_size // 8, num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok, expert_backend=backend,
            **({"depth": self.depth} if self.depth else {}),
        )  # fmt: skip


def open_device() -> torch.device:
    """The GPU, or a CPU that keeps freed memory as training has it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    return device


def open_processes() -> Distributed:
    """The processes of a launcher, or this one, on the GPUs if there are any."""
    if "RANK" not in os.environ:
        return replace(ALONE, device=open_device())
    dist = setup_distributed()
    keep_freed_memory(dist.device)
    return dist


def make_engine(config: TrainConfig, dist: Distributed) -> DDPEngine:
    """The engine of train.py for a config, with new weights."""
    return (FSDPEngine if config.engine.shard else DDPEngine)(dist, config, None)


def draw_batch(engine: DDPEngine, images: int) -> Batch:
    """Random latents (N, C, h, w) and labels (N,), drawn on the device."""
    config, device = engine.model.config, engine.dist.device
    x = torch.randn(images, *config.latent_shape, device=device)
    return {"latents": x, "label": torch.randint(config.num_classes, (images,), device=device)}


def train_step(
    engine: DDPEngine, objective: Objective, images: int, micro_batches: int = 1
) -> None:
    """A step of the engine on new random latents, micro_batches of so many images each."""
    drawn = (draw_batch(engine, images) for _ in range(micro_batches))
    take_step(engine, objective, drawn, micro_batches, step=1, rate=1.0, dist=engine.dist)


def best_times(
    functions: dict[str, Callable[[], object]], *, seconds: float, device: torch.device,
    dist: Distributed = ALONE,
) -> dict[str, float]:  # fmt: skip
    """The shortest time of each function in seconds.

    They take turns, so that what else the machine does meets all alike, until each has run for
    about `seconds` and at least three times; before that each runs twice unmeasured.

    dist: processes that call this function together; the times of the first one decide
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for function in functions.values():
        function()
        function()
    best, spent, rounds = dict.fromkeys(functions, float("inf")), 0.0, 0
    while dist.broadcast(rounds < 3 or spent < seconds * len(functions)):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            elapsed = time.perf_counter() - start
            best[name], spent = min(best[name], elapsed), spent + elapsed
        rounds += 1
    return best


KERNELS = {  # kinds of GPU kernels, by a part of their name in lower case; the first match counts
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
    """The share of each kind of kernel of the time of all, from the time of each kernel."""
    kinds = Counter()
    for name, seconds in times.items():
        named = [kind for kind, parts in KERNELS.items() if any(p in name.lower() for p in parts)]
        kinds[(*named, "others")[0]] += seconds
    return {kind: seconds / kinds.total() for kind, seconds in kinds.most_common()}


def kernel_times(function: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """The seconds of a call that each GPU kernel takes, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.self_device_time_total / 1e6 / calls
    return dict(times.most_common())


def matrix_peaks(device: torch.device, precisions: tuple[str, ...]) -> dict[str, float]:
    """Measure the FLOP/s of the fastest square matrix product in each precision.

    Other layers reach a share of this peak, and the shares of two machines are comparable. The
    sides grow only while a product is fast, as bf16 takes minutes on a CPU without bf16.
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
    """Commit, GPUs, versions, and what compiles kernels here."""
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
    """What a program prints; "unknown" where it is missing or fails."""
    options = dict(cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=30)
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, **options).strip()
    return "unknown"


def report(
    config: BenchmarkConfig, rows: list[dict], device: torch.device, peaks: dict | None = None
) -> None:
    """Prints rows as a Markdown table, and writes them with the machine they were measured on."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    print(markdown([columns, *cells]), end="")
    cpu = torch.backends.cpu.get_cpu_capability()  # such as AVX512
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    machine = {"device": name, "threads": torch.get_num_threads(), **describe_machine(device.type)}
    content = {"machine": machine, "peaks": peaks, "settings": asdict(config), "rows": rows}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"rows and machine: {config.output}")


def markdown(rows: Sequence[Iterable[str]]) -> str:
    """A Markdown table of a head and lines, whose first cells are to the left."""
    head, *lines = (list(row) for row in rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *lines))


def cell(value: object) -> str:
    """A value as a table shows it: four digits of a float, thousands apart, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
