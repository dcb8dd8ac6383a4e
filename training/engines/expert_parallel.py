"""Expert parallelism: each process holds some experts of a layer and receives their rows.

    counts = [2, 2, 2, 2]                              # routed experts of each process
    keep_experts(experts, counts, rank)                # experts: a `moe.Experts`
    spread(experts, group, counts)                     # experts exchange rows
    y = experts(x, routing)

A process sorts its rows by expert and sends each row, with its weight, to the process that holds
the expert, which computes it and sends the result back. No row is dropped. The host waits for the
numbers of rows, unless `Routing.is_even`.

The last process stores the extra expert of a router (`Router.extra_experts`) and sends the weights
to all processes, each of which computes the rows of its own tokens.

Shape legend:
    S tokens, D width, E routed experts, P processes, L routed experts of this process, R rows sent,
    R' rows received
"""

from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe import ExpertWeights
from moe_kernels.experts import sort_rows
from moe_kernels.operators import kernels_for
from routers import Routing


def keep_experts(experts: nn.Module, counts: Sequence[int], rank: int) -> None:
    """Removes the experts of other processes from stacked parameters (E, ...)."""
    first = sum(counts[:rank])
    for name, stack in list(experts.named_parameters()):
        if name in experts.per_expert:
            kept = nn.Parameter(stack.detach()[first : first + counts[rank]], stack.requires_grad)
            owner, _, name = name.rpartition(".")
            setattr(experts.get_submodule(owner), name, kept)


def spread(
    experts: nn.Module, group: ProcessGroup, counts: Sequence[int], extra: int = 0,
    *, has_equal_batches: bool = True,
) -> None:  # fmt: skip
    """Replaces the forward pass of a layer's experts by one that exchanges rows.

    `experts.load` becomes the largest number of received rows per sent row; the mean is 1.

    counts: numbers of routed experts by process; the last process also stores `extra` experts
    has_equal_batches: whether all processes pass the same number of tokens to each call in training
    """
    compute, num_local = experts.forward, counts[torch.distributed.get_rank(group)]
    experts.is_spread, experts.load, groups[group.group_name] = True, 0.0, group

    @torch.compiler.disable  # the host waits for numbers of rows
    def forward(x: Tensor, routing: Routing) -> Tensor:
        """Returns the weighted sums of the rows of each token of x (S, D); (S, D)."""
        if not extra:
            return compute_elsewhere(x, routing)
        is_extra = routing.expert >= sum(counts)
        there, here = (mask.nonzero().squeeze(1) for mask in (~is_extra, is_extra))
        token, expert, weight = routing.token, routing.expert - sum(counts), routing.weight
        routed = token[there], routing.expert[there], weight[there], 0
        # A row of weight 0: ranks without extra rows must join the backward collective too.
        local = (F.pad(t[here], (0, 1)) for t in (token, expert, weight))
        rest = routing.loss, routing.load
        y = compute_elsewhere(x, Routing(*routed, *rest))
        weights = (p if p is None else FromLast.apply(p[-extra:], group) for p in experts.weights())
        return compute(x, Routing(*local, 0, *rest), ExpertWeights(*weights)) + y

    def compute_elsewhere(x: Tensor, routing: Routing) -> Tensor:
        """Sends the routed rows of x (S, D) to the processes of their experts and computes the
        received ones; returns the sums (S, D) of this process's rows by token."""
        token, expert, weight = routing.token, routing.expert, routing.weight.to(x.dtype)
        if not routing.per_token:
            token, order = token.sort(stable=True)
            expert, weight = expert[order], weight.gather(0, order)
        rows = sort_rows(token, expert, len(x), sum(counts))
        _, place, _, end = rows
        if routing.is_even and experts.training and has_equal_batches:
            each = len(token) // sum(counts)
            sent, got = [each * count for count in counts], [each * num_local] * len(counts)
            of_source = end.new_full((len(counts), num_local), each)  # (P, L)
        else:
            of_source, sent, got = exchange_counts(end, counts, num_local, group)
        experts.load = max(experts.load, sum(got) / max(1, len(token)))
        # The local expert of each received row. Rows are ordered by source process, then by expert.
        local = torch.arange(num_local, device=x.device).repeat(len(counts))  # (P * L,)
        local = local.repeat_interleave(of_source.flatten(), output_size=sum(got))  # (R',)
        weight = torch.empty_like(weight).scatter(0, place, weight)  # (R,) by expert
        packed = torch.cat([gather_rows(x, rows), weight[:, None]], dim=1)  # (R, D + 1)
        packed = AllToAll.apply(packed, sent, got, group)  # (R', D + 1)
        received, weight = packed[:, :-1].contiguous(), packed[:, -1]  # (R', D), (R',)
        if empty := not len(received):  # add a row: kernels need at least one
            received = torch.cat([received, received.new_zeros(1, received.shape[1])])
            weight, local = torch.cat([weight, weight.new_zeros(1)]), local.new_zeros(1)
        token = torch.arange(len(received), device=received.device)
        y = compute(received, Routing(token, local, weight, 1, routing.loss, routing.load))
        y = AllToAll.apply(y[:0] if empty else y, got, sent, group)  # (R, D)
        return combine_rows(y, rows)  # (S, D)

    experts.forward = forward


