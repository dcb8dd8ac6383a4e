"""What a benchmark says: its rows as a table, and a JSON file that tells where they come from.

    rows = [{"backend": "loop", "tokens_per_sec": 1234.5}, {"backend": "grouped", ...}]
    print_table(rows)
    write_json(args.output, rows, settings=vars(args), device=device)

Importing it puts the repository on the path: `python benchmarks/bench_data.py` then finds `models`.
"""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.protocol import commit, device_name  # noqa: E402

PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "flash-attn", "numpy", "pillow")


def environment(device: torch.device) -> dict:
    """The commit, the versions and the machine that numbers belong to."""
    return {"commit": commit(), "versions": versions(), "machine": machine(device)}


def versions() -> dict[str, str]:
    """The versions of Python, CUDA and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # the package's may lack what it is built for
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: torch.device) -> dict:
    """What computes: processor, cores this process may use, memory in GiB, the device's name."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": processor_name(),
        "cores": len(cores),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "device": device_name(device),
    }
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        found["device_memory_gib"] = round(total / 2**30, 1)
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_table(rows: list[dict]) -> None:
    """Prints rows as a Markdown table; its columns are the rows' keys, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    numeric = [any(is_number(row.get(name)) for row in rows) for name in columns]
    rule = [
        "-" * (width - right) + ":" * right for width, right in zip(widths, numeric, strict=True)
    ]
    lines.insert(1, rule)
    for line in lines:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        print(f"| {' | '.join(padded)} |", flush=True)


def cell(value: object) -> str:
    """A value as a table shows it: four digits of a float, thousands apart, nothing for None."""
    if not is_number(value):
        return "" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_json(path: Path | str, rows: list[dict], *, settings: dict, device: torch.device) -> None:
    """Writes rows with the settings and the environment that they were measured in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**environment(device), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"rows and environment: {path}")
