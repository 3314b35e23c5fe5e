"""Which sequences step s trains, and which worker takes which: pure functions of seed, step, batch and rows' costs.

Positions count the sequences that a run has consumed: step s of a global batch B takes positions [s·B, (s+1)·B). The
sequence at position p is entry p mod n of the permutation of epoch p ÷ n. The number of workers only decides who takes
which of them.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ ÷ golden ratio, the increment of splitmix64
_MASK = 2**64 - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of 64-bit integers that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4)  # a step lies in one epoch or in two; evaluation may follow another order beside it
def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of `count` sequences in an epoch: (count,) int64, read-only, the same for every library version.

    Sequence i gets the i-th number of a splitmix64 stream that starts at (seed, epoch); a stable sort orders them.
    """
    start = _mix(np.array([seed & _MASK], np.uint64)) + np.uint64(epoch)
    state = _mix(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    order = np.argsort(_mix(state), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def positions_of_step(step: int, global_batch: int) -> range:
    """Positions that step `step` (from 0) consumes."""
    return range(step * global_batch, (step + 1) * global_batch)


def sequences_at(positions: range, seed: int, count: int) -> list[int]:
    """The sequences at these positions, across the end of an epoch too."""
    return [int(permutation(seed, position // count, count)[position % count]) for position in positions]


def share(global_batch: int, world_size: int, rank: int) -> range:
    """A contiguous part of the offsets 0 … global_batch - 1 for each rank; their numbers differ by one at most."""
    return range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)


def even_shares(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Offsets inside the step that each rank takes, as many as in its `share`, so that all have about the same work.

    Longest processing time first (Graham 1969): the most expensive row that is left goes to the rank with the least
    work among those that have room. Each rank's begin with the most expensive, so that ranks that wait for each other
    in every micro-step (ZeRO-3) have about the same in each. costs: of each row of the step; ranks take turns with
    rows that cost the same.
    """
    room = [len(share(len(costs), world_size, rank)) for rank in range(world_size)]
    work = [0.0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for offset in sorted(range(len(costs)), key=lambda offset: -costs[offset]):
        rank = min((rank for rank in range(world_size) if len(shares[rank]) < room[rank]), key=lambda rank: work[rank])
        shares[rank].append(offset)
        work[rank] += costs[offset]
    return shares


def micro_steps(offsets: Sequence[int], micro_batch: int) -> list[Sequence[int]]:
    """`offsets` in chunks of `micro_batch`, the last one possibly shorter."""
    return [offsets[start : start + micro_batch] for start in range(0, len(offsets), micro_batch)]
