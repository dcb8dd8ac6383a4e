"""The training loop, which train.py and train_deepspeed.py run on their engines.

    code = train(given, DDPFlags, lambda config: DDPEngine, dist)

A step whose loss or gradient is infinite or nan on any process is skipped on all: it leaves
weights, optimizer state and EMA as they were.
"""

import shlex
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import Tensor

from cpu import keep_freed_memory, lacks_instructions
from latents.loading import batches_of, make_loader
from latents.sources import Batch
from models import count_macs, count_parameters
from runtime.devices import DTYPES, memory_in_use
from runtime.errors import STOPPED, UserError, counted, printable, reported_as, say
from runtime.flags import Given
from runtime.processes import Distributed, reseed
from runtime.signals import Requests
from training.ema import start_notes
from training.engine import Engine
from training.log import RunLog
from training.metrics import (
    Interval,
    expert_metrics,
    held_out_metrics,
    round_number,
    speed_metrics,
)
from training.preview import draw_preview
from training.profiling import profiling
from training.saving import Saver
from training.schedule import rate_factor
from training.setup import prepare_run
from training.start import ChooseEngine, Run
from training.step import take_step

ANNOUNCED_SIZE = 250_000_000  # parameters; a save of more takes a while, and a line says it begins
LOG_SECONDS = 10  # from one log line to the next, without --log-every
MAX_SKIPPED = 10  # steps in a row that change nothing; then the run is stopped


def train(given: Given, engine_flags: type, choose_engine: ChooseEngine, dist: Distributed) -> int:
    """Trains to the last step, from the newest checkpoint of the run if there is one.

    Returns the exit code: 0 at the last step, or STOPPED when a signal asked to stop before it.

    given: what the command said, see `runtime.flags.parse_flags`
    engine_flags: the flags of the engine's script; choose_engine: the engine that a config asks for
    Raises UserError for what the user can put right.
    """
    run = prepare_run(given, engine_flags, choose_engine, dist)
    try:
        code = take_run(run, dist)
    except BaseException:
        run.log.close(exit_code=1)
        raise
    run.log.close()
    return code


def take_run(run: Run, dist: Distributed) -> int:
    """Takes the steps that a run has left; returns the exit code, see `train`."""
    if run.stream.start_step >= run.stream.end_step:
        run.log.text(f"{run.folder} is finished: step {run.stream.start_step}, nothing to do")
        return 0
    engine = run.engine(dist, run.config, run.weights)
    run.weights = None  # the engine has them
    if folder := run.state_folder:
        engine.load_state(folder)
        run.log.text(f"resumed from {folder}")
    keep_freed_memory(dist.device)
    loop = TrainingLoop(run, dist, engine)
    describe(run, dist, engine)
    start = time.monotonic()
    try:
        folder, first = run.folder / "profile", run.stream.start_step
        with profiling(run.config.run.profile if dist.is_main else None, folder, first) as step:
            loop.after_step = step
            finished = loop.take_steps()
        if finished:
            elapsed = timedelta(seconds=round(time.monotonic() - start))
            command = f"python sample.py --ckpt {shlex.quote(str(run.folder))}"
            run.log.text(f"finished after {elapsed}; to see what it draws: {command}")
    finally:
        loop.close()
    dist.barrier()
    return 0 if finished else STOPPED


def describe(run: Run, dist: Distributed, engine: Engine) -> None:
    """Says what is trained: model, parameters, images and steps."""
    config, stream = run.config, run.stream
    total, active = count_parameters(config.model)
    numbers = f"{total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active)"
    if config.step.freezes:
        trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
        numbers += f", {trained / 1e6:.2f}M of them trained"
    run.log.text(
        f"{run.folder}: {config.name}, {numbers}, "
        f"{stream.num_images} images of {counted(len(run.dataset.classes), 'class')}, steps "
        f"{stream.start_step} to {stream.end_step} of {stream.global_batch} images on "
        f"{counted(dist.world_size, f'{dist.device.type} process')}"
    )
    for note in start_notes(config.emas, stream.end_step):
        run.log.text(f"note: {note}")
    precision = config.step.precision
    if lacks_instructions(dist.device, DTYPES[precision]):
        run.log.text(
            f"note: this processor has no {precision} instructions, so --precision fp32 is several "
            "times as fast (and --optimizer-precision fp32 with Muon)"
        )


