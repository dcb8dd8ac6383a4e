"""The engine of train_deepspeed.py: every process holds a part (ZeRO, expert parallelism)."""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from checkpoints import MODEL_FILE, Checkpoint
from checkpoints.weights import as_user_error, check_shapes, open_safetensors, read_pickle
from models import DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.files import read_json, write_durably
from runtime.processes import Distributed, read_environment
from training import zero
from training.config import DeepSpeedConfig
from training.ema import update_ema
from training.finetune import freeze
from training.zero_config import Layout, add_experts, layout_of

STATE_FOLDER, LAYOUT_FILE = "deepspeed", "layout.json"
AS_SAVED, UNIVERSAL = "state", "universal"  # sub-folders: DeepSpeed's files, and converted
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# All that DeepSpeed's files hold besides tensors and plain values.
STORED_CLASSES = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


class DeepSpeedEngine:
    """Every process holds a part: of the optimizer and EMA, and as ZeRO says of the weights.

    See `training.loop` for what an engine does.
    """

    def __init__(
        self,
        dist: Distributed,
        ds_config: dict,
        config: DeepSpeedConfig,
        model_config: DiTConfig,
        weights: Checkpoint | None,
    ):
        self.dist = dist
        add_experts(ds_config, model_config, config, dist.world_size)
        self.layout = layout_of(ds_config, dist.world_size)
        self.engine = zero.start_engine(
            model_config,
            ds_config,
            dtype=DTYPES[config.precision],
            device=dist.device,
            freeze=lambda model: freeze(model, config.freeze, config.train_router_only),
        )
        self.model = self.engine.module
        self.model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            self.model.compile_blocks()
        self.shards = zero.Shards(self.engine, model_config, dist.device)
        self.frozen: dict[str, Tensor] = {}  # on the main process: whole, fp32, on the CPU
        if weights is None:
            zero.draw_initial_weights(model_config, config.global_seed, self.set_weight)
        else:
            for name in self.shards.shapes:
                self.set_weight(name, weights.state_dict[name])
            for name, buffer in self.shards.buffers.items():
                buffer.copy_(weights.state_dict[name])
        self.shards.publish()
        self.ema = [master.detach().clone() for master in self.shards.masters]
        self.ema_decay = config.ema_decay

    def set_weight(self, name: str, whole: Tensor) -> None:
        self.shards.set(name, whole)
        if self.shards.is_frozen(name) and self.dist.is_main:
            self.frozen[name] = whole.float().cpu()

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The model in the training precision; returns (prediction fp32, aux_loss)."""
        prediction, aux_loss = self.engine(x, t, y)
        return prediction.float(), aux_loss

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch, which DeepSpeed counts."""
        yield
        if not is_last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients those of a micro-batch's share of the loss."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor] | None:
        """Updates weights and EMA; returns the gradient's norm and whether the step was skipped.

        None when fp16 gradients overflowed, at a loss scale whose lowering can help.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        scale = self.engine.optimizer.loss_scale
        self.engine.step()
        skipped = not self.engine.was_step_applied()  # ZeRO has looked at the gradients' norm
        if skipped and scale > 1 and not self.dist.sum((~loss.isfinite()).float()):
            return None
        for average, master in zip(self.ema, self.shards.masters, strict=True):
            update_ema(average, master, self.ema_decay, skipped)
        grad_norm, device = self.engine.get_global_grad_norm(), self.dist.device
        return torch.as_tensor(grad_norm, device=device), torch.tensor(skipped, device=device)

    def is_finite(self) -> Tensor:
        """Whether this process's master weights and EMA are finite, a bool scalar."""
        parts = [part.isfinite().all() for part in (*self.shards.masters, *self.ema)]
        return torch.stack(parts).all()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model computes with its EMA weights, in eval mode; the weights are put back after."""
        self.shards.swap(self.ema)
        self.shards.publish()
        self.model.eval()
        try:
            yield
        finally:
            self.shards.swap(self.ema)
            self.shards.publish()
            self.model.train()

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The EMA, fp32, in the layout of `DiT`, whole on the main process."""
        state_dict = {**self.shards.buffers, **self.frozen}
        self.shards.swap(self.ema)
        try:
            for name in self.shards.shapes:
                if not self.shards.is_frozen(name):
                    state_dict[name] = self.shards.gather(name)
        finally:
            self.shards.swap(self.ema)
        return state_dict

    def save_state(self, folder: Path) -> None:
        """Writes what is needed to go on beside the EMA; OSError when this process could not."""
        # What a conversion asks for; with expert parallelism DeepSpeed writes it.
        client_state = {} if self.engine.has_moe_layers else {"universal_checkpoint_info": {}}
        state = folder / STATE_FOLDER
        with zero.interceptable_writes(self.engine) as failures:
            self.engine.save_checkpoint(
                state, tag=AS_SAVED, client_state=client_state, save_latest=False
            )
        if failures:
            raise failures[0]
        if self.dist.is_main:
            write_durably(state / LAYOUT_FILE, json.dumps(asdict(self.layout)))

    def load_state(self, folder: Path) -> None:
        """Takes up what a step folder has; UserError when it does not fit."""
        which = find_state(folder, self.layout)
        self.load_optimizer(folder / STATE_FOLDER, which)
        path = folder / MODEL_FILE
        with open_safetensors(path) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            buffers = self.shards.buffers
            expected = {name: buffer.shape for name, buffer in buffers.items()}
            with as_user_error(path, "another model"):
                check_shapes(shapes, {**expected, **self.shards.shapes})
            self.shards.swap(self.ema)  # `set` writes the masters, which are the EMA for a moment
            for name in self.shards.shapes:
                self.set_weight(name, file.get_tensor(name))
            self.shards.swap(self.ema)
            for name, buffer in buffers.items():
                buffer.copy_(file.get_tensor(name))
        self.shards.publish()

    def load_optimizer(self, state: Path, which: str) -> None:
        """Loads DeepSpeed's own files; learning rate and weight decay stay as the flags say."""
        check_files(state / which, self.dist.rank, self.dist.world_size)
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.engine.optimizer.param_groups
        ]
        zero.load_universal_next(self.engine, which == UNIVERSAL)
        with weights_only(), state_errors(state):
            self.engine.load_checkpoint(state, tag=which)
        for group, as_flags_say in zip(self.engine.optimizer.param_groups, groups, strict=True):
            group.update(as_flags_say)
        zero.separate_steps(self.engine.optimizer)


