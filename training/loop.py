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
    save_state(folder), load_state(folder)
All but `model` and `is_finite` are called by all processes together.

A step whose loss or gradient is infinite or nan on any process is skipped on all: it leaves
weights, optimizer state and EMA as they were. The device decides that, so the host does not wait.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from diffusion import RectifiedFlow, create_diffusion
from models import DiT, DiTConfig, count_parameters
from training import checkpoint, finetune, run, saving
from training.autoencoder import (
    autoencoder_digest,
    decode,
    encode,
    latent_geometry,
    load_autoencoder,
    load_autoencoder_config,
)
from training.data import BatchStream, ImageSource, batches_of, make_loader
from training.distributed import Distributed, keep_freed_memory, reseed
from training.errors import STOPPED, UserError, printable, say
from training.generate import generate
from training.interval import Interval
from training.latents import CachedLatents
from training.log import RunLog
from training.options import DATA_DEFAULTS, DTYPES, fill_flags
from training.sources import open_images
from training.start import compare_data, find_start
from training.untrusted import MAX_JSON, read_json
from training.watch import COMPUTING, DRAWING, SAVING, Watch

PROGRESS_FILE = "progress.json"
MAX_OVERFLOWS = 100  # fp16 retries of one step; the loss scale has then halved to nothing


def train(
    args: argparse.Namespace,
    dist: Distributed,
    *,
    micro_batch: int,
    make_engine: Callable[[DiTConfig, checkpoint.Checkpoint | None], object],
) -> int:
    """Trains to the last step, from the newest checkpoint of the run if there is one.

    Returns the exit code: 0 at the last step, or STOPPED when a signal asked to stop before it.

    micro_batch: images of one rank's micro-step
    make_engine: called with the config and, when the run starts from given weights, those
    Raises UserError for what the user can put right.
    """
    check_flags(args)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    source = finetune.open_source(args)
    dataset = open_dataset(args)
    config = model_config(args, len(dataset.classes), geometry_of(dataset, args), source)
    folder = run.choose_run_folder(args)
    lock = run.RunLock(folder, dist)
    lock.acquire()
    run.check_settings(folder, args)
    state_folder, weights, notes = find_start(folder, args, config, dist)
    origin = finetune.origin_of(state_folder, weights or source)
    if source is not None and state_folder is None:
        weights, notes = finetune.adapt(source, config, dataset.classes, args.global_seed)
        notes += finetune.note_objective(source, args.rf)
    vae = open_autoencoder(args, dataset, dist.device)
    run.enter_run_folder(folder, args, lock)

    global_batch = micro_batch * args.accum_iter * dist.world_size
    end_step = total_steps(args, len(dataset), global_batch)
    start_step = 0
    if state_folder:
        stored = checkpoint.read_info(state_folder)
        start_step = stored["step"]
        notes += compare_data(stored, dataset, micro_batch, state_folder, folder)
    if dist.is_main:
        saving.remove_leftovers(folder)
    try:
        log = dist.together(
            lambda: RunLog(
                folder, is_main=dist.is_main, start_step=start_step, total_steps=end_step
            )
        )
    except OSError as error:
        raise run.cannot_write(folder, error) from None
    for note in notes:
        log.text(printable(note))
    if start_step >= end_step:
        log.text(f"{folder} is finished: step {start_step} of {end_step}, nothing to do")
        log.close()
        return 0

    reseed(args.global_seed)
    engine = make_engine(config, weights)
    if state_folder:
        engine.load_state(state_folder)
        log.text(f"resumed from {state_folder}")
    if args.pretraining_tp != 1:
        log.text("--pretraining_tp has no effect: experts are stacked, not sliced")
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
    keep_freed_memory(dist.device)
    loop = TrainingLoop(args, dist, engine, vae, dataset, stream, folder, log, origin)
    try:
        if state_folder:
            loop.load_progress(state_folder)
        finished = loop.run()
    finally:
        loop.watch.close()
        log.close()
    dist.barrier()
    return 0 if finished else STOPPED


