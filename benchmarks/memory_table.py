"""The memory of a process under each way to share out a model, as --dry-run plans it.

    python -m benchmarks.memory_table                     L and XL at 32 images a GPU, G at 16
    python -m benchmarks.memory_table --gpus 8 64

Prints a table in Markdown: GiB of a GPU in bf16, without recomputation, for images of 256 pixels.
Numbers in brackets do not fit 80 GiB.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import markdown
from checkpoints import config_of
from engines.ddp import DDPEngine
from engines.flags import DDPFlags, DeepSpeedFlags
from engines.fsdp import FSDPEngine
from engines.zero_config import zero_memory
from runtime.errors import run_main
from runtime.flags import flag, parse_config
from training.config import DataFacts, resolve
from training.memory import ASSUMED, USABLE, in_gib

IMAGES = {"DiT-L/2": 32, "DiT-XL/2": 32, "DiT-G/2": 16}  # of a GPU at a time
JSONS = Path(__file__).parent.parent / "config"
FACTS = DataFacts(num_classes=1000, input_size=32, in_channels=4, image_size=256, vae_path="")
SHARD = {"shard": True}
WAYS = {  # flags of train.py, or a JSON of train_deepspeed.py
    "DDP": {},
    "`--shard`": SHARD,
    "`--shard --reshard-after-forward False`": {**SHARD, "reshard_after_forward": False},
    "ZeRO-2": "zero2.json",
    "ZeRO-3": "zero3.json",
    "zero2_ep": "zero2_ep.json",
    "zero3_ep": "zero3_ep.json",
}


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    gpus: tuple[int, ...] = flag((8, 16, 32), least=1, help="GPUs, of nodes of 8")


def planned_gib(model: str, gpus: int, way: dict | str) -> float:
    experts = 16 if model == "DiT-G/2" else config_of(model).num_experts
    given = {"model": model, "num_experts": experts, "gpus_per_node": min(8, gpus)}
    images = IMAGES[model]
    if isinstance(way, str):
        given |= {"deepspeed_config": str(JSONS / way), "train_batch_size": images}
        parts, *_ = zero_memory(resolve(given, DeepSpeedFlags, data=FACTS), gpus, images)
    else:
        engine = FSDPEngine if way else DDPEngine
        parts, *_ = engine.memory(resolve({**given, **way}, DDPFlags, data=FACTS), gpus, images)
    return in_gib(parts)


def main(config: TableConfig) -> None:
    columns = [(model, gpus) for model in IMAGES for gpus in config.gpus]
    rows = [["GPUs", *(f"{model[4:-2]}, {gpus}" for model, gpus in columns)]]
    for name, way in WAYS.items():
        sizes = [planned_gib(model, gpus, way) for model, gpus in columns]
        rows.append([name, *(f"{s:.0f}" if s <= USABLE * ASSUMED else f"({s:.0f})" for s in sizes)])
    print(markdown(rows), end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_config(TableConfig, __doc__)))