class TrainingLoop:
    """Steps, log lines, sample grids and checkpoints of a run, from its first step to its last."""

    def __init__(self, run: Run, dist: Distributed, engine: Engine):
        self.run, self.dist, self.engine = run, dist, engine
        self.config, self.objective = run.config, run.config.objective
        self.log: RunLog = run.log
        self.requests = Requests(dist, 60 * self.config.run.save_minutes)
        self.saver = Saver(run.folder, run.config, dist)
        self.saved_step, self.save_failure = run.stream.start_step, ""
        self.unreadable: set[str] = set()  # images that were skipped
        self.skipped = torch.zeros(2, dtype=torch.int64, device=dist.device)  # in all, in a row
        self.interval = Interval(dist)
        self.log_every: int = run.config.run.log_every or 1
        self.macs = count_macs(run.config.model)
        self.after_step: Callable[[], None] = lambda: None

    def take_steps(self) -> bool:
        """Returns whether it came to the end; if a signal stopped it before, all is saved."""
        config, stream, data = self.config.run, self.run.stream, self.config.data
        pin = self.dist.device.type == "cuda"
        batches = batches_of(make_loader(self.run.dataset, stream, data.num_workers, pin))
        for step in range(stream.start_step, stream.end_step):
            request = self.requests.poll()
            if request == "stop":
                self.stop(step)
                return False
            if self.saver.is_done:
                self.finish_save()
            if request == "save":
                self.save(step)
                self.release_save()
                self.draw_samples(step)
            elif step and step % config.sample_every == 0:
                self.draw_samples(step)
            accumulation = self.config.step.accum_iter
            with self.interval.waiting():
                loaded = [next(batches) for _ in range(accumulation)]
            self.add(self.step(step, [self.to_device(batch) for batch in loaded]))
            self.after_step()

            done, is_last = step + 1, step + 1 == stream.end_step
            is_due = bool(self.run.held_out) and (done % config.val_every == 0 or is_last)
            if done % config.ckpt_every == 0 or is_last:
                self.save(done)
            if done % self.log_every == 0 or is_last or is_due or step == stream.start_step:
                self.log_metrics(done, with_held_out=is_due)
            self.release_save()
        self.finish_save()
        if self.saved_step < stream.end_step:  # there is no next save
            raise UserError(
                f"{self.save_failure}, and it was the last: put that right and run the same "
                f"command again; it goes on from step {self.saved_step}"
            )
        self.draw_samples(stream.end_step)
        return True

    def step(self, step: int, micro_batches: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step; returns what it came to."""
        return take_step(
            self.engine, self.objective, self.latents(step, micro_batches), len(micro_batches),
            step=step + 1, rate=self.rate(step + 1), dist=self.dist,
            auxiliary=self.config.auxiliary,
        )  # fmt: skip

    def latents(self, step: int, micro_batches: list[Batch]) -> Iterator[Batch]:
        """Yields each micro-batch of a step with "latents" (N, C, h, w).

        All that is drawn for one follows from seed, step and place, whoever computes it.
        """
        for number, batch in enumerate(micro_batches):
            place = number * self.dist.world_size + self.dist.rank
            reseed(self.config.run.global_seed, step, place)
            yield self.run.dataset.to_latents(self.run.vae, batch)

    def rate(self, done: int) -> float:
        return rate_factor(self.config.step, done, self.run.stream.end_step)

    def to_device(self, loaded: tuple[Batch, list[str]]) -> Batch:
        """Moves a batch without waiting, and names each unreadable image once."""
        batch, unreadable = loaded
        for path in set(unreadable) - self.unreadable:
            self.unreadable.add(path)
            tell = self.log.text if self.dist.is_main else say
            tell(printable(f"skipped an image that cannot be read: {path}"))
        device = self.dist.device
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

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
        seconds = self.interval.seconds()
        rate = self.interval.steps / seconds
        values["epoch"] = done * stream.global_batch / stream.num_images
        values["lr"] = self.config.step.lr * self.rate(done)
        values["images_per_sec"] = rate * stream.global_batch
        values |= speed_metrics(self.config, self.macs, values["images_per_sec"], self.dist)
        values["memory_gb"] = memory_in_use(self.dist.device)
        values |= expert_metrics(model, self.dist)
        local = [float(len(self.unreadable)), self.interval.waited / seconds]
        local = torch.tensor(local, dtype=torch.float64, device=self.dist.device)
        unreadable, waited = self.dist.sum(local).tolist()
        values["data_wait"] = waited / self.dist.world_size
        skipped_steps, in_a_row = self.skipped.tolist()
        counts = {
            "skipped_images": int(unreadable),
            "skipped_steps": skipped_steps,
        }
        values |= {name: count for name, count in counts.items() if count}
        if with_held_out:
            times = self.config.data.val_times
            values |= held_out_metrics(self.engine, self.objective, self.run.held_out, times)
        self.log.metrics(done, values, rate)
        self.interval = Interval(self.dist)
        if self.config.run.log_every is None:
            self.log_every = self.dist.broadcast(round_number(LOG_SECONDS * rate))
        if in_a_row >= MAX_SKIPPED:  # the last steps changed nothing
            good = done - in_a_row
            self.save(good)
            self.finish_save()
            raise UserError(
                f"the loss or the gradient was infinite or nan in steps {good + 1} to {done}: got "
                f"{in_a_row} such steps in a row, expected fewer than {MAX_SKIPPED}; the newest "
                f"checkpoint in {self.run.folder} has the weights from before them"
                "; try a lower --lr"
                f"{', or bf16 in another run' if self.config.step.precision == 'fp16' else ''}"
            )

    def draw_samples(self, step: int) -> None:
        """Writes a grid of samples; a grid that cannot be drawn is a warning."""
        path = self.run.folder / f"samples-{step:07d}.png"
        if not self.config.run.num_sample or self.dist.broadcast(path.exists()):
            return

        def draw() -> Tensor | None:
            with reported_as(f"no sample grid of step {step}", Exception):
                return draw_preview(self.run, self.engine, self.dist.is_main)

        with self.interval.paused():
            try:
                grid = self.dist.together(draw)
            except UserError as error:
                self.log.text(f"WARNING: {error}")
            else:
                if grid is not None:
                    self.log.samples(step, grid, path)

    def save(self, step: int) -> None:
        """Begins to write the checkpoint of a step unless there is one; all processes take part.

        A checkpoint that cannot be written is a warning, and the run goes on: it is tried again
        when the next one is due.
        """
        self.finish_save()  # the one before
        if step <= self.saved_step:
            return
        self.check_finite(step)
        if count_parameters(self.config.model)[0] > ANNOUNCED_SIZE:
            self.log.text(f"saving step {step}")
        is_kept = step == self.run.stream.end_step or step % self.config.run.ckpt_every == 0
        try:
            with self.interval.paused():
                self.saver.start(step, self.engine, self.run.record(step), replaceable=not is_kept)
        except OSError as error:
            self.warn_of_save(step, error)
        self.requests.saved()

    def release_save(self) -> None:
        """Lets a checkpoint that is being written become the newest: the log has its steps."""
        if self.saver.is_held:
            self.log.flush()
            self.saver.release()

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written, and says what became of it."""
        try:
            with self.interval.paused():
                if not self.saver.wait():
                    return
        except OSError as error:
            self.warn_of_save(self.saver.step, error)
            return
        self.saved_step = self.saver.step
        self.log.text(f"saved {self.saver.folder}")
        if error := self.saver.not_deleted:
            cause = f"checkpoints before step {self.saved_step} were not all deleted ({error})"
            self.log.text(f"WARNING: {cause}")

    def warn_of_save(self, step: int, error: Exception) -> None:
        self.save_failure = f"step {step} was not saved whole ({error})"
        self.log.text(f"WARNING: {self.save_failure}")

    def close(self) -> None:
        """Ends what runs beside the steps; after an error it raises no other error."""
        try:
            self.finish_save()
        except Exception as error:
            self.warn_of_save(self.saver.step, error)
        self.requests.close()

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
        self.release_save()
        self.finish_save()
        if self.saved_step == self.run.stream.start_step < step:
            raise UserError(
                f"stopped after step {step}, which could not be saved, nor any since "
                f"{self.saved_step}: put that right and run the same command again"
            )
        self.log.text(f"stopped after step {step}; the same command goes on from {self.saved_step}")
