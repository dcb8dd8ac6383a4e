r"""Trains a DiT-MoE on one process, one node or many, with distributed data parallelism.

    python train.py --data-path data/fashion-mnist --vae-path assets/vae-fashion-mnist \
        --image-size 32 --model DiT-Ti/2 --rf --global-batch-size 128 --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num_experts 8 \
        --num_experts_per_tok 2 --data-path IMAGENET/train --global-batch-size 256

Run the same command again to go on after an interruption.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints.checkpoint import MODEL_FILE, Checkpoint, read_checkpoint
from checkpoints.weights import as_user_error, check_shapes, read_pickle, shapes_of
from models import DiT, DiTConfig
from runtime import options
from runtime.devices import DTYPES, be_deterministic
from runtime.errors import UserError, exit_on_user_error
from runtime.processes import (
    Distributed,
    close_distributed,
    read_environment,
    reseed,
    run_process,
    setup_distributed,
)
from training.ema import all_finite, update_ema
from training.finetune import freeze
from training.loop import train
from training.plan import print_plan
from training.saving import save_tensors

STATE_FILE = "training_state.pt"


class DDPEngine:
    """Every process holds the whole model: fp32 master weights, autocast steps, fp32 EMA."""

    def __init__(
        self,
        args: argparse.Namespace,
        dist: Distributed,
        config: DiTConfig,
        weights: Checkpoint | None,
    ):
        self.dist = dist
        self.model = DiT(**vars(config))
        if weights is not None:
            self.model.load_state_dict(weights.state_dict)
        else:  # once more, so that they follow from the seed as train_deepspeed.py draws them
            reseed(args.global_seed)
            self.model.initialize_weights()
        freeze(self.model, args.freeze, args.train_router_only)
        self.model.to(dist.device).train()
        self.model.gradient_checkpointing = args.gradient_checkpointing
        if args.compile:
            self.model.compile_blocks()
        self.parameters = dict(self.model.named_parameters())
        self.ema = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self.ema_decay, self.grad_clip = args.ema_decay, args.grad_clip
        self.optimizer = torch.optim.AdamW(
            [weight for weight in self.model.parameters() if weight.requires_grad],
            lr=args.lr, weight_decay=args.weight_decay, fused=True,
        )  # fmt: skip
        self.precision = DTYPES[args.precision]
        self.scaler = torch.amp.GradScaler(
            dist.device.type, enabled=self.precision == torch.float16
        )
        self.network: nn.Module = self.model
        if dist.world_size > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[dist.device] if dist.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.dist.device.type, self.precision, enabled=enabled)

    def train_step(
        self, micro_losses: list[Callable[[nn.Module], dict[str, Tensor]]], lr: float
    ) -> dict[str, Tensor] | None:
        """Takes one optimizer step over all micro-batches; None when fp16 gradients overflowed."""
        means = {name: torch.zeros((), device=self.dist.device) for name in ("loss", "aux_loss")}
        for number, micro_loss in enumerate(micro_losses, start=1):
            with self.no_sync() if number < len(micro_losses) else nullcontext():
                with self.autocast():
                    terms = micro_loss(self.network)
                loss = (terms["loss"] + terms["aux_loss"]) / len(micro_losses)
                self.scaler.scale(loss).backward()
            for name, mean in means.items():
                mean += terms[name].detach() / len(micro_losses)

        self.scaler.unscale_(self.optimizer)
        grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skipped = ~grad_norm.isfinite()
        overflowed = self.step_optimizer(skipped, means["loss"])
        self.optimizer.zero_grad(set_to_none=True)
        if overflowed:
            return None
        update_ema(self.ema.values(), self.parameters.values(), self.ema_decay, skipped)
        return {**means, "grad_norm": grad_norm, "skipped": skipped}

    def step_optimizer(self, skipped: Tensor, loss: Tensor) -> bool:
        """Updates weights and optimizer state unless the step is skipped, which the device decides.

        Returns whether fp16 gradients overflowed, and have to be computed again at the loss scale
        that this lowered. A loss that is itself broken, or gradients that are at scale 1, are no
        overflow: they would be the same at any scale.
        """
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = skipped.float()  # as GradScaler tells the fused AdamW
            self.optimizer.step()
            return False
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            return False
        broken = self.dist.sum((~loss.isfinite()).float())
        if scale > 1 and not broken:
            return True
        self.scaler.update(scale)
        return False

    def is_finite(self) -> Tensor:
        """Whether all weights and their EMA are finite, a bool scalar."""
        return all_finite([*self.parameters.values(), *self.ema.values()])

    def no_sync(self):
        return self.network.no_sync() if self.network is not self.model else nullcontext()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model computes with its EMA weights, in eval mode, under this engine's autocast."""
        weights = {name: weight.data for name, weight in self.parameters.items()}
        try:
            self.model.eval()
            for name, weight in self.parameters.items():
                weight.data = self.ema[name]
            with self.autocast():
                yield
        finally:
            for name, weight in self.parameters.items():
                weight.data = weights[name]
            self.model.train()

    def ema_state_dict(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **self.ema}

    def save_state(self, folder: Path) -> None:
        if self.dist.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            save_tensors(state, folder / STATE_FILE)

    def load_state(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {STATE_FILE} in it, expected a checkpoint of train.py")
        try:
            state = read_pickle(path, self.dist.device, mmap=False)
            with as_user_error(path, "damaged"):
                moments = self.check_state(state)
        except UserError as error:
            raise UserError(
                f"{error}; remove {folder} to go on from the checkpoint before"
            ) from None
        path = folder / MODEL_FILE
        averages = read_checkpoint(path).state_dict
        with as_user_error(path, "another model"):
            check_shapes(shapes_of(averages), shapes_of(self.ema_state_dict()))
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # as the flags now say
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if state["scaler"]:  # or it was saved in another precision
            self.scaler.load_state_dict(state["scaler"])
        for name, average in self.ema.items():
            average.copy_(averages[name])

    def check_state(self, state: dict) -> dict[int, dict[str, Tensor]]:
        """Returns the optimizer's part of a stored state, by the number of the parameter.

        Raises ValueError and the like if tensors are missing or do not fit the model.
        """
        check_shapes(shapes_of(state["model"]), shapes_of(self.model.state_dict()))
        moments = {}
        for number, weight in enumerate(self.optimizer.param_groups[0]["params"]):
            moments[number] = state["optimizer"]["state"].get(number, {})
            shapes = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
            check_shapes(shapes_of(moments[number]), shapes)
        if not all(type(value) in (int, float) for value in state["scaler"].values()):
            raise ValueError("scaler: got something else than numbers")
        return moments


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_training_flags(parser)
    parser.add_argument(
        "--global-batch-size", type=options.positive_int, default=256,
        help="images of one optimizer step, over all processes and micro-batches",
    )  # fmt: skip
    return options.parse_training_args(parser)


@exit_on_user_error
def main(args: argparse.Namespace) -> int:
    """Returns the exit code, see `training.loop.train`."""
    if args.deterministic:
        be_deterministic()
    dist = read_environment() if args.dry_run else setup_distributed(timeout=60 * args.timeout)
    parts = dist.world_size * args.accum_iter
    if args.global_batch_size % parts:
        raise UserError(
            f"--global-batch-size: got {args.global_batch_size}, expected a multiple of "
            f"{dist.world_size} processes x {args.accum_iter} micro-batches (--accum_iter)"
        )
    micro_batch = args.global_batch_size // parts
    code = 0
    if args.dry_run:
        print_plan(args, dist, micro_batch)
    else:
        code = train(
            args,
            dist,
            micro_batch=micro_batch,
            make_engine=lambda config, weights: DDPEngine(args, dist, config, weights),
        )
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