def find_state(folder: Path, wanted: Layout) -> str:
    """Names the sub-folder of DeepSpeed's state that fits a layout; UserError if none does."""
    state, stored = folder / STATE_FOLDER, stored_layout(folder)
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
            f"once: python train_deepspeed.py --convert {folder}"
        )
    return UNIVERSAL


def stored_layout(folder: Path) -> Layout:
    path = folder / STATE_FOLDER / LAYOUT_FILE
    try:
        return Layout(**read_json(path))
    except OSError:
        raise UserError(
            f"{folder}: no {STATE_FOLDER}/{LAYOUT_FILE} in it, expected a checkpoint of "
            "train_deepspeed.py"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def convert(folder: Path) -> None:
    """Writes a step folder's state beside it in DeepSpeed's universal format.

    Any number of processes can go on from that. Nothing in the files is executed. UserError for a
    folder that has no such state, or whose files are damaged.
    """
    stored_layout(folder)
    state = folder / STATE_FOLDER
    check_files(state / AS_SAVED, 0, 1)
    target, temporary = state / UNIVERSAL, state / f"{UNIVERSAL}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    options = SimpleNamespace(
        input_folder=str(state / AS_SAVED), output_folder=str(temporary),
        num_extract_workers=1, num_merge_workers=1,  # in this process, which is the guarded one
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    with weights_only(), state_errors(state):
        ds_to_universal.main(options)
    (state / "latest_universal").unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    print(f"converted {folder}: any number of processes can go on from it")


def check_files(folder: Path, rank: int, world_size: int) -> None:
    """Checks a process's share of the files before any is used; UserError for a damaged one."""
    for path in sorted(folder.rglob("*.pt"))[rank::world_size]:
        with torch.serialization.safe_globals(STORED_CLASSES):
            read_pickle(path)


@contextmanager
def weights_only() -> Iterator[None]:
    """Overrules DeepSpeed, which asks torch.load to unpickle whatever is there."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(STORED_CLASSES):
            yield
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY)
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before


@contextmanager
def state_errors(state: Path) -> Iterator[None]:
    """Turns what DeepSpeed raises about files of another shape or content into a UserError."""
    try:
        with as_user_error(state, "damaged, or not of this model"):
            yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{state}: damaged, or not of this model: {reason}") from None


def check_precision(precision: str) -> None:
    """Raises UserError for a precision that DeepSpeed refuses on this device."""
    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        others = [name for name in DTYPES if name != precision]
        raise UserError(
            f"--precision: got {precision}, which DeepSpeed cannot compute in on this "
            f"{accelerator.device_name()}, expected {' or '.join(others)}"
        )


def stand_alone() -> None:
    """Describes this process as the only one where no launcher did: DeepSpeed asks."""
    if "RANK" in os.environ or read_environment().world_size > 1:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update(values, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
