"""How trials learn that they are to end before their last step: they ask, save, and tell Tune that they are done.

Tune's own way, `Trainable.stop`, waits behind the trial's `step`, and at the end of a search kills after ten seconds
what has not ended, whatever it is saving.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Ends:
    """Who is to end. Made a Ray actor by the search; trials ask it a few times a second."""

    def __init__(self) -> None:
        self._all = False
        self._runs: set[str] = set()

    def end(self, run: str) -> None:
        """One trial, by the name of its run."""
        self._runs.add(run)

    def end_all(self) -> None:
        """Every trial, also one that starts later."""
        self._all = True

    def asked(self, run: str) -> bool:
        """Whether the trial with this run is to end."""
        return self._all or run in self._runs


def start_ends() -> Any:
    """The actor, without CPUs, on this node; it lives as long as the search's driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Ends).options(num_cpus=0, scheduling_strategy=here).remote()
