"""The training loop, which `training.start` begins.

    code = TrainingLoop(config=config, folder=folder, ..., engine=engine).run()

If the loss or the gradient of a step is infinite or nan on any process, all processes skip the
step: only the fp16 loss scale changes.
"""

import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from checkpoints import Record, step_folders
from checkpoints.costs import count_macs, count_parameters
from latents.autoencoder import Autoencoder
from latents.loading import BatchStream, check_unreadable, read_batches
from latents.sources import Batch, Source
from moe_kernels.attention import flash_attention_fault
from runtime.devices import DTYPES, keep_freed_memory, lacks_instructions, memory_in_use
from runtime.errors import (
    STOPPED,
    UserError,
    pluralize,
    print_safely,
    printable,
)
from runtime.processes import ProcessError, reseed
from runtime.signals import Requests
from training.alarms import Alarms
from training.config import TrainConfig
from training.engine import Engine, node_size
from training.log import RunLog
from training.lr_schedule import rate_factor
from training.plan import describe_memory, device_memory, disk_notes, lighter_settings, most_tokens
from training.preview import draw_preview
from training.profiling import profiling
from training.saving import Saver
from training.step import take_step
from training.step_metrics import (
    ForwardClock,
    MetricTracker,
    ProcessReport,
    expert_metrics,
    held_out_metrics,
    process_load,
    round_number,
    speed_metrics,
)

LOG_SECONDS = 10  # between log lines, unless --log-every is set
SLOW_SECONDS = 60  # of the first step, after which a line says what takes long
MAX_SKIPPED = 10  # the run stops at a log line if the last 10 or more steps were skipped


class StepAbandoned(Exception):
    """A signal arrived before a micro-batch of a single process."""