class TrainingLoop:
    """Steps, log lines, sample grids and checkpoints from `stream.start_step` to its end."""

    def __init__(
        self,
        args: argparse.Namespace,
        dist: Distributed,
        engine,
        vae: nn.Module | None,
        dataset: ImageSource | CachedLatents,
        stream: BatchStream,
        folder: Path,
        log: RunLog,
        origin: dict | None = None,
    ):
        self.origin = origin
        self.args, self.dist, self.engine, self.vae = args, dist, engine, vae
        self.dataset, self.stream, self.folder, self.log = dataset, stream, folder, log
        self.is_cached = isinstance(dataset, CachedLatents)
        self.to_latents = dataset.sample if self.is_cached else partial(encode, vae)
        self.objective = RectifiedFlow() if args.rf else create_diffusion()
        self.unreadable: set[str] = set()
        self.overflows = 0
        self.interval = Interval(dist.device)
        self.saved_step = stream.start_step
        self.watch = Watch(dist, 60 * args.timeout, stream.start_step)

    def run(self) -> bool:
        """Returns whether it came to the end; if a signal stopped it before, all is saved."""
        args = self.args
        pin = self.dist.device.type == "cuda"
        loader = make_loader(self.dataset, self.stream, args.num_workers, pin)
        batches = batches_of(loader)
        for step in range(self.stream.start_step, self.stream.end_step):
            if not self.watch.may_start(step):
                self.stop(step)
                return False
            if step and args.num_sample and step % args.sample_every == 0:
                self.draw_samples(step)  # now, so that a stop did not wait for it
            micro_batches = [self.to_device(next(batches)) for _ in range(args.accum_iter)]
            self.watch.doing = COMPUTING
            self.interval.add(self.step(step, micro_batches))
            self.log.advance()

            done, last = step + 1, step + 1 == self.stream.end_step
            if done % args.log_every == 0 or last:
                self.log_metrics(done)
            if last and args.num_sample:
                self.draw_samples(done)
            if done % args.ckpt_every == 0 or last:
                self.check_skipped(done)
                with self.interval.pause():
                    self.save(done, final=last)
        return True

    def stop(self, step: int) -> None:
        """Saves where a signal stopped the run, if anything happened since the last save.

        If that fails, the steps since the newest checkpoint will be done again. UserError if that
        one is not of this start: begun again and again, the run would come no further.
        """
        error = self.try_to_save(step) if step > self.saved_step else None
        stopped = f"stopped by SIGTERM or SIGUSR1 after step {step}"
        if error is None:
            self.log.text(f"{stopped}; the same command goes on from there")
        elif self.saved_step > self.stream.start_step:
            self.log.text(
                f"WARNING: {stopped}, which could not be saved ({error}); the same command goes on "
                f"from step {self.saved_step}"
            )
        else:
            raise UserError(
                f"{stopped}, which could not be saved ({error}), and no step since "
                f"{self.saved_step} is: put that right and run the same command again"
            )

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
        whose sum is minimised; where that is infinite or nan, so that its gradients are nan, which
        tells the other processes.
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
        for path in set(unreadable) - self.unreadable:
            self.unreadable.add(path)
            message = printable(f"skipped an image that cannot be read: {path}")
            self.log.text(message) if self.dist.is_main else say(message)
        device = self.dist.device
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def log_metrics(self, step: int) -> None:
        """Logs means over all ranks and over the steps since the last line that were not skipped.

        The expert load is that of the last micro-batches. Waits for the device, once an interval.
        """
        device, world_size, steps = self.dist.device, self.dist.world_size, self.interval.steps
        skipped_steps, skipped_in_all, _ = self.interval.skipped()
        sums = self.dist.sum(self.interval.sums.clone())
        means = sums / (world_size * (steps - skipped_steps))  # nan if all were skipped
        load = self.engine.model.expert_load  # (L, E), or None of a dense model
        if load is not None:
            load = self.dist.sum(load.clone()) / world_size
        skipped = self.dist.sum(torch.tensor(float(len(self.unreadable)), device=device))
        loss, aux_loss, grad_norm = means.tolist()
        seconds = self.interval.elapsed()
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
        if skipped_in_all:
            values["skipped_steps"] = skipped_in_all
        if self.args.precision == "fp16":
            values["overflows"] = self.overflows
        self.log.metrics(step, values)
        self.interval.start()
        self.check_skipped(step)

    def check_skipped(self, step: int) -> None:
        """Stops all ranks together when the last --max-skipped-steps steps were all skipped.

        They changed nothing, so what is saved is the state from before them.
        """
        _, in_all, in_a_row = self.interval.skipped()
        if in_a_row < self.args.max_skipped_steps:
            return
        good = step - in_a_row
        self.interval.counts -= torch.tensor([0, in_a_row, in_a_row], device=self.dist.device)
        error = self.try_to_save(good) if good > self.saved_step else None
        unsaved = f" (step {good} could not be saved: {error})" if error else ""
        raise UserError(
            f"the loss or the gradient became infinite or nan in steps {good + 1} to {step}, which "
            f"were skipped: got {in_a_row} such steps in a row, expected fewer than "
            f"{self.args.max_skipped_steps} (--max-skipped-steps); the newest checkpoint in "
            f"{self.folder} has the weights from before them{unsaved}"
        )

    def check_finite(self, step: int) -> None:
        """Stops all ranks together before weights that a step made infinite are saved."""
        broken = (~self.engine.is_finite()).float().to(self.dist.device)  # offloaded, it was not
        if self.dist.sum(broken):
            raise UserError(
                f"the weights became infinite or nan before step {step}: nothing was saved since; "
                f"the newest checkpoint in {self.folder} is from before"
            )

    def draw_samples(self, step: int) -> None:
        """Draws a grid from the EMA weights: fixed seeds, labels spread over the classes.

        Nothing happens if the grid is there: a run that goes on makes up for what it missed.
        """
        args, model = self.args, self.engine.model
        path = self.folder / f"samples-{step:07d}.png"
        if self.dist.broadcast(path.exists()):
            return
        self.watch.doing = DRAWING
        labels = [i * model.config.num_classes // args.num_sample for i in range(args.num_sample)]
        with self.interval.pause(), self.engine.ema_weights():
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
            self.log.images(step, grid)
            self.log.flush()
            try:
                save_image(grid / 255, path.with_suffix(".tmp"), format="png")
                path.with_suffix(".tmp").rename(path)
            except OSError as error:
                self.log.text(f"WARNING: the samples of step {step} were not written ({error})")

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
        again = min(again, self.stream.end_step)
        self.log.text(f"WARNING: {cause}; training goes on and saves again at step {again}")

    def try_to_save(self, step: int) -> OSError | None:
        """Writes the checkpoint of a step; returns why it could not be written, on all processes.

        UserError for weights that are not to be saved.
        """
        self.watch.doing = SAVING
        self.check_finite(step)
        self.log.flush()  # before there is a checkpoint that makes these lines final
        info, texts = self.checkpoint_info(step), {PROGRESS_FILE: self.progress()}
        try:
            saved = saving.save_checkpoint(
                self.folder, step, self.engine, self.dist, info=info, texts=texts
            )
        except OSError as error:
            return error
        self.log.text(f"saved {saved}")
        self.saved_step = step
        self.prune(step)
        return None

    def progress(self) -> str:
        """What the log lines to come depend on, of all ranks, as JSON."""
        mine = {
            "interval": self.interval.state(),
            "overflows": self.overflows,
            "unreadable": sorted(self.unreadable),
        }
        ranks = self.dist.gather(mine)
        text = json.dumps(ranks)
        if len(text) > MAX_JSON:  # what is read; those names will be told again
            text = json.dumps([{**progress, "unreadable": []} for progress in ranks])
        return text

    def load_progress(self, folder: Path) -> None:
        """Takes up what a checkpoint says of all ranks; those of old have nothing to say."""
        path = folder / PROGRESS_FILE
        if not path.is_file():
            return
        with checkpoint.blame(path, "damaged"):
            ranks = read_json(path)
            states = [progress["interval"] for progress in ranks]
            self.interval.load(states, self.dist.rank, self.dist.world_size)
            self.overflows = int(ranks[0]["overflows"])
            if len(ranks) == self.dist.world_size:
                self.unreadable = set(map(str, ranks[self.dist.rank]["unreadable"]))

    def checkpoint_info(self, step: int) -> dict:
        """What a checkpoint says of itself, beside the model's config."""
        args = self.args
        return {
            "step": step,
            "model": args.model,
            "objective": "rectified_flow" if args.rf else "gaussian",
            "image_size": args.image_size,
            "vae_path": args.vae_path,
            **({"vae_sha256": self.dataset.settings.vae_sha256} if self.is_cached else {}),
            "class_names": self.dataset.classes,
            **({"initialized_from": self.origin} if self.origin else {}),
            "settings": run.settings_of(args),
            "micro_batch": self.stream.micro_batch,
            "images": self.dataset.listing,
        }

    def prune(self, step: int) -> None:
        """Deletes the old checkpoints that --keep-last and --keep-every do not keep."""
        if not self.dist.is_main:
            return
        try:
            args = self.args
            saving.prune(self.folder, step, keep_last=args.keep_last, keep_every=args.keep_every)
        except OSError as error:
            self.log.text(f"WARNING: old checkpoints could not be deleted ({error})")


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other or make no sense."""
    if args.data_path is None and args.latents_path is None:
        raise UserError(
            "--data-path: got nothing, expected a folder of class folders, or --latents-path"
        )
    if args.data_path is not None and args.latents_path is not None:
        raise UserError("--latents-path: got it beside --data-path, expected one of them")
    if args.resume and args.finetune and not run.is_run_folder(Path(args.resume)):
        raise UserError(
            "--finetune: got it beside --resume, expected one of them (an interrupted run goes on "
            "by itself)"
        )
    if args.keep_every is not None and args.keep_last is None:
        raise UserError("--keep-every: got it without --keep-last, expected both")
    for name in ("lr", "aux_loss_alpha", "grad_clip", "weight_decay"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected a number >= 0")
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay: got {args.ema_decay}, expected 0 <= decay < 1")


def open_dataset(args: argparse.Namespace) -> ImageSource | CachedLatents:
    """Opens --latents-path or --data-path; fills in --image-size and --vae-path.

    UserError when --image-size or --num-classes does not fit.
    """
    if args.latents_path is None:
        fill_flags(args, DATA_DEFAULTS)
        dataset = open_images(args.data_path, args.image_size)
    else:
        dataset = CachedLatents(args.latents_path)
        size, vae_path = dataset.image_size, dataset.settings.vae_path
        fill_flags(args, {"image_size": size, "vae_path": vae_path})
        if args.image_size != size:
            raise UserError(
                f"--image-size: got {args.image_size}, expected {size}, that of {args.latents_path}"
            )
    if args.num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"--num-classes: got {args.num_classes}, expected {len(dataset.classes)}, the number "
            f"of classes in {args.latents_path or args.data_path}"
        )
    return dataset


def geometry_of(dataset: ImageSource | CachedLatents, args: argparse.Namespace) -> tuple[int, int]:
    """Returns (latent size, latent channels) of cached latents, or of what --vae-path makes."""
    if isinstance(dataset, CachedLatents):
        channels, size, _ = dataset.settings.latent_shape
        return size, channels
    return latent_geometry(load_autoencoder_config(args.vae_path), args.image_size)


def open_autoencoder(
    args: argparse.Namespace, dataset: ImageSource | CachedLatents, device: torch.device
) -> nn.Module | None:
    """Loads --vae-path; None if latents are cached and no sample grids are to be decoded.

    UserError when its weights are not those that the latents were made with.
    """
    if isinstance(dataset, CachedLatents):
        settings = dataset.settings
        if not args.num_sample and args.vae_path == settings.vae_path:
            return None
        got = autoencoder_digest(args.vae_path)
        if got != settings.vae_sha256:
            raise UserError(
                f"--vae-path: got {args.vae_path} with weights {got[:12]}, expected those of "
                f"{args.latents_path}, {settings.vae_sha256[:12]} ({settings.vae_path})"
            )
    return load_autoencoder(args.vae_path, device, DTYPES[args.precision])


def model_config(
    args: argparse.Namespace,
    num_classes: int,
    geometry: tuple[int, int],
    source: checkpoint.Checkpoint | None = None,
) -> DiTConfig:
    """The DiTConfig that the flags, the data and --finetune's weights ask for.

    geometry: (latent size, latent channels)
    """
    input_size, in_channels = geometry
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


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
