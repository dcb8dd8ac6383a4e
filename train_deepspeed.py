r"""Trains a DiT-MoE that data parallelism cannot hold: DeepSpeed's ZeRO and expert parallelism.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed_config config/zero2.json \
        --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path IMAGENET/train \
        --train_batch_size 32
    python train_deepspeed.py --dry-run --gpus 32 --deepspeed_config config/zero3_ep.json \
        --model DiT-G/2 --num_experts 16 --train_batch_size 8 --gradient-checkpointing

Run the same command again to go on after an interruption.
"""

import argparse
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.checkpoint import MODEL_FILE, Checkpoint
from checkpoints.weights import as_user_error, check_shapes, open_safetensors
from models import DiTConfig
from runtime import options
from runtime.devices import DTYPES, be_deterministic
from runtime.errors import UserError, exit_on_user_error
from runtime.files import read_json, write_durably
from runtime.processes import Distributed, close_distributed, run_process, setup_distributed
from training.ema import all_finite, update_ema
from training.finetune import freeze
from training.loop import train
from training.zero_config import (
    Layout,
    add_experts,
    complete_config,
    is_expert_parallel,
    layout_of,
)
from training.zero_plan import print_zero_plan

STATE_FOLDER, LAYOUT_FILE = "deepspeed", "layout.json"
AS_SAVED, UNIVERSAL = "state", "universal"  # sub-folders: DeepSpeed's files, and converted


class DeepSpeedEngine:
    """Every process holds a part: of the optimizer and EMA, and as ZeRO says of the weights."""

    def __init__(
        self,
        args: argparse.Namespace,
        dist: Distributed,
        config: DiTConfig,
        weights: Checkpoint | None,
        ds_config: dict,
    ):
        from training import zero  # takes seconds; --dry-run and --help do without

        self.dist, self.zero = dist, zero
        self.layout = layout_of(ds_config, dist.world_size)
        self.engine = zero.start_engine(
            config,
            ds_config,
            dtype=DTYPES[args.precision],
            device=dist.device,
            freeze=lambda model: freeze(model, args.freeze, args.train_router_only),
        )
        self.model = self.engine.module
        self.model.gradient_checkpointing = args.gradient_checkpointing
        if args.compile:
            self.model.compile_blocks()
        self.shards = zero.Shards(self.engine, config, dist.device)
        self.frozen: dict[str, Tensor] = {}  # on the main process: whole, fp32, on the CPU
        if weights is None:
            zero.draw_initial_weights(config, args.global_seed, self.set_master)
        else:
            for name in self.shards.shapes:
                self.set_master(name, weights.state_dict[name])
        self.shards.publish()
        self.ema = [master.detach().clone() for master in self.shards.masters]
        self.ema_decay = args.ema_decay

    def set_master(self, name: str, whole: Tensor) -> None:
        if name in self.shards.frozen:
            self.set_frozen(name, whole)
        else:
            self.shards.scatter(name, whole, self.shards.masters)

    def set_frozen(self, name: str, whole: Tensor) -> None:
        self.shards.set_frozen(name, whole)
        if self.dist.is_main:
            self.frozen[name] = whole.float().cpu()

    def train_step(
        self, micro_losses: list[Callable[[nn.Module], dict[str, Tensor]]], lr: float
    ) -> dict[str, Tensor] | None:
        """Takes one optimizer step over all micro-batches; None when fp16 gradients overflowed."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        scale = self.engine.optimizer.loss_scale
        means = {name: torch.zeros((), device=self.dist.device) for name in ("loss", "aux_loss")}
        for micro_loss in micro_losses:
            terms = micro_loss(self.engine)
            self.engine.backward(terms["loss"] + terms["aux_loss"])  # divided by the engine
            self.engine.step()  # counts micro-batches, and steps after the last
            for name, mean in means.items():
                mean += terms[name].detach() / len(micro_losses)
        skipped = not self.engine.was_step_applied()  # ZeRO has looked at the gradients' norm
        if not skipped:
            update_ema(self.ema, self.shards.masters, self.ema_decay)
        elif scale > 1 and not self.dist.sum((~means["loss"].isfinite()).float()):
            return None
        grad_norm = self.engine.get_global_grad_norm()
        device = self.dist.device
        return {
            **means,
            "grad_norm": torch.as_tensor(grad_norm, device=device),
            "skipped": torch.tensor(skipped, device=device),
        }

    def is_finite(self) -> Tensor:
        """Whether this process's master weights and EMA are finite, a bool scalar."""
        return all_finite([*self.shards.masters, *self.ema])

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model computes with its EMA weights, in eval mode; the weights are put back after."""
        self.shards.exchange(self.ema)
        self.model.eval()
        try:
            yield
        finally:
            self.shards.exchange(self.ema)
            self.model.train()

    def ema_state_dict(self) -> dict[str, Tensor]:
        state_dict = {"pos_embed": self.model.pos_embed, **self.frozen}
        for name in self.shards.fragments:
            whole = self.shards.gather(name, self.ema)
            if self.dist.is_main:
                state_dict[name] = whole
        return state_dict

    def save_state(self, folder: Path) -> None:
        # What ds_to_universal asks for; with expert parallelism DeepSpeed writes it.
        client_state = {} if self.engine.has_moe_layers else {"universal_checkpoint_info": {}}
        self.zero.save_checkpoint(self.engine, folder / STATE_FOLDER, AS_SAVED, client_state)
        if self.dist.is_main:
            write_durably(folder / STATE_FOLDER / LAYOUT_FILE, json.dumps(asdict(self.layout)))

    def load_state(self, folder: Path) -> None:
        which = find_state(folder, self.layout)
        self.zero.load_checkpoint(
            self.engine, folder / STATE_FOLDER, which, universal=which == UNIVERSAL
        )
        path = folder / MODEL_FILE
        with open_safetensors(path) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            with as_user_error(path, "another model"):
                expected = {"pos_embed": self.model.pos_embed.shape, **self.shards.shapes}
                check_shapes(shapes, expected)
            for name in self.shards.shapes:
                if name in self.shards.frozen:
                    self.set_frozen(name, file.get_tensor(name))
                else:
                    self.shards.scatter(name, file.get_tensor(name), self.ema)
        if self.shards.frozen:
            self.shards.publish()


def find_state(folder: Path, wanted: Layout) -> str:
    """Names the sub-folder of DeepSpeed's state that fits a layout; UserError if none does."""
    state = folder / STATE_FOLDER
    try:
        stored = Layout(**read_json(state / LAYOUT_FILE))
    except OSError:
        raise UserError(
            f"{folder}: no {STATE_FOLDER}/{LAYOUT_FILE} in it, expected a checkpoint of "
            "train_deepspeed.py"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{state / LAYOUT_FILE}: damaged ({error})") from None
    if stored == wanted:
        shards = len(list((state / AS_SAVED).glob("*optim_states.pt")))
        if shards != stored.world_size:  # DeepSpeed would go on without the optimizer's state
            raise UserError(
                f"{state / AS_SAVED}: got {shards} files *optim_states.pt, expected "
                f"{stored.world_size}; remove {folder} to go on from the checkpoint before"
            )
        return AS_SAVED
    if not wanted.can_take(stored):
        raise UserError(
            f"{folder}: got {wanted}, expected {stored} as it was saved by; only the number of "
            f"processes can change (or start a new run: --resume {folder / MODEL_FILE})"
        )
    if not (state / UNIVERSAL).is_dir():
        raise UserError(
            f"{folder}: got {wanted}, expected {stored} as it was saved by; to go on, convert it "
            f"once: python -m deepspeed.checkpoint.ds_to_universal --input_folder "
            f"{state / AS_SAVED} --output_folder {state / UNIVERSAL}"
        )
    return UNIVERSAL


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_training_flags(parser)
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--deepspeed_config", default=str(Path(__file__).parent / "config" / "zero2.json"),
        help="JSON that says how to cut the model up: ZeRO stage, offload, expert parallelism",
    )  # fmt: skip
    group.add_argument(
        "--train_batch_size", type=options.positive_int, default=32,
        help="images of one micro-step on one GPU; a step takes this many x --accum_iter x GPUs",
    )  # fmt: skip
    options.add_bool(group, "--deepspeed", help="accepted for published commands; no effect")
    group.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by launchers; the environment counts"
    )
    group = parser.add_argument_group("plan (with --dry-run)")
    group.add_argument(
        "--gpus", type=options.positive_int, help="GPUs to plan for; default: as launched"
    )
    group.add_argument(
        "--gpus-per-node", type=options.positive_int, help="default: as launched, or 8"
    )
    group.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of one GPU")
    return options.parse_training_args(parser)


