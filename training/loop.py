"""The training loop, which train.py and train_deepspeed.py run on their engines.

An engine holds the model, its optimizer and its EMA, and offers
    train_step(micro_losses, lr)   one optimizer step over the micro-batches; returns the means
                                   {"loss", "aux_loss", "grad_norm"}, scalars on the device, or
                                   None when fp16 gradients overflowed and nothing was updated
    model                          the DiT itself
    ema_weights()                  context manager: the model computes with its EMA weights
    ema_state_dict()               the whole EMA, fp32, in the standard layout (main process)
    save_state(folder), load_state(folder)
The last four are called by all processes together.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from diffusion import RectifiedFlow, create_diffusion
from models import DiT, DiTConfig, count_parameters
from training import checkpoint, finetune, run
from training.autoencoder import (
    decode,
    encode,
    latent_geometry,
    load_autoencoder,
    load_autoencoder_config,
)
from training.data import BatchStream, ImageSource, make_loader
from training.distributed import Distributed, reseed
from training.errors import UserError
from training.generate import generate
from training.log import RunLog
from training.options import DTYPES
from training.sources import open_images

MAX_OVERFLOWS = 100  # fp16 retries of one step; the loss scale has then halved to nothing


def train(
    args: argparse.Namespace,
    dist: Distributed,
    *,
    micro_batch: int,
    make_engine: Callable[[DiTConfig, checkpoint.Checkpoint | None], object],
) -> None:
    """Trains to the last step, from the newest checkpoint of the run if there is one.

    micro_batch: images of one rank's micro-step
    make_engine: called with the config and, when the run starts from given weights, those
    Raises UserError for what the user can put right.
    """
    check_flags(args)
    source = finetune.open_source(args)
    dataset = open_dataset(args)
    config = model_config(
        args, len(dataset.classes), load_autoencoder_config(args.vae_path), source
    )
    folder = run.choose_run_folder(args)
    run.check_settings(folder, args)
    state_folder, weights = find_start(folder, args, config)
    origin, notes = finetune.origin_of(state_folder, weights or source), []
    if source is not None and state_folder is None:
        weights, notes = finetune.adapt(source, config, dataset.classes, args.global_seed)
        notes += finetune.note_objective(source, args.rf)
    vae = load_autoencoder(args.vae_path, dist.device, DTYPES[args.precision])
    if dist.is_main:
        run.open_run_folder(folder, args)
    dist.barrier()
    if not run.is_run_folder(folder):
        raise UserError(
            f"--results-dir: {folder} cannot be seen from rank {dist.rank}, expected a folder that "
            "all nodes share"
        )

    global_batch = micro_batch * args.accum_iter * dist.world_size
    end_step = total_steps(args, len(dataset), global_batch)
    start_step = checkpoint.read_config(state_folder)[1]["step"] if state_folder else 0
    log = RunLog(folder, is_main=dist.is_main, start_step=start_step, total_steps=end_step)
    if start_step >= end_step:
        log.text(f"{folder} is finished: step {start_step} of {end_step}, nothing to do")
        log.close()
        return

    reseed(args.global_seed)
    engine = make_engine(config, weights)
    if state_folder:
        engine.load_state(state_folder)
        log.text(f"resumed from {state_folder}")
    if args.pretraining_tp != 1:
        log.text("--pretraining_tp has no effect: experts are stacked, not sliced")
    for note in notes:
        log.text(note)
    total, active = parameter_counts(config)
    log.text(
        f"{folder}: {run.name_of_experts(args.model, config)}, "
        f"{total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active), {len(dataset)} images of "
        f"{len(dataset.classes)} classes, steps {start_step} to {end_step} of {global_batch} "
        f"images on {dist.world_size} {dist.device.type} process(es)"
    )
    stream = BatchStream(
        len(dataset),
        micro_batch=micro_batch,
        accumulation=args.accum_iter,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=args.global_seed,
        start_step=start_step,
        end_step=end_step,
    )
    TrainingLoop(args, dist, engine, vae, dataset, stream, folder, log, origin).run()
    log.close()


class TrainingLoop:
    """Steps, log lines, sample grids and checkpoints from `stream.start_step` to its end."""

    def __init__(
        self,
        args: argparse.Namespace,
        dist: Distributed,
        engine,
        vae: nn.Module,
        dataset: ImageSource,
        stream: BatchStream,
        folder: Path,
        log: RunLog,
        origin: dict | None = None,
    ):
        self.origin = origin
        self.args, self.dist, self.engine, self.vae = args, dist, engine, vae
        self.dataset, self.stream, self.folder, self.log = dataset, stream, folder, log
        self.objective = RectifiedFlow() if args.rf else create_diffusion()
        self.unreadable: set[str] = set()
        self.overflows = 0
        self.start_interval()

    def run(self) -> None:
        args = self.args
        pin = self.dist.device.type == "cuda"
        batches = iter(make_loader(self.dataset, self.stream, args.num_workers, pin))
        for step in range(self.stream.start_step, self.stream.end_step):
            micro_batches = [self.to_device(next(batches)) for _ in range(args.accum_iter)]
            metrics = self.step(step, micro_batches)
            for name in self.sums:
                self.sums[name] += metrics[name]
            self.steps_in_interval += 1
            self.log.advance()

            done, last = step + 1, step + 1 == self.stream.end_step
            if done % args.log_every == 0 or last:
                self.log_metrics(done)
            if done % args.ckpt_every == 0 or last:
                self.check_finite(done)
                self.save(done)
            if args.num_sample and (done % args.sample_every == 0 or last):
                self.draw_samples(done)

    def step(self, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Takes one optimizer step; one that overflows in fp16 is tried again at a lower scale."""
        seed, rank, world_size = self.args.global_seed, self.dist.rank, self.dist.world_size
        losses = [
            self.micro_loss((seed, step, micro_step * world_size + rank), batch)
            for micro_step, batch in enumerate(micro_batches)
        ]
        lr = self.args.lr * min(1.0, (step + 1) / max(1, self.args.warmup_steps))
        for _ in range(MAX_OVERFLOWS):
            metrics = self.engine.train_step(losses, lr)
            if metrics is not None:
                return metrics
            self.overflows += 1
        raise UserError(f"step {step}: fp16 gradients overflow at every loss scale; try bf16")

    def micro_loss(
        self, key: tuple[int, int, int], batch: tuple[Tensor, Tensor]
    ) -> Callable[[nn.Module], dict[str, Tensor]]:
        """Returns the function of the model that computes a micro-batch's losses.

        All that it draws (posterior, time, noise, label dropout) follows from the key (seed, step,
        place of the micro-batch in the global batch), so splitting the global batch over more
        processes or more micro-steps draws the same. It returns "loss" and "aux_loss", scalars
        whose sum is minimised.
        """
        images, labels = batch  # (N, 3, H, W) uint8, (N,)

        def losses(model: nn.Module) -> dict[str, Tensor]:
            reseed(*key)
            x = encode(self.vae, images)  # (N, C, h, w)
            if self.args.rf:
                terms = self.objective.training_losses(model, x, labels)
            else:
                t = torch.randint(self.objective.num_timesteps, (len(x),), device=x.device)
                terms = self.objective.training_losses(model, x, t, {"y": labels})
            return {"loss": terms["loss"].mean(), "aux_loss": terms["aux_loss"]}

        return losses

    def to_device(self, batch: tuple[Tensor, Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        """Moves images and labels without waiting, and names each unreadable image once."""
        images, labels, unreadable = batch
        for path in set(unreadable) - self.unreadable:
            self.unreadable.add(path)
            message = f"skipped an image that cannot be read: {path}"
            self.log.text(message) if self.dist.is_main else print(message, flush=True)
        device = self.dist.device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def start_interval(self) -> None:
        zero = torch.zeros((), device=self.dist.device)
        self.sums = {name: zero.clone() for name in ("loss", "aux_loss", "grad_norm")}
        self.steps_in_interval, self.interval_start = 0, time.perf_counter()

    def log_metrics(self, step: int) -> None:
        """Logs means over all ranks and over the steps since the last line or checkpoint.

        The expert load is that of the last micro-batches.
        """
        device, world_size, steps = self.dist.device, self.dist.world_size, self.steps_in_interval
        means = self.dist.sum(torch.stack(list(self.sums.values()))) / (world_size * steps)
        load = self.engine.model.expert_load  # (L, E), or None of a dense model
        if load is not None:
            load = self.dist.sum(load.clone()) / world_size
        skipped = self.dist.sum(torch.tensor(float(len(self.unreadable)), device=device))
        loss, aux_loss, grad_norm = means.tolist()  # waits for the device, once an interval
        seconds = time.perf_counter() - self.interval_start
        images = steps * self.stream.accumulation * self.stream.micro_batch * world_size
        values = {
            "loss": loss,
            "aux_loss": aux_loss,
            "grad_norm": grad_norm,
            "lr": self.args.lr * min(1.0, step / max(1, self.args.warmup_steps)),
            "images_per_sec": images / seconds,
            "memory_gb": memory_in_use(device),
        }
        if load is not None:
            values["expert_load"] = load.amax(dim=1).tolist()  # max over mean, of each layer
        if skipped:
            values["skipped_images"] = int(skipped)
        if self.args.precision == "fp16":
            values["overflows"] = self.overflows
        self.log.metrics(step, values)
        self.check_finite(step)
        self.start_interval()

    def check_finite(self, step: int) -> None:
        """Stops all ranks together before weights that a broken step made are saved."""
        sums = self.dist.sum(torch.stack([self.sums["loss"], self.sums["grad_norm"]]))
        if not sums.isfinite().all():
            raise UserError(
                f"the loss or the gradient became infinite or nan before step {step}: nothing was "
                f"saved since; the newest checkpoint in {self.folder} is from before"
            )

    def draw_samples(self, step: int) -> None:
        """Draws a grid from the EMA weights: fixed seeds, labels spread over the classes."""
        args, model = self.args, self.engine.model
        labels = [i * model.config.num_classes // args.num_sample for i in range(args.num_sample)]
        with self.engine.ema_weights():
            latents = generate(
                model,
                labels,
                range(args.num_sample),
                objective="rectified_flow" if args.rf else "gaussian",
                sampler=None if args.rf else "ddim",
                num_steps=50,
                cfg_scale=args.sample_cfg_scale if model.config.class_dropout_prob else 1.0,
            )
        if self.dist.is_main:
            grid = make_grid(decode(self.vae, latents), nrow=math.ceil(args.num_sample**0.5))
            save_image(grid / 255, self.folder / f"samples-{step:07d}.png")
            self.log.images(step, grid)

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step; all processes take part, the main one names it."""
        args = self.args
        temporary = checkpoint.checkpoint_folder(self.folder, step, temporary=True)
        if self.dist.is_main:
            checkpoint.begin_checkpoint(temporary)
        self.dist.barrier()
        self.engine.save_state(temporary)
        state_dict = self.engine.ema_state_dict()
        if self.dist.is_main:
            info = {
                "step": step,
                "model": args.model,
                "objective": "rectified_flow" if args.rf else "gaussian",
                "image_size": args.image_size,
                "vae_path": args.vae_path,
                "class_names": self.dataset.classes,
                **({"initialized_from": self.origin} if self.origin else {}),
                "settings": run.settings_of(args),
            }
            path = temporary / checkpoint.MODEL_FILE
            checkpoint.save_model(path, state_dict, self.engine.model.config, info)
        self.dist.barrier()
        if self.dist.is_main:
            saved = checkpoint.finish_checkpoint(temporary, self.folder, step)
            self.log.text(f"saved {saved}")
        self.dist.barrier()
        self.start_interval()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other or make no sense."""
    if args.data_path is None:
        raise UserError("--data-path: got nothing, expected a folder of class folders")
    if args.resume and args.finetune and not run.is_run_folder(Path(args.resume)):
        raise UserError(
            "--finetune: got it beside --resume, expected one of them (an interrupted run goes on "
            "by itself)"
        )
    for name in ("lr", "aux_loss_alpha", "grad_clip", "weight_decay"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected a number >= 0")
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay: got {args.ema_decay}, expected 0 <= decay < 1")


def open_dataset(args: argparse.Namespace) -> ImageSource:
    """Opens --data-path; UserError when --num-classes does not fit it."""
    dataset = open_images(args.data_path, args.image_size)
    if args.num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"--num-classes: got {args.num_classes}, expected {len(dataset.classes)}, the number "
            f"of classes in {args.data_path}"
        )
    return dataset


def model_config(
    args: argparse.Namespace,
    num_classes: int,
    vae_config: dict,
    source: checkpoint.Checkpoint | None = None,
) -> DiTConfig:
    """The DiTConfig that the flags, the data, the autoencoder and --finetune's weights ask for."""
    input_size, in_channels = latent_geometry(vae_config, args.image_size)
    patch_size = (source.config if source else checkpoint.config_of(args.model)).patch_size
    if input_size % patch_size:
        factor = args.image_size // input_size
        raise UserError(
            f"--image-size: got {args.image_size}, expected a multiple of {factor * patch_size}, "
            f"the autoencoder's factor {factor} x the model's patches of {patch_size}"
        )
    if source is not None:
        return finetune.target_config(args, source, num_classes, input_size, in_channels)
    return checkpoint.config_of(
        args.model,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        class_dropout_prob=0.1 if num_classes > 1 else 0.0,  # one class leaves nothing to drop
        mlp_type=args.mlp_type,
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        n_shared_experts=args.n_shared_experts,
        aux_loss_alpha=args.aux_loss_alpha,
        qk_norm=args.qk_norm,
        expert_backend=args.expert_backend,
    )


def total_steps(args: argparse.Namespace, num_images: int, global_batch: int) -> int:
    return args.max_steps or max(1, args.epochs * num_images // global_batch)


def parameter_counts(config: DiTConfig) -> tuple[int, int]:
    """Counts (total, active) parameters without allocating any."""
    with torch.device("meta"):
        return count_parameters(DiT(**vars(config)))


def find_start(
    folder: Path, args: argparse.Namespace, config: DiTConfig
) -> tuple[Path | None, checkpoint.Checkpoint | None]:
    """Says where a run starts: a step folder with full state, or given weights, or neither.

    The run's own newest checkpoint goes first, so that a command with --resume can be interrupted
    and run again like any other. Raises UserError for weights of another model.
    """
    if newest := checkpoint.latest_checkpoint(folder):
        stored, _ = checkpoint.read_config(newest)
        if difference := checkpoint.config_difference(stored, config):
            raise UserError(
                f"{newest}: the data, the autoencoder or the flags now ask for another model: "
                f"{difference}"
            )
        return newest, None
    if args.resume is None or Path(args.resume) == folder:  # --finetune: see `train`
        return None, None
    resume, weights = Path(args.resume), None
    if run.is_step_folder(resume):
        stored, _ = checkpoint.read_config(resume)
    else:
        hints = {"num_heads": config.num_heads, "num_experts_per_tok": config.num_experts_per_tok}
        weights = checkpoint.read_checkpoint(resume, hints)
        stored = weights.config
    stored = replace(stored, aux_loss_alpha=config.aux_loss_alpha)
    if difference := checkpoint.config_difference(stored, config):
        raise UserError(f"--resume {resume}: another model: {difference}")
    return (None, weights) if weights else (resume, None)


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
