r"""A whole training step of a preset: images per second, utilisation, memory, where the time goes.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py --model DiT-XL/2 --batch-size 32 --precisions bf16 \
        --gradient-checkpointing

The step is the one of train.py, on latents that lie in memory: forward, backward, clipping, AdamW,
EMA, without autoencoder and loader (see bench_data.py). A row says
    step_ms, images_per_sec     of the shortest step
    forward_ms                  of the shortest forward pass without gradients
    tflops, of_peak             of the model's matrix products, 3 times those of a forward pass
                                whatever was recomputed; the peak is a square matrix product's here
    peak_gb                     memory of the device; on a CPU, resident memory of the process
    products, activations, ...  shares of a step's time by kind of operator, from the profiler
"""

import argparse
from collections.abc import Callable

import torch
from report import print_table, write_json
from settings import add_model_flags, model_config
from timing import best_times, matrix_product_peak
from torch.profiler import ProfilerActivity, profile

from diffusion import create_diffusion
from models import count_macs
from runtime import options
from runtime.devices import keep_freed_memory, memory_in_use
from runtime.errors import exit_on_user_error
from runtime.processes import Distributed
from train import DDPEngine

# What a profiler's operators belong to, by the first name that their own name contains.
KINDS = {
    "products": ("mm", "gemm", "linear", "convolution", "cutlass", "nvjet"),
    "attention": ("attention", "flash", "fmha"),
    "optimizer": ("adam", "lerp", "norm_", "foreach"),
    "rows": ("index", "sort", "scatter", "gather", "combine", "place", "count", "topk"),
    "casts": ("copy", "to_copy"),
    "activations": ("silu", "gelu", "mul", "add", "activate", "layer_norm", "sum", "softmax"),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--batch-size", type=options.positive_int, default=8, help="images of a step"
    )
    options.add_bool(parser, "--gradient-checkpointing", help="recompute each block in backward")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each row")
    parser.add_argument("--output", default="results/bench_train.json", help="where the JSON goes")
    return parser.parse_args()


class TrainingStep:
    """A model under train.py's engine, and a batch of latents to train it on."""

    def __init__(self, args: argparse.Namespace, precision: str, backend: str, dist: Distributed):
        self.config = model_config(args, backend)
        flags = argparse.Namespace(
            global_seed=0, gradient_checkpointing=args.gradient_checkpointing,
            compile=args.compile, ema_decay=0.9999, grad_clip=1.0, lr=1e-4, weight_decay=0.0,
            precision=precision, freeze=[], train_router_only=False,
        )  # fmt: skip
        self.engine = DDPEngine(flags, dist, self.config, None)
        self.dtype, self.device = options.DTYPES[precision], dist.device
        shape = (args.batch_size, self.config.in_channels, *(self.config.input_size,) * 2)
        self.x = torch.randn(shape, device=dist.device)
        self.t = torch.randint(1000, (args.batch_size,), device=dist.device)
        self.y = torch.randint(self.config.num_classes, (args.batch_size,), device=dist.device)
        self.diffusion = create_diffusion()

    def losses(self, model: Callable) -> dict:
        terms = self.diffusion.training_losses(model, self.x, self.t, {"y": self.y})
        return {"loss": terms["loss"].mean(), "aux_loss": terms["aux_loss"]}

    def step(self) -> None:
        self.engine.train_step([self.losses], 1e-4)

    @torch.no_grad()
    def forward(self) -> None:
        with self.engine.autocast():
            self.engine.model(self.x, self.t, self.y)


def shares(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """The share of a step's operator time that each kind takes, of the device that computes."""
    is_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other")
        times[kind] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def measure(
    args: argparse.Namespace, precision: str, backend: str, peak: float, dist: Distributed
) -> dict:
    training = TrainingStep(args, precision, backend, dist)
    flops = 6 * count_macs(training.config) * args.batch_size
    seconds, device = args.seconds, dist.device
    forward = best_times({"forward": training.forward}, seconds=seconds / 4, device=device)
    step = best_times({"step": training.step}, seconds=seconds, device=device)["step"]
    return {
        "model": args.model,
        "precision": precision,
        "experts": backend,
        "images": args.batch_size,
        "step_ms": step * 1e3,
        "forward_ms": forward["forward"] * 1e3,
        "images_per_sec": args.batch_size / step,
        "tflops": flops / step / 1e12,
        "of_peak": flops / step / peak,
        "peak_gb": memory_in_use(device),
        **shares(training.step, device),
    }


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist = Distributed(rank=0, local_rank=0, world_size=1, device=device)
    keep_freed_memory(device)
    for backend in args.backends:
        options.check_expert_backend("--backends", backend, device)
    rows, peaks = [], {}
    for precision in args.precisions:
        peaks[precision] = matrix_product_peak(options.DTYPES[precision], device)
        print(f"matrix-product peak in {precision}: {peaks[precision] / 1e12:.3g} TFLOP/s")
        for backend in args.backends:
            rows.append(measure(args, precision, backend, peaks[precision], dist))
    print_table(rows)
    write_json(args.output, rows, settings={**vars(args), "peaks": peaks}, device=device)


if __name__ == "__main__":
    main(parse_args())
