"""The one autograd.Function: both halves of the heads, forward and backward, over any backend.

Each backend attends over views of some of the heads and writes into views of tensors that are allocated here. Slicing
under autograd would instead fill a whole gradient with zeros for each slice and add them up.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from longlora.attention._runs import copy_rows
from longlora.segments import SegmentPlan, Segments


class HeadBlock(NamedTuple):
    """Heads that one attention call serves: ``query`` heads evenly grouped over ``kv`` heads, in the same segments."""

    query: slice
    kv: slice
    segments: Segments


class SplitGradient:
    """Gradient of the kv head that serves straight and shifted query heads alike.

    Each half contributes a partial gradient in pieces, and the halves are cut at different tokens. Pieces are assigned
    by token range, as to a tensor, and kept: ``add_up`` then writes their sums, every token once.
    """

    def __init__(self, total: torch.Tensor) -> None:
        self._total = total
        self._halves: list[list[tuple[int, torch.Tensor]]] = []

    def __setitem__(self, tokens: slice, piece: torch.Tensor) -> None:
        if tokens.start == 0:
            self._halves.append([])
        self._halves[-1].append((tokens.start, piece))

    def add_up(self) -> None:
        starts = [[start for start, _ in half] for half in self._halves]
        cuts = sorted({*chain.from_iterable(starts), len(self._total)})
        for first, last in pairwise(cuts):
            pieces = [half[bisect_right(s, first) - 1] for half, s in zip(self._halves, starts, strict=True)]
            straight, shifted = (piece[first - start : last - start] for start, piece in pieces)
            torch.add(straight, shifted, out=self._total[first:last])


Destination = torch.Tensor | SplitGradient


def write(gradient: torch.Tensor, destination: Destination, tokens: slice) -> None:
    """Writes the gradient of a range of tokens, (n, heads, d), to where it belongs."""
    if isinstance(destination, torch.Tensor):
        copy_rows(gradient, destination[tokens])
    else:
        destination[tokens] = gradient


class Backend(Protocol):
    """What a backend module provides. q, k, v, out and their gradients are (T, heads, d), strided over the heads."""

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run there; None if it can."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, out: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Attend causally inside each segment, write ``out``, return what ``backward`` needs besides."""

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        segments: Segments,
        scale: float,
        dq: torch.Tensor,
        dk: Destination,
        dv: Destination,
    ) -> None:
        """Write the gradients; ``dk`` and ``dv`` are assigned to by ranges of tokens that ascend from 0."""


def head_blocks(plan: SegmentPlan, heads: int, kv_heads: int) -> list[HeadBlock]:
    """The fewest attention calls in which query heads are evenly grouped over kv heads.

    The first ⌊heads/2⌋ query heads are straight. Where that boundary cuts through the query heads of one kv head, the
    cut group becomes a block of its own in each half: no key or value is repeated.
    """
    if plan.full:
        return [HeadBlock(slice(0, heads), slice(0, kv_heads), plan.straight_segments)]
    per_kv_head = heads // kv_heads
    straight = _blocks(0, heads // 2, per_kv_head, plan.straight_segments)
    return [*straight, *_blocks(heads // 2, heads, per_kv_head, plan.shifted_segments)]


def _blocks(first: int, last: int, per_kv_head: int, segments: Segments) -> Iterator[HeadBlock]:
    while first < last:
        kv = first // per_kv_head
        is_whole = first % per_kv_head == 0 and last - first >= per_kv_head
        end = last - last % per_kv_head if is_whole else min(last, (kv + 1) * per_kv_head)
        yield HeadBlock(slice(first, end), slice(kv, -(-end // per_kv_head)), segments)
        first = end


class KeptOutput:
    """One layer's attention output, kept for the recomputation of that layer, which then does not attend again.

    A layer under activation checkpointing runs twice: the first run leaves output and log-sum-exp here, the second
    takes them. It costs H·d + 2·H numbers a token and saves the attention, whose cost grows with the segment length.
    """

    def __init__(self) -> None:
        self._results: tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]] | None = None

    def take(self) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]] | None:
        results, self._results = self._results, None
        return results

    def put(self, out: torch.Tensor, states: list[tuple[torch.Tensor, ...]]) -> None:
        # Detached: the output itself would hold the first run's graph.
        self._results = out.detach(), states


class SegmentedAttention(torch.autograd.Function):
    """``apply(q, k, v, plan, scale, backend, kept)`` → (T, H, d): causal attention inside the plan's segments."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: SegmentPlan,
        scale: float,
        backend: Backend,
        kept: KeptOutput | None,
    ) -> torch.Tensor:
        ctx.scale, ctx.backend = scale, backend
        ctx.blocks = head_blocks(plan, q.shape[1], k.shape[1])
        results = kept.take() if kept is not None else None
        if results is None:
            results = _attend(q, k, v, ctx.blocks, scale, backend)
            if kept is not None:
                kept.put(*results)
        out, states = results
        ctx.state_sizes = [len(state) for state in states]
        ctx.save_for_backward(q, k, v, out, *chain.from_iterable(states))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        kv_slices = [block.kv for block in ctx.blocks]
        cut = next((kv for kv in kv_slices if kv_slices.count(kv) == 2), None)
        split = [SplitGradient(gradient[:, cut]) for gradient in (dk, dv) if cut is not None]
        states = iter(saved)
        for (query, kv, segments), size in zip(ctx.blocks, ctx.state_sizes, strict=True):
            state = tuple(next(states) for _ in range(size))
            k_gradient, v_gradient = split if kv == cut else (dk[:, kv], dv[:, kv])
            ctx.backend.backward(
                grad_out[:, query], q[:, query], k[:, kv], v[:, kv], out[:, query], state, segments, ctx.scale,
                dq[:, query], k_gradient, v_gradient,
            )  # fmt: skip
        for gradient in split:
            gradient.add_up()
        return dq, dk, dv, None, None, None, None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[HeadBlock], scale: float, backend: Backend
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """The output (T, H, d), and for each block what the backward pass needs besides."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    states = [
        backend.forward(q[:, query], k[:, kv], v[:, kv], segments, scale, out[:, query])
        for query, kv, segments in blocks
    ]
    return out, states
