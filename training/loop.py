"""The training loop, which train.py and train_deepspeed.py run on their engines.

An engine holds the model, its optimizer and its EMA:
    network(x, t, y)            the model in the training precision: (prediction fp32, aux_loss)
    micro_step(is_last)         context of a micro-batch's forward and backward pass
    backward(loss)              adds to the gradients
    optimizer_step(lr, loss)    updates weights and EMA: (gradient norm, skipped), scalars on the
                                device; None when fp16 gradients overflowed and nothing was updated
    model                       the DiT itself
    ema_weights()               context in which the model computes with its EMA weights
    ema_state_dict()            the EMA, fp32, in the layout of `DiT`, whole on the main process
    is_finite()                 whether this process's weights and EMA are, a bool scalar
    save_state(folder), load_state(folder)   what is needed to go on beside the EMA
All but `model` and `is_finite` are called by all processes together.

A step whose loss or gradient is infinite or nan on any process is skipped on all: it leaves
weights, optimizer state and EMA as they were.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from checkpoints import Checkpoint
from diffusion import objective_of
from evaluation.heldout import held_out_loss, make_objective
from latents.autoencoder import decode, encode
from latents.cache import CachedLatents
from latents.loading import batches_of, make_loader
from latents.sources import counted
from models import DiTConfig, count_parameters
from runtime.devices import be_deterministic, keep_freed_memory, memory_in_use
from runtime.errors import STOPPED, UserError, printable, say
from runtime.processes import Distributed, reseed
from runtime.signals import Requests
from sampling.generate import SamplerSettings, generate
from training.config import TrainConfig
from training.log import Interval, expert_metrics
from training.run_folder import name_of_experts, prune
from training.saving import save_checkpoint
from training.start import Run, open_run

MAX_OVERFLOWS = 100  # fp16 retries of one step; the loss scale has then halved to nothing
MAX_SKIPPED = 10  # steps in a row that change nothing; then the run is stopped


def train(
    config: TrainConfig,
    dist: Distributed,
    *,
    micro_batch: int,
    make_engine: Callable[[TrainConfig, DiTConfig, Checkpoint | None], object],
    engine_settings: dict | None = None,
) -> int:
    """Trains to the last step, from the newest checkpoint of the run if there is one.

    Returns the exit code: 0 at the last step, or STOPPED when a signal asked to stop before it.

    micro_batch: images of one rank's micro-step
    make_engine: called with the config, its gaps filled, the model's config, and the weights to
        start from, None for new ones
    engine_settings: what decides the result beside the config; a run that goes on keeps it
    Raises UserError for what the user can put right.
    """
    if config.deterministic:
        be_deterministic()
    run = open_run(config, dist, micro_batch, engine_settings or {})
    if run.stream.start_step >= run.stream.end_step:
        run.log.text(f"{run.folder} is finished: step {run.stream.start_step}, nothing to do")
        run.log.close()
        return 0
    reseed(config.global_seed)
    engine = make_engine(run.config, run.model_config, run.start.weights)
    if folder := run.start.state_folder:
        engine.load_state(folder)
        run.log.text(f"resumed from {folder}")
    keep_freed_memory(dist.device)
    loop = TrainingLoop(run, dist, engine)
    describe(run, dist, engine)
    try:
        finished = loop.take_steps()
    finally:
        loop.requests.close()
        run.log.close()
    dist.barrier()
    return 0 if finished else STOPPED


def describe(run: Run, dist: Distributed, engine) -> None:
    """Says what is trained: model, parameters, images and steps."""
    config, stream = run.config, run.stream
    total, active = count_parameters(run.model_config)
    numbers = f"{total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active)"
    if config.freeze or config.train_router_only:
        trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
        numbers += f", {trained / 1e6:.2f}M of them trained"
    run.log.text(
        f"{run.folder}: {name_of_experts(config.model, run.model_config)}, {numbers}, "
        f"{stream.num_images} images of {counted(len(run.dataset.classes), 'class')}, steps "
        f"{stream.start_step} to {stream.end_step} of {stream.global_batch} images on "
        f"{counted(dist.world_size, f'{dist.device.type} process')}"
    )
    if stream.global_batch > stream.num_images:
        run.log.text(f"note: a batch of {stream.global_batch} repeats {stream.num_images} images")


class TrainingLoop:
    """Steps, log lines, sample grids and checkpoints of a run, from its first step to its last."""

    def __init__(self, run: Run, dist: Distributed, engine):
        self.run, self.dist, self.engine = run, dist, engine
        self.config, self.log = run.config, run.log
        is_cached = isinstance(run.dataset, CachedLatents)
        self.to_latents = run.dataset.sample if is_cached else partial(encode, run.vae)
        self.objective = make_objective(objective_of(self.config.rf), run.settings)
        self.requests = Requests(dist, 60 * self.config.save_minutes)
        self.saved_step = run.stream.start_step
        self.unreadable: set[str] = set()  # images that were skipped
        self.overflows = 0  # fp16 steps that were taken again
        self.skipped = torch.zeros(2, dtype=torch.int64, device=dist.device)  # in all, in a row
        self.interval = Interval(dist)

    def take_steps(self) -> bool:
        """Returns whether it came to the end; if a signal stopped it before, all is saved."""
        config, stream = self.config, self.run.stream
        pin = self.dist.device.type == "cuda"
        batches = batches_of(make_loader(self.run.dataset, stream, config.num_workers, pin))
        for step in range(stream.start_step, stream.end_step):
            request = self.requests.poll()
            if request == "stop":
                self.stop(step)
                return False
            if request == "save":
                self.draw_samples(step)
                self.save(step)
            elif step and step % config.sample_every == 0:
                self.draw_samples(step)
            micro_batches = [self.to_device(next(batches)) for _ in range(config.accum_iter)]
            self.add(self.step(step, micro_batches))

            done, is_last = step + 1, step + 1 == stream.end_step
            is_due = bool(self.run.held_out) and (done % config.val_every == 0 or is_last)
            if done % config.log_every == 0 or is_last or is_due or step == stream.start_step:
                self.log_metrics(done, with_held_out=is_due)
            if is_last:
                self.draw_samples(done)
            if done % config.ckpt_every == 0 or is_last:
                self.save(done, final=is_last)
        return True

    def step(self, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step; one that overflows in fp16 is tried again at a lower loss scale."""
        for _ in range(MAX_OVERFLOWS):
            means, observed = {"loss": 0.0, "aux_loss": 0.0}, []
            for number, (images, labels) in enumerate(micro_batches):
                # All that is drawn below follows from this, whoever computes the micro-batch.
                place = number * self.dist.world_size + self.dist.rank
                reseed(self.config.global_seed, step, place)
                x = self.to_latents(images)  # (N, C, h, w)
                with self.engine.micro_step(is_last=number + 1 == len(micro_batches)):
                    loss, aux_loss = self.losses(x, labels)
                    self.engine.backward((loss + aux_loss) / len(micro_batches))
                means["loss"] += loss.detach() / len(micro_batches)
                means["aux_loss"] += aux_loss.detach() / len(micro_batches)
                observed.append(self.engine.model.observed)
            updated = self.engine.optimizer_step(self.learning_rate(step + 1), means["loss"])
            if updated is not None:
                grad_norm, skipped = updated
                self.update_routers(observed, skipped)
                return {**means, "grad_norm": grad_norm, "skipped": skipped}
            self.overflows += 1
        raise UserError(f"step {step}: fp16 gradients overflow at every loss scale; try bf16")

    def update_routers(self, observed: list[Tensor | None], skipped: Tensor) -> None:
        """Updates the state of routers that have one, on all processes' micro-batches."""
        if observed[0] is not None:
            total = self.dist.sum(torch.stack(observed).sum(0))  # (L, ...)
            mean = total / (len(observed) * self.dist.world_size)
            self.engine.model.update_routers(mean, skipped)

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's loss and the routers' loss on latents x (N, C, h, w), labels (N,).

        Their sum is minimised. Where it is infinite or nan both are nan, and so are the gradients,
        which tells the other processes.
        """
        if self.config.rf:
            terms = self.objective.training_losses(self.engine.network, x, labels)
        else:
            t = torch.randint(self.objective.num_timesteps, (len(x),), device=x.device)
            terms = self.objective.training_losses(self.engine.network, x, t, {"y": labels})
        loss, aux_loss = terms["loss"].mean(), terms["aux_loss"]
        one_or_nan = torch.where((loss + aux_loss).isfinite(), 1.0, math.nan)
        return one_or_nan * loss, one_or_nan * aux_loss

    def learning_rate(self, done: int) -> float:
        """The rate of step number `done`, counted from 1: linear warm-up, then --lr-schedule."""
        config, warmup = self.config, self.config.warmup_steps
        if done <= warmup or config.lr_schedule == "constant":
            return config.lr * min(1.0, done / max(1, warmup))
        share = (done - warmup) / max(1, self.run.stream.end_step - warmup)  # in (0, 1]
        if config.lr_schedule == "linear":
            return config.lr * (1 - share)
        return config.lr * (1 + math.cos(math.pi * share)) / 2

    def to_device(self, batch: tuple[Tensor, Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        """Moves images and labels without waiting, and names each unreadable image once."""
        images, labels, unreadable = batch
        for path in set(unreadable) - self.unreadable:
            self.unreadable.add(path)
            message = printable(f"skipped an image that cannot be read: {path}")
            self.log.text(message) if self.dist.is_main else say(message)
        device = self.dist.device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds what a step returns to the log's next line."""
        self.interval.add(metrics)
        self.skipped += metrics["skipped"]
        self.skipped[1] *= metrics["skipped"]
        self.log.advance()

    def log_metrics(self, done: int, with_held_out: bool) -> None:
        """Logs what the steps since the last line came to, over all processes; waits for them."""
        model, stream = self.engine.model, self.run.stream
        values = self.interval.means()
        rate = self.interval.steps_per_second()
        values["lr"] = self.learning_rate(done)
        values["images_per_sec"] = rate * stream.global_batch
        values["memory_gb"] = memory_in_use(self.dist.device)
        values |= expert_metrics(model, self.dist)
        unreadable = torch.tensor(float(len(self.unreadable)), device=self.dist.device)
        skipped_steps, in_a_row = self.skipped.tolist()
        counts = {
            "skipped_images": int(self.dist.sum(unreadable)),
            "skipped_steps": skipped_steps,
            "overflows": self.overflows,
        }
        values |= {name: count for name, count in counts.items() if count}
        if with_held_out:
            values |= self.held_out()
        self.log.metrics(done, values, rate)
        self.interval = Interval(self.dist)
        if in_a_row >= MAX_SKIPPED:
            self.give_up(done, in_a_row)

    def held_out(self) -> dict[str, float | list[float]]:
        """The EMA's loss on held-out images: mean, standard error, and by ten bins of time."""
        with self.engine.ema_weights():
            loss = held_out_loss(self.engine.model, self.objective, self.run.held_out)
        values = {"val_loss": loss.mean, "val_error": loss.standard_error, "val_bins": loss.bins}
        spent = loss.experts_per_token
        return {**values, "ema_experts_per_token": spent} if spent else values

    def give_up(self, step: int, in_a_row: int) -> None:
        """Stops all processes together: the last steps were all skipped and changed nothing."""
        good = step - in_a_row
        self.save(good)
        raise UserError(
            f"the loss or the gradient was infinite or nan in steps {good + 1} to {step}: got "
            f"{in_a_row} such steps in a row, expected fewer than {MAX_SKIPPED}; the newest "
            f"checkpoint in {self.run.folder} has the weights from before them"
        )

    # Between steps: sample grids and checkpoints, whose time counts for no step.

    def draw_samples(self, step: int) -> None:
        """Draws a grid from the EMA weights: fixed seeds, labels spread over the classes."""
        config, model = self.config, self.engine.model
        path = self.run.folder / f"samples-{step:07d}.png"
        if not config.num_sample or self.dist.broadcast(path.exists()):
            return
        count, classes = config.num_sample, model.config.num_classes
        labels = [i * classes // count for i in range(count)]
        settings = SamplerSettings(
            objective_of(config.rf),
            sampler=None if config.rf else "ddim",
            num_steps=50,
            cfg_scale=config.sample_cfg_scale if model.config.class_dropout_prob else 1.0,
        )
        with self.interval.paused():
            with self.engine.ema_weights():
                latents = generate(model, labels, range(count), settings)
            if self.dist.is_main:
                from torchvision.utils import make_grid

                images = decode(self.run.vae, latents).cpu()  # (num_sample, 3, H, W) uint8
                self.log.samples(step, make_grid(images, nrow=math.ceil(count**0.5)), path)

    def save(self, step: int, *, final: bool = False) -> None:
        """Writes the checkpoint of a step unless there is one; all processes take part.

        One that cannot be written is said, and the run goes on: it is tried again when the next one
        is due. After the last step there is no next, so that is a UserError.
        """
        if step <= self.saved_step:
            return
        self.check_finite(step)
        self.log.flush()  # before there is a checkpoint that makes these lines final
        record, is_kept = self.run.record(step), final or step % self.config.ckpt_every == 0
        try:
            with self.interval.paused():
                folder = save_checkpoint(
                    self.run.folder, step, self.engine, self.dist,
                    record=record, replaceable=not is_kept,
                )  # fmt: skip
            self.saved_step = step
            self.log.text(f"saved {folder}")
            if self.dist.is_main:
                prune(self.run.folder, self.config.keep_last)
        except OSError as error:
            cause = f"step {step} was not saved whole ({error})"
            if final and self.saved_step != step:
                raise UserError(
                    f"{cause}, and it was the last: put that right and run the same command again; "
                    f"it goes on from step {self.saved_step}"
                ) from None
            self.log.text(f"WARNING: {cause}")
        self.requests.saved()

    def check_finite(self, step: int) -> None:
        """Stops all processes together before weights that a step made infinite are saved."""
        broken = (~self.engine.is_finite()).float().to(self.dist.device)
        if self.dist.sum(broken):
            raise UserError(
                f"the weights became infinite or nan before step {step}: nothing was saved since; "
                f"the newest checkpoint in {self.run.folder} is from before"
            )

    def stop(self, step: int) -> None:
        """Saves where a signal stopped the run; UserError when that fails and nothing was saved.

        Started again and again, such a run would come no further.
        """
        self.save(step)
        if self.saved_step == self.run.stream.start_step < step:
            raise UserError(
                f"stopped after step {step}, which could not be saved, nor any since "
                f"{self.saved_step}: put that right and run the same command again"
            )
        self.log.text(f"stopped after step {step}; the same command goes on from {self.saved_step}")