def exchange_counts(
    end: Tensor, counts: Sequence[int], num_local: int, group: ProcessGroup
) -> tuple[Tensor, list[int], list[int]]:
    """Exchanges the numbers of rows.

    end: (E,) from `sort_rows`
    Returns the numbers of received rows by process and local expert (P, L), and, on the host, the
    numbers of rows that are sent to each process and received from each process.
    """
    of_expert = end.diff(prepend=end.new_zeros(1))  # (E,)
    received = [num_local] * len(counts)
    of_source = exchange_rows(of_expert, list(counts), received, group.group_name)
    of_source = of_source.view(len(counts), num_local)  # (P, L)
    totals = torch.stack([part.sum() for part in of_expert.split(list(counts))])  # (P,)
    sent, got = torch.stack([totals, of_source.sum(1)]).tolist()
    return of_source, sent, got


groups: dict[str, ProcessGroup] = {}  # by name, for `exchange_rows`


@torch.library.custom_op("dit_moe::exchange", mutates_args=())
def exchange_rows(rows: Tensor, sent: list[int], got: list[int], group: str) -> Tensor:
    """Sends sent[p] rows to process p and receives got[p] rows from it, in the order of processes.

    An operator, so that selective checkpointing can keep its output, see wrappers.py.

    group: a name in `groups`
    """
    out = rows.new_empty(sum(got), *rows.shape[1:])
    torch.distributed.all_to_all_single(out, rows.contiguous(), got, sent, group=groups[group])
    return out


@exchange_rows.register_fake
def _(rows, sent, got, group):
    return rows.new_empty(sum(got), *rows.shape[1:])


class FromLast(torch.autograd.Function):
    """Returns the tensor of the last process of a group on all its processes."""

    @staticmethod
    def forward(tensor: Tensor, group: ProcessGroup) -> Tensor:
        out = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(out, group=group, group_src=group.size() - 1)
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        last, grad = ctx.group.size() - 1, grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.reduce(grad, group=ctx.group, group_dst=last)
        return grad if ctx.group.rank() == last else torch.zeros_like(grad), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        return FromLast.apply(tangent, ctx.group)


class AllToAll(torch.autograd.Function):
    """`exchange_rows` with gradients, which return to where the rows came from."""

    @staticmethod
    def forward(rows: Tensor, sent: list[int], got: list[int], group: ProcessGroup) -> Tensor:
        return exchange_rows(rows, sent, got, group.group_name)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, *ctx.exchange = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        sent, got, group = ctx.exchange
        return AllToAll.apply(grad, got, sent, group), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        return AllToAll.apply(tangent, *ctx.exchange)


class GatherRows(torch.autograd.Function):
    """Gathers tokens (S, D) to rows (R, D) or, with `combine`, sums the rows of each token.

    Each direction is the derivative of the other. Only uncompiled code uses this Function.
    """

    @staticmethod
    def forward(x: Tensor, combine: bool, *rows: Tensor) -> Tensor:
        source, place, start, _ = rows
        x, k = x.contiguous(), kernels_for(x)
        return k.combine(x, place, start, None) if combine else k.gather(x, source)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.combine, *rows = inputs
        ctx.save_for_backward(*rows)
        ctx.save_for_forward(*rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        rows = ctx.saved_tensors
        return GatherRows.apply(grad, not ctx.combine, *rows), None, *(None for _ in rows)

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        return GatherRows.apply(tangent, ctx.combine, *ctx.saved_tensors)


def gather_rows(x: Tensor, rows: list[Tensor]) -> Tensor:
    """Gathers tokens x (S, D) to rows (R, D) in the order of the experts.

    rows: the result of `sort_rows`
    """
    return GatherRows.apply(x, False, *rows)


def combine_rows(y: Tensor, rows: list[Tensor]) -> Tensor:
    """Sums the rows y (R, D), in the order of the experts, for each token; returns (S, D)."""
    return GatherRows.apply(y, True, *rows)