@dataclass(kw_only=True)
class TrainingLoop:
    """Takes the steps of a run; writes the log lines, sample grids and checkpoints."""

    config: TrainConfig
    folder: Path
    record: Record  # the metadata of the checkpoints, without their step
    dataset: Source
    vae: Autoencoder | None  # None if no step needs it
    held_out: list[Batch]  # latents of --val-path or --val-share, if any
    stream: BatchStream  # the remaining steps
    log: RunLog
    engine: Engine

    def __post_init__(self):
        self.dist, self.objective = self.engine.dist, self.config.objective
        self.requests = Requests(self.dist, 60 * self.config.run.save_minutes)
        self.requests.has_step = False  # before the first step
        if self.stream.start_step:  # a checkpoint from which a launcher can start again
            self.requests.early_exit = STOPPED
        self.saver = Saver(self.folder, self.engine)
        self.saved_step, self.save_failure = self.stream.start_step, ""
        self.unreadable: set[str] = set()  # "name (reason)" of the skipped images
        self.num_read = 0  # images
        # Numbers of skipped steps: total, consecutive.
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.dist.device)
        self.alarms = Alarms(self.config.model.sparse_blocks)
        self.tracker = MetricTracker(self.dist)
        self.clock = ForwardClock(self.engine.model, self.dist.device)
        self.log_every: int = self.config.run.log_every or 1
        self.slow = threading.Timer(SLOW_SECONDS, self.explain_slow_step)
        self.slow.daemon = True

    def run(self) -> int:
        """Returns the exit code: 0 after the last step, or STOPPED if a signal stopped the run."""
        keep_freed_memory(self.dist.device)
        self.describe()
        profile = self.config.run.profile if self.dist.is_main else None
        start = time.monotonic()
        self.slow.start()
        try:
            with profiling(profile, self.folder / "profile", self.stream.start_step) as after_step:
                finished = self.take_steps(after_step)
        finally:
            self.close()
        if finished:
            elapsed = timedelta(seconds=round(time.monotonic() - start))
            command = f"python sample.py --ckpt {shlex.quote(str(self.folder))}"
            self.log.text(f"finished after {elapsed}; to generate images: {command}")
        self.dist.barrier()
        return 0 if finished else STOPPED

    def describe(self) -> None:
        """Logs the model, its parameters, the images and the steps of the run."""
        config, stream, dist = self.config, self.stream, self.dist
        total, active = count_parameters(config.model)
        counts = f"{active / 1e6:.1f}M active"
        parameters = [*self.engine.model.parameters()]
        if not all(parameter.requires_grad for parameter in parameters):
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            counts += f", {trained / 1e6:.2f}M trained"
        self.log.text(
            f"{self.folder}: {config.name}, {total / 1e6:.1f}M parameters ({counts}), "
            f"{most_tokens(config.model)} tokens an image, "
            f"{stream.num_images} images of {pluralize(len(self.dataset.classes), 'class')}, steps "
            f"{stream.start_step + 1} to {stream.end_step}, {stream.global_batch} images per step, "
            f"on {pluralize(dist.world_size, f'{dist.device.type} process')}"
        )
        dist.on_main(self.describe_plan)
        if flash_attention_fault:
            reason = printable(flash_attention_fault)[:300]
            self.log.text(
                f"note: flash-attn is installed but does not load ({reason}); PyTorch's attention "
                "is used instead"
            )
        precisions = {"--precision": config.step.precision}
        optimizer = config.step.optimizer
        precisions[f"--optimizer {optimizer.name}:precision"] = optimizer.options.get("precision")
        slow = [
            f"{flag} {name}"
            for flag, name in precisions.items()
            if name and lacks_instructions(dist.device, DTYPES[name])
        ]
        if slow:
            self.log.text(
                f"note: this processor has no instructions for {' and '.join(slow)}; with fp32, "
                "training is several times faster"
            )

    def describe_plan(self) -> None:
        """Logs the layout, the memory and the disk space of the run."""
        config, stream, dist = self.config, self.stream, self.dist
        memory = device_memory(dist.device, node_size(config, dist.world_size))
        plan = describe_memory(config, stream, {"": memory})
        if dist.world_size > 1:
            self.log.text(f"layout: {plan['layout']}")
        fits = plan["fits"].partition(": ")
        note = "WARNING: the memory is too small" if fits[0] == "NO" else "memory"
        self.log.text(f"{note}: {fits[2]}")
        for note in disk_notes(config, stream.end_step, self.folder / "checkpoints"):
            self.log.text(f"note: {note}")

    def explain_slow_step(self) -> None:
        """Logs what a step computes, and what makes it faster."""
        config = self.config
        compiling = " (--compile: it includes the compilation)" if config.step.compile else ""
        _, active = count_parameters(config.model)
        faster = [*lighter_settings(config), "a smaller --global-batch-size"]
        self.log.text(
            f"the first step has taken a minute so far{compiling}: {self.stream.global_batch} "
            f"images of {most_tokens(config.model)} tokens, {active / 1e6:.1f}M parameters for "
            f"each; what makes a step shorter: {'; '.join(faster)}"
        )

    def take_steps(self, after_step: Callable[[], None]) -> bool:
        """Takes the remaining steps and saves the last one. If a signal stops the run, saves the
        step before and returns False."""
        config, stream, data = self.config.run, self.stream, self.config.data
        pin = self.dist.device.type == "cuda"
        batches = read_batches(self.dataset, stream, data.num_workers, pin)
        last = stream.end_step - 1
        for step in range(stream.start_step, stream.end_step):
            request = self.requests.poll()
            if request == "stop":
                self.stop(step)
                return False
            before = time.perf_counter()
            if self.saver.is_done:
                self.finish_save()
            if request == "save" or step and step % config.ckpt_every == 0:
                self.save(step)
            if request == "save" or step and step % config.sample_every == 0:
                self.draw_samples(step)
            start = time.perf_counter()
            loaded = [next(batches) for _ in range(self.config.step.accum_iter)]
            self.tracker.paused += start - before
            self.tracker.waited += time.perf_counter() - start
            try:
                self.step(step, loaded)
            except StepAbandoned:
                self.stop(step)
                return False
            self.requests.has_step = True
            self.slow.cancel()
            after_step()

            done, is_first, is_last = step + 1, step == stream.start_step, step == last
            evaluates = bool(self.held_out) and (done % config.val_every == 0 or is_last)
            if done % self.log_every == 0 or is_first or is_last or evaluates:
                self.log_metrics(done, with_held_out=evaluates)
        self.save_last(stream.end_step, least=stream.end_step)
        self.draw_samples(stream.end_step)
        return True

    def step(self, step: int, loaded: list[tuple[Batch, list[str]]]) -> None:
        """Takes optimizer step number `step` + 1 and records its metrics.

        loaded: micro-batches, each with the images that cannot be read
        """
        config, end = self.config, self.stream.end_step
        self.rate = rate_factor(config.lr_schedule, config.step.warmup_steps, step + 1, end)
        metrics = take_step(
            self.engine, self.objective, self.prepared(step, loaded), len(loaded),
            step=step + 1, rate=self.rate,
        )  # fmt: skip
        self.tracker.add(metrics)
        self.skipped += metrics["skipped"]
        self.skipped[1] *= metrics["skipped"]  # in a row
        self.log.advance()

    def prepared(self, step: int, loaded: list[tuple[Batch, list[str]]]) -> Iterator[Batch]:
        """Yields the micro-batches of a step on the device, with their "latents" (N, C, h, w).

        The seed is (seed, step, number of the micro-batch over all processes), whatever the rank.
        Each process reports an unreadable image once.
        """
        dist = self.dist
        for number, (batch, unreadable) in enumerate(loaded):
            if dist.world_size == 1 and self.requests.is_signalled:
                raise StepAbandoned
            self.num_read += len(batch["label"])
            for name in set(unreadable) - self.unreadable:
                self.unreadable.add(name)
                report = self.log.text if dist.is_main else print_safely
                report(f"skipped an image that cannot be read: {name}")
            batch = {n: tensor.to(dist.device, non_blocking=True) for n, tensor in batch.items()}
            reseed(self.config.run.global_seed, step, number * dist.world_size + dist.rank)
            yield self.dataset.to_latents(self.vae, batch)

    def log_metrics(self, done: int, with_held_out: bool) -> None:
        """Logs the metrics, averaged over all processes and over the steps since the last log line.

        Waits until these steps are computed. Ends the run after `MAX_SKIPPED` skipped steps in a
        row.
        """
        model, stream = self.engine.model, self.stream
        values = self.tracker.means()
        seconds = self.tracker.seconds()
        steps_per_second = self.tracker.steps / seconds
        values["epoch"] = done * stream.global_batch / stream.num_images
        values["lr"] = self.config.step.lr * self.rate
        values["images_per_sec"] = steps_per_second * stream.global_batch
        if self.dist.is_main:
            step = self.config.step
            passes = stream.micro_batch, step.precision  # as in the plan of the memory
            macs = count_macs(self.config.model, model.experts_per_token, *passes)
            values |= speed_metrics(self.config, macs, values["images_per_sec"], self.dist)
        peaks = {"memory_gb": memory_in_use(self.dist.device)} | process_load(model)
        micro_batches = self.tracker.steps * self.config.step.accum_iter
        reports = self.dist.gather(ProcessReport(
            socket.gethostname(), peaks, self.unreadable, self.num_read, self.tracker.waited,
            bad=int(self.tracker.bad),
            busy=self.tracker.waited / micro_batches + self.clock.seconds(),
        ))  # fmt: skip
        values |= {name: max(report.peaks[name] for report in reports) for name in peaks}
        values |= expert_metrics(model, self.dist)
        values["data_wait"] = sum(r.waited for r in reports) / self.dist.world_size / seconds
        # Several processes may have met the same image.
        unreadable = len(set().union(*(report.unreadable for report in reports)))
        skipped_steps, in_a_row = self.skipped.tolist()
        counts = {"skipped_images": unreadable, "skipped_steps": skipped_steps}
        values |= {name: count for name, count in counts.items() if count}
        if with_held_out:
            values |= held_out_metrics(self.engine, self.held_out)
        self.log.metrics(done, values, steps_per_second)
        for line in self.alarms.check(values, reports):
            self.log.text(line)
        read = sum(report.num_read for report in reports)
        check_unreadable("--data-path", unreadable, min(read, stream.num_images))
        self.tracker = MetricTracker(self.dist)
        if self.config.run.log_every is None:
            self.log_every = self.dist.broadcast(round_number(LOG_SECONDS * steps_per_second))
        if in_a_row >= MAX_SKIPPED:
            self.stop_skipping(done, in_a_row)

    def stop_skipping(self, done: int, in_a_row: int) -> None:
        """Saves the state before the skipped steps that end with step `done`; raises UserError."""
        good, factor = done - in_a_row, self.config.step.grad_skip
        self.save(good)  # skipped steps changed only the fp16 loss scale
        self.finish_save()
        spike = f" or more than {factor:g} times its mean (--grad-skip)" if factor else ""
        hint = " or --precision bf16" * (self.config.step.precision == "fp16")
        raise UserError(
            f"the loss or the gradient was infinite or nan{spike} in steps {good + 1} to {done}: "
            f"got {in_a_row} such steps in a row, expected fewer than {MAX_SKIPPED}; the newest "
            f"checkpoint in {self.folder}, if there is one, holds the weights before these "
            f"steps; try a lower --lr{hint} in a branch (--resume "
            f"{self.folder}/checkpoints/STEP --run-name NEW)"
        )

    def draw_samples(self, step: int) -> None:
        """Generates and writes a grid of samples. A failure is logged as a warning, unless other
        processes wait for a failed one, which ends the run."""
        path = self.folder / f"samples-{step:07d}.png"
        if not self.config.run.num_sample or self.dist.broadcast(path.exists()):
            return

        try:
            grid = self.dist.run_on_all(
                lambda: draw_preview(self.engine, self.dataset, self.vae, self.requests),
                has_collectives=self.engine.copy_size > 1,
            )
        except (OSError, UserError, ProcessError) as error:
            self.log.text(f"WARNING: no sample grid of step {step} ({error})")
        else:
            if grid is not None:
                self.log.samples(step, grid, path)
            elif self.requests.is_signalled:
                self.log.text(f"no sample grid of step {step}: a signal arrived")

    def save(self, step: int) -> None:
        """Starts to write the checkpoint of a step, unless this step or a later one was saved.

        All processes call this method together. A failed save is logged as a warning, and training
        continues. Weights or EMAs that are not finite, or buffers of nan, end the run.
        """
        self.finish_save()  # wait for the previous checkpoint
        if step <= self.saved_step:
            return
        self.check_finite(step)
        is_kept = step == self.stream.end_step or step % self.config.run.ckpt_every == 0
        with self.failure_logged(step):
            self.log.flush()  # a resumed run cuts the log at its checkpoint
            self.saver.start(step, replace(self.record, step=step), replaceable=not is_kept)
        self.requests.saved()

    def finish_save(self) -> None:
        """Waits for the checkpoint in progress, if there is one, and logs the outcome."""
        if self.saver.writing is None:
            return
        with self.failure_logged(self.saver.step):
            not_deleted = self.saver.wait()
            self.saved_step = self.saver.step
            self.log.saved(self.saver.folder)
            if not_deleted:
                self.log.text(
                    f"WARNING: step {self.saved_step} was saved, but a previous checkpoint could "
                    f"not be deleted ({not_deleted})"
                )

    @contextmanager
    def failure_logged(self, step: int) -> Iterator[None]:
        """Turns an error of a save, which all processes raise, into a warning."""
        try:
            yield
        except (OSError, ProcessError) as error:
            self.save_failure = f"the checkpoint of step {step} could not be written ({error})"
            self.log.text(f"WARNING: {self.save_failure}")

    def save_last(self, step: int, least: int) -> None:
        """Saves the last step of this command; raises UserError unless step `least` or a later one
        is saved."""
        self.save(step)
        self.finish_save()
        if self.saved_step < least:
            again = f"go on from step {self.saved_step}: --resume {self.folder}"
            if not step_folders(self.folder):
                again = "begin again"
            raise UserError(
                f"{self.save_failure}, and no later save will replace it: fix the cause and {again}"
            )

    def stop(self, step: int) -> None:
        """Saves the run after a signal stopped it.

        Raises UserError if no step of this command could be saved: a launcher that restarts stopped
        runs would repeat the same steps forever.
        """
        self.save_last(step, least=min(step, self.stream.start_step + 1))
        self.log.text(
            f"stopped after step {step}; to go on from step {self.saved_step}: "
            f"{self.config.engine.script} --resume {shlex.quote(str(self.folder))}"
        )

    def check_finite(self, step: int) -> None:
        """Raises UserError on all processes if a weight or EMA is not finite or a buffer is nan."""
        if not all(self.dist.gather(bool(self.engine.is_finite()))):
            raise UserError(
                f"a weight or an EMA is infinite or nan, or a buffer is nan, after step {step}, "
                f"so it was not saved; the newest checkpoint in {self.folder}, if there is one, "
                "holds earlier, finite weights; try a lower --lr in a branch (--resume "
                f"{self.folder}/checkpoints/STEP --run-name NEW)"
            )

    def close(self) -> None:
        """Waits for the checkpoint in progress, and ends the signal handling."""
        self.slow.cancel()
        try:
            self.finish_save()
        except Exception as error:  # such as a lost process; the error that ended the run counts
            self.log.text(f"WARNING: step {self.saver.step} may not be saved ({error})")
        self.requests.close()
