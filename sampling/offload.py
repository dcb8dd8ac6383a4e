"""--offload: sampling with the weights of the blocks in host memory.

    offload_blocks(model, device, dtype)       # in place of model.to(device, dtype)

The device holds two blocks: while one computes, the next one is copied. On CUDA, the blocks are
stored in pinned host memory, cast to dtype, and a second stream copies them. On a CPU, they stay in
the memory-mapped .safetensors or .pt file, and a thread copies and casts them; the system takes
their pages back when it needs memory. Each block computes the same numbers as without offload.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from models import DiT

ALIGNMENT = 256  # bytes; a tensor in a slot starts at a multiple of it


def offload_blocks(model: DiT, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a model in eval mode to a device, except its blocks, which stay in host memory.

    Between forward passes the parameters are the host tensors, so state_dict() works at any time.
    """
    for name, module in model.named_children():
        if name != "blocks":
            module.to(device, dtype)
    for tensor in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
        tensor.data = tensor.data.to(device, type_of(tensor, dtype))
    BlockCopier(model.blocks, device, dtype)


class BlockCopier:
    """Hooks that copy the weights of each block to the device just before the block runs."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype):
        self.device, self.on_cuda = device, device.type == "cuda"
        self.tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self.types = [[type_of(t, dtype) for t in tensors] for tensors in self.tensors]
        if self.on_cuda:
            for tensor, kind in zip(sum(self.tensors, []), sum(self.types, []), strict=True):
                tensor.data = tensor.data.to(kind).pin_memory()
            self.stream = torch.cuda.Stream(device)
        else:
            self.thread = ThreadPoolExecutor(1)
        self.waiting = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        size = max(block_bytes(*pair) for pair in zip(self.waiting, self.types, strict=True))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        for slot in self.slots if self.on_cuda else ():
            slot.record_stream(self.stream)  # keeps the slot's memory until pending copies finish
        self.coming: tuple[int, list[Tensor], Callable[[], None]] | None = None
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self.before, index))
            block.register_forward_hook(partial(self.after, index))

    def before(self, index: int, *_) -> None:
        """Points a block's tensors to their copies, and starts to copy the next block."""
        if self.coming is None or self.coming[0] != index:  # the first pass, or an interrupted one
            self.coming = self.start_copy(index)
        _, copies, wait = self.coming
        wait()
        for tensor, copied in zip(self.tensors[index], copies, strict=True):
            tensor.data = copied
        self.coming = self.start_copy((index + 1) % len(self.tensors))

    def after(self, index: int, *_) -> None:
        for tensor, waiting in zip(self.tensors[index], self.waiting[index], strict=True):
            tensor.data = waiting

    def start_copy(self, index: int) -> tuple[int, list[Tensor], Callable[[], None]]:
        """Starts to copy a block to the free slot; returns its index, the copies, and a function
        that waits for them."""
        self.slots.reverse()
        copies, start = [], 0
        for tensor, kind in zip(self.waiting[index], self.types[index], strict=True):
            size = tensor.numel() * kind.itemsize
            copies.append(self.slots[0][start : start + size].view(kind).view(tensor.shape))
            start += padded(size)
        if not self.on_cuda:
            job = self.thread.submit(self.copy, index, copies)
            return index, copies, job.result
        # The block that used this slot has to finish first.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.copy(index, copies)
        copied = self.stream.record_event()
        return index, copies, lambda: torch.cuda.current_stream(self.device).wait_event(copied)

    def copy(self, index: int, copies: list[Tensor]) -> None:
        for copied, tensor in zip(copies, self.waiting[index], strict=True):
            copied.copy_(tensor, non_blocking=True)


def type_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a tensor is cast to: dtype, except for quantised values."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_bytes(tensors: list[Tensor], types: list[torch.dtype]) -> int:
    """Returns the size in bytes of a block's copy on the device."""
    pairs = zip(tensors, types, strict=True)
    return sum(padded(tensor.numel() * kind.itemsize) for tensor, kind in pairs)