def stand_alone() -> None:
    """Describes this process as the only one, for DeepSpeed, when no launcher did."""
    if "RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip


def node_size(default: int) -> int:
    """Processes of this node, by torchrun's or the deepspeed launcher's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", default)))


@exit_on_user_error
def main(args: argparse.Namespace) -> int:
    """Returns the exit code, see `training.loop.train`."""
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print_zero_plan(args, gpus_per_node=args.gpus_per_node or node_size(8))
        return 0
    if args.deterministic:
        be_deterministic()
    stand_alone()
    dist = setup_distributed(timeout=60 * args.timeout)
    ds_config = complete_config(args, dist.world_size)
    # What a run has to keep when it goes on; the number of processes may change.
    args.global_batch_size = ds_config["train_batch_size"]
    args.zero_stage = ds_config["zero_optimization"]["stage"]
    args.expert_parallel = is_expert_parallel(ds_config)
    if args.compile and (args.zero_stage == 3 or args.expert_parallel):
        raise UserError("--compile: got ZeRO-3 or expert parallelism, expected ZeRO-1 or 2 without")

    def make_engine(config: DiTConfig, weights: Checkpoint | None) -> DeepSpeedEngine:
        add_experts(
            ds_config, config, args.deepspeed_config,
            world_size=dist.world_size, gpus_per_node=node_size(dist.world_size),
        )  # fmt: skip
        return DeepSpeedEngine(args, dist, config, weights, ds_config)

    code = train(args, dist, micro_batch=args.train_batch_size, make_engine=make_engine)
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
