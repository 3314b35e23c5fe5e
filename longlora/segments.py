"""Documents and a group size → the segments inside which S²-Attn attends. Integers only.

Shifted sparse attention (arXiv 2309.12307, section 3.2) is two block-diagonal causal attentions. In a document of L
tokens with group size G < L, the first half of the query heads (*straight*) attends inside [0,G), [G,2G), …, and the
other half (*shifted*) inside [0,G/2), [G/2,3G/2), …, the last segment of each cut at L. A document with L ≤ G is one
segment for all heads. Segments start where their document starts and end with it, so nothing wraps around, nothing
crosses a document, and a document's result does not depend on what it is packed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

_ROUND = 128  # tokens


class Run(NamedTuple):
    """``repeats`` consecutive segments of ``length`` tokens each, the first of which starts at token ``start``.

    Equal neighbours can be seen as one batch by a view, so a backend without variable lengths needs one call a run.
    """

    start: int
    length: int
    repeats: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length * self.repeats)


class Segments(NamedTuple):
    """The segments of one half of the heads.

    ``bounds``: int32 (segments + 1,), cumulative, first 0, last T; ``longest``: tokens; ``runs``: the same segments,
    equal neighbours together, on the host.
    """

    bounds: torch.Tensor
    longest: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """Where each half of the heads attends in a row of documents. Made once a batch, shared by all layers.

    ``straight``, ``shifted``: int32 cumulative bounds, (segments + 1,), first 0, last T. Where all heads attend alike
    (full attention, or every document within one group) they are the same tensor, so that one call covers all heads.
    """

    document_lengths: tuple[int, ...]
    group_size: int | None
    straight: torch.Tensor
    shifted: torch.Tensor
    max_straight: int
    max_shifted: int
    straight_runs: tuple[Run, ...]
    shifted_runs: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        """T, the tokens of the row."""
        return sum(self.document_lengths)

    @property
    def full(self) -> bool:
        """Whether all heads attend inside the same segments."""
        return self.shifted is self.straight

    @cached_property
    def uniform(self) -> bool:
        """Whether the row is one document cut into segments of few, round lengths: a kernel's shapes then repeat."""
        runs = self.straight_runs + self.shifted_runs
        return len(self.document_lengths) == 1 and all(run.length % _ROUND == 0 for run in runs)

    @property
    def straight_segments(self) -> Segments:
        return Segments(self.straight, self.max_straight, self.straight_runs)

    @property
    def shifted_segments(self) -> Segments:
        return Segments(self.shifted, self.max_shifted, self.shifted_runs)

    def to(self, device: torch.device | str) -> "SegmentPlan":
        """The same plan with its bounds on ``device``; what the host needs stays on the host."""
        straight = self.straight.to(device)
        return replace(self, straight=straight, shifted=straight if self.full else self.shifted.to(device))


def plan_segments(document_lengths: Sequence[int], group_size: int | None) -> SegmentPlan:
    """Plan the segments of a row made of documents of ``document_lengths`` tokens, in this order.

    ``group_size``: G in tokens, positive and even, or None for full attention inside each document.
    Raises ValueError for any other group size, and for a row without documents or with a document without tokens.
    """
    if group_size is not None and (group_size <= 0 or group_size % 2):
        raise ValueError(f"group_size is {group_size}: it must be a positive even number of tokens, or null")
    if not document_lengths or min(document_lengths) <= 0:
        raise ValueError(
            f"document lengths are {list(document_lengths)}: at least one is needed, each of 1 token or more"
        )
    lengths = tuple(int(length) for length in document_lengths)
    if group_size is None or max(lengths) <= group_size:
        straight = shifted = _segments(list(lengths))
    else:
        straight = _segments([s for length in lengths for s in _cut(length, group_size, first=group_size)])
        shifted = _segments([s for length in lengths for s in _cut(length, group_size, first=group_size // 2)])
    return SegmentPlan(
        document_lengths=lengths,
        group_size=group_size,
        straight=straight.bounds,
        shifted=shifted.bounds,
        max_straight=straight.longest,
        max_shifted=shifted.longest,
        straight_runs=straight.runs,
        shifted_runs=shifted.runs,
    )


def _cut(length: int, group_size: int, first: int) -> list[int]:
    """Segment lengths of one document: ``first`` tokens, then whole groups, then what is left."""
    if length <= group_size:
        return [length]
    groups, rest = divmod(length - first, group_size)
    return [first] + [group_size] * groups + [rest] * (rest > 0)


def _segments(lengths: list[int]) -> Segments:
    bounds = [0, *accumulate(lengths)]
    runs, start = [], 0
    for length, equal in groupby(lengths):
        runs.append(Run(start, length, len(list(equal))))
        start = runs[-1].tokens.stop
    return Segments(torch.tensor(bounds, dtype=torch.int32), max(lengths), tuple(runs))
