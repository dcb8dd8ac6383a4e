"""The training loop, which train.py and train_deepspeed.py run on their engines.

An engine holds the model, its optimizer and its EMA, and offers
    train_step(micro_losses, lr)   one optimizer step over the micro-batches; returns the means
                                   {"loss", "aux_loss", "grad_norm"} and whether the step was
                                   "skipped", scalars on the device, or None when fp16 gradients
                                   overflowed and nothing was updated
    model                          the DiT itself
    ema_weights()                  context manager: the model computes with its EMA weights
    ema_state_dict()               the whole EMA, fp32, in the standard layout (main process)
    is_finite()                    whether this process's weights and EMA are, a bool scalar
    save_state(folder), load_state(folder)   what is needed to go on beside the EMA
All but `model` and `is_finite` are called by all processes together.

A step whose loss or gradient is infinite or nan on any process is skipped on all: it leaves
weights, optimizer state and EMA as they were. The device decides that, so the host does not wait.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from checkpoints.checkpoint import Checkpoint
from diffusion import RectifiedFlow, create_diffusion, objective_of
from latents.autoencoder import decode, encode
from latents.cache import CachedLatents
from latents.loading import batches_of, make_loader
from models import DiTConfig, count_parameters
from runtime.devices import keep_freed_memory, memory_in_use
from runtime.errors import STOPPED, UserError, printable, say
from runtime.processes import Distributed, reseed
from sampling.generate import SamplerSettings, generate
from training import saving
from training.run import name_of_experts
from training.start import Run, open_run
from training.tally import Tally
from training.watch import COMPUTING, DRAWING, SAVING, Watch

PROGRESS_FILE = "progress.json"
MAX_OVERFLOWS = 100  # fp16 retries of one step; the loss scale has then halved to nothing


def train(
    args: argparse.Namespace,
    dist: Distributed,
    *,
    micro_batch: int,
    make_engine: Callable[[DiTConfig, Checkpoint | None], object],
) -> int:
    """Trains to the last step, from the newest checkpoint of the run if there is one.

    Returns the exit code: 0 at the last step, or STOPPED when a signal asked to stop before it.

    micro_batch: images of one rank's micro-step
    make_engine: called with the config and, when the run starts from given weights, those
    Raises UserError for what the user can put right.
    """
    run = open_run(args, dist, micro_batch)
    start_step, end_step = run.stream.start_step, run.stream.end_step
    if start_step >= end_step:
        run.log.text(f"{run.folder} is finished: step {start_step} of {end_step}, nothing to do")
        run.log.close()
        return 0

    reseed(args.global_seed)
    engine = make_engine(run.config, run.weights)
    if run.state_folder:
        engine.load_state(run.state_folder)
        run.log.text(f"resumed from {run.state_folder}")
    describe(args, dist, run)
    keep_freed_memory(dist.device)
    loop = TrainingLoop(args, dist, engine, run)
    try:
        finished = loop.take_steps()
    finally:
        loop.watch.close()
        run.log.close()
    dist.barrier()
    return 0 if finished else STOPPED


def describe(args: argparse.Namespace, dist: Distributed, run: Run) -> None:
    """Says what is trained: model, parameters, images and steps."""
    if args.pretraining_tp != 1:
        run.log.text("--pretraining_tp has no effect: experts are stacked, not sliced")
    total, active = count_parameters(run.config)
    stream = run.stream
    run.log.text(
        f"{run.folder}: {name_of_experts(args.model, run.config)}, "
        f"{total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active), {len(run.dataset)} images of "
        f"{len(run.dataset.classes)} classes, steps {stream.start_step} to {stream.end_step} of "
        f"{stream.global_batch} images on {dist.world_size} {dist.device.type} process(es)"
    )


class TrainingLoop:
    """Steps, log lines, sample grids and checkpoints of a run, from its first step to its last."""

    def __init__(self, args: argparse.Namespace, dist: Distributed, engine, run: Run):
        self.args, self.dist, self.engine, self.run, self.log = args, dist, engine, run, run.log
        is_cached = isinstance(run.dataset, CachedLatents)
        self.to_latents = run.dataset.sample if is_cached else partial(encode, run.vae)
        self.objective = RectifiedFlow() if args.rf else create_diffusion()
        self.tally = Tally(dist)
        if run.state_folder:
            self.tally.load(run.state_folder / PROGRESS_FILE)
        self.saved_step = run.stream.start_step
        self.watch = Watch(dist, 60 * args.timeout, run.stream.start_step)

    def take_steps(self) -> bool:
        """Returns whether it came to the end; if a signal stopped it before, all is saved."""
        args, stream = self.args, self.run.stream
        pin = self.dist.device.type == "cuda"
        batches = batches_of(make_loader(self.run.dataset, stream, args.num_workers, pin))
        for step in range(stream.start_step, stream.end_step):
            if not self.watch.may_start(step):
                self.stop(step)
                return False
            if step and args.num_sample and step % args.sample_every == 0:
                self.draw_samples(step)  # now, so that a stop did not wait for it
            micro_batches = [self.to_device(next(batches)) for _ in range(args.accum_iter)]
            self.watch.doing = COMPUTING
            self.tally.add(self.step(step, micro_batches))
            self.log.advance()

            done, last = step + 1, step + 1 == stream.end_step
            if done % args.log_every == 0 or last:
                self.log_metrics(done)
            if last and args.num_sample:
                self.draw_samples(done)
            if done % args.ckpt_every == 0 or last:
                self.check_skipped(done)
                with self.tally.pause():
                    self.save(done, final=last)
        return True

    def step(self, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Takes one optimizer step; one that overflows in fp16 is tried again at a lower scale."""
        seed, rank, world_size = self.args.global_seed, self.dist.rank, self.dist.world_size
        losses = [
            self.micro_loss((seed, step, micro_step * world_size + rank), batch)
            for micro_step, batch in enumerate(micro_batches)
        ]
        lr = self.learning_rate(step + 1)
        for _ in range(MAX_OVERFLOWS):
            metrics = self.engine.train_step(losses, lr)
            if metrics is not None:
                return metrics
            self.tally.overflows += 1
        raise UserError(f"step {step}: fp16 gradients overflow at every loss scale; try bf16")

    def learning_rate(self, done: int) -> float:
        """The rate of step number `done`, counted from 1: linear warm-up, then constant."""
        return self.args.lr * min(1.0, done / max(1, self.args.warmup_steps))

    def micro_loss(
        self, key: tuple[int, int, int], batch: tuple[Tensor, Tensor]
    ) -> Callable[[nn.Module], dict[str, Tensor]]:
        """Returns the function of the model that computes a micro-batch's losses.

        All that it draws (posterior, time, noise, label dropout) follows from the key (seed, step,
        place of the micro-batch in the global batch), so splitting the global batch over more
        processes or more micro-steps draws the same. It returns "loss" and "aux_loss", scalars
        whose sum is minimised. Where that is infinite or nan both are nan, and so are gradients,
        which tells the other processes.
        """
        images, labels = batch  # (N, 3, H, W) uint8, or moments (N, 2C, h, w) fp16; (N,)

        def losses(model: nn.Module) -> dict[str, Tensor]:
            reseed(*key)
            x = self.to_latents(images)  # (N, C, h, w)
            if self.args.rf:
                terms = self.objective.training_losses(model, x, labels)
            else:
                t = torch.randint(self.objective.num_timesteps, (len(x),), device=x.device)
                terms = self.objective.training_losses(model, x, t, {"y": labels})
            loss, aux_loss = terms["loss"].mean(), terms["aux_loss"]
            one_or_nan = torch.where((loss + aux_loss).isfinite(), 1.0, math.nan)
            return {"loss": one_or_nan * loss, "aux_loss": one_or_nan * aux_loss}

        return losses

    def to_device(self, batch: tuple[Tensor, Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        """Moves images and labels without waiting, and names each unreadable image once."""
        images, labels, unreadable = batch
        for path in set(unreadable) - self.tally.unreadable:
            self.tally.unreadable.add(path)
            message = printable(f"skipped an image that cannot be read: {path}")
            self.log.text(message) if self.dist.is_main else say(message)
        device = self.dist.device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def stop(self, step: int) -> None:
        """Saves where a signal stopped the run, if anything happened since the last save.

        If that fails, the steps since the newest checkpoint will be done again. UserError if that
        one is not of this start: begun again and again, the run would come no further.
        """
        error = self.try_to_save(step) if step > self.saved_step else None
        stopped = f"stopped by SIGTERM or SIGUSR1 after step {step}"
        if error is None:
            self.log.text(f"{stopped}; the same command goes on from there")
        elif self.saved_step > self.run.stream.start_step:
            self.log.text(
                f"WARNING: {stopped}, which could not be saved ({error}); the same command goes on "
                f"from step {self.saved_step}"
            )
        else:
            raise UserError(
                f"{stopped}, which could not be saved ({error}), and no step since "
                f"{self.saved_step} is: put that right and run the same command again"
            )

    def log_metrics(self, done: int) -> None:
        """Logs what the steps since the last line came to; waits for the device.

        The expert load is that of the last micro-batches.
        """
        dist, tally = self.dist, self.tally
        means = tally.means()
        load = self.engine.model.expert_load  # (L, E), or None of a dense model
        if load is not None:
            load = dist.sum(load.clone()) / dist.world_size
        unreadable = dist.sum(torch.tensor(float(len(tally.unreadable)), device=dist.device))
        _, skipped_steps, _ = tally.skipped()
        values = {
            **means,
            "lr": self.learning_rate(done),
            "images_per_sec": tally.steps * self.run.stream.global_batch / tally.elapsed(),
            "memory_gb": memory_in_use(dist.device),
        }
        if load is not None:
            values["expert_load"] = load.amax(dim=1).tolist()  # max over mean, of each layer
        if unreadable:
            values["skipped_images"] = int(unreadable)
        if skipped_steps:
            values["skipped_steps"] = skipped_steps
        if self.args.precision == "fp16":
            values["overflows"] = tally.overflows
        self.log.metrics(done, values)
        tally.start_interval()
        self.check_skipped(done)

    def check_skipped(self, step: int) -> None:
        """Stops all ranks together when the last --max-skipped-steps steps were all skipped.

        They changed nothing, so what is saved is the state from before them.
        """
        _, _, in_a_row = self.tally.skipped()
        if in_a_row < self.args.max_skipped_steps:
            return
        good = step - in_a_row
        self.tally.forget_skipped(in_a_row)
        error = self.try_to_save(good) if good > self.saved_step else None
        unsaved = f" (step {good} could not be saved: {error})" if error else ""
        raise UserError(
            f"the loss or the gradient became infinite or nan in steps {good + 1} to {step}, which "
            f"were skipped: got {in_a_row} such steps in a row, expected fewer than "
            f"{self.args.max_skipped_steps} (--max-skipped-steps); the newest checkpoint in "
            f"{self.run.folder} has the weights from before them{unsaved}"
        )

    def check_finite(self, step: int) -> None:
        """Stops all ranks together before weights that a step made infinite are saved."""
        broken = (~self.engine.is_finite()).float().to(self.dist.device)  # offloaded, it was not
        if self.dist.sum(broken):
            raise UserError(
                f"the weights became infinite or nan before step {step}: nothing was saved since; "
                f"the newest checkpoint in {self.run.folder} is from before"
            )

    def draw_samples(self, step: int) -> None:
        """Draws a grid from the EMA weights: fixed seeds, labels spread over the classes.

        Nothing happens if the grid is there: a run that goes on makes up for what it missed.
        """
        args, model = self.args, self.engine.model
        path = self.run.folder / f"samples-{step:07d}.png"
        if self.dist.broadcast(path.exists()):
            return
        self.watch.doing = DRAWING
        labels = [i * model.config.num_classes // args.num_sample for i in range(args.num_sample)]
        with self.tally.pause(), self.engine.ema_weights():
            settings = SamplerSettings(
                objective=objective_of(args.rf),
                sampler=None if args.rf else "ddim",
                num_steps=50,
                cfg_scale=args.sample_cfg_scale if model.config.class_dropout_prob else 1.0,
            )
            latents = generate(model, labels, range(args.num_sample), settings)
        if self.dist.is_main:
            images = decode(self.run.vae, latents)  # (num_sample, 3, H, W) uint8
            grid = make_grid(images, nrow=math.ceil(args.num_sample**0.5))
            self.log.samples(step, grid, path)

    def save(self, step: int, *, final: bool) -> None:
        """Writes the checkpoint of a step; all processes take part.

        One that cannot be written is said and tried again at the next interval: the run goes on.
        After a final one there is no next, so that is a UserError.
        """
        error = self.try_to_save(step)
        if error is None:
            return
        cause = f"step {step} could not be saved ({error})"
        if final:
            raise UserError(
                f"{cause}, and it was the last: put that right and run the same command again; "
                f"it goes on from step {self.saved_step}"
            )
        again = step - step % self.args.ckpt_every + self.args.ckpt_every
        again = min(again, self.run.stream.end_step)
        self.log.text(f"WARNING: {cause}; training goes on and saves again at step {again}")

    def try_to_save(self, step: int) -> OSError | None:
        """Writes the checkpoint of a step; returns why it could not be written, on all processes.

        UserError for weights that are not to be saved.
        """
        self.watch.doing = SAVING
        self.check_finite(step)
        self.log.flush()  # before there is a checkpoint that makes these lines final
        record, texts = self.run.record(self.args, step), {PROGRESS_FILE: self.tally.state()}
        try:
            saved = saving.save_checkpoint(
                self.run.folder, step, self.engine, self.dist, record=record, texts=texts
            )
        except OSError as error:
            return error
        self.log.text(f"saved {saved}")
        self.saved_step = step
        self.prune(step)
        return None

    def prune(self, step: int) -> None:
        """Deletes the old checkpoints that --keep-last and --keep-every do not keep."""
        if not self.dist.is_main:
            return
        args, folder = self.args, self.run.folder
        try:
            saving.prune(folder, step, keep_last=args.keep_last, keep_every=args.keep_every)
        except OSError as error:
            self.log.text(f"WARNING: old checkpoints could not be deleted ({error})")
