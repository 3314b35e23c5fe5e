"""Saving without stopping training: a snapshot in host memory, then files, written in the background by every rank.

    each rank   copies what it holds of the state                      (the step waits for this alone)
                offers its masters to rank 0, writes its moments       (in the background)
    rank 0      writes everybody's masters as the weights, and commits when all ranks' files are there

Ranks meet through the run's log, which outlives them; the masters travel through Ray's object store. What is written
is written from where it lies: no rank puts a file together in memory.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from pipeline import checkpoints
from pipeline.checkpoints import Files, RunState, tensor_shape
from pipeline.optimizer import Fragment, ParameterState
from pipeline.sections import Checkpoint
from pipeline.tensor_file import in_order

OFFER_TIMEOUT_S = 1800.0
POLL_S = 0.02
Share = dict[str, tuple[int, npt.NDArray[np.float32]]]
"""A rank's masters by parameter: the first element that it holds, and those from there on, flat."""


class CheckpointWriter:
    """Writes this rank's part of one checkpoint at a time."""

    def __init__(
        self,
        run_folder: UPath,
        network: PeftModel | PreTrainedModel,
        run_log: Any,
        settings: Checkpoint,
        rank: int,
        world_size: int,
    ) -> None:
        self.run_folder, self.network, self.run_log, self.settings = run_folder, network, run_log, settings
        self.rank, self.world_size = rank, world_size
        trainable = ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
        self._sizes = {name: tensor_shape(parameter).numel() for name, parameter in trainable}
        self._host: dict[str, Fragment] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def reserve(self, fragments: Iterable[tuple[str, Fragment]]) -> None:
        """Takes the memory of snapshots before the first one, in the background: fresh pages are slow to come."""
        self._begin(self._allocate, list(fragments))

    def save(self, state: RunState, fragments: Iterable[tuple[str, Fragment]], request: int) -> None:
        """Takes a snapshot and returns; waits before it for the save under way, so that no two pile up.

        Raises what that save raised. request: number of the CheckpointRequest that this answers, 0 if none.
        """
        start = time.perf_counter()
        self.wait()
        self._snapshot(fragments)
        blocked = time.perf_counter() - start
        self._begin(self._write, state, request, blocked)

    def check(self) -> None:
        """Raises what a save in the background has raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when the save under way is done; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _snapshot(self, fragments: Iterable[tuple[str, Fragment]]) -> None:
        """Copies the fragments into host memory that is kept from save to save."""
        for name, fragment in fragments:
            if name not in self._host:
                self._allocate([(name, fragment)])
            for buffer, part in zip(parts(self._host[name].state), parts(fragment.state), strict=True):
                buffer.copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _allocate(self, fragments: list[tuple[str, Fragment]]) -> None:
        for name, fragment in fragments:
            like, pinned = parts(fragment.state), fragment.state.master.is_cuda
            buffers = [torch.empty_like(part, device="cpu", pin_memory=pinned).zero_() for part in like]
            self._host[name] = Fragment(fragment.start, ParameterState(*buffers))

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        """Does `work` in the background; `wait` returns after it."""
        self._thread = threading.Thread(target=self._run, args=(work, *arguments), name="checkpoint")
        self._thread.start()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except Exception as error:  # told to the training thread, which ends the worker
            self._error = error

    def _write(self, state: RunState, request: int, blocked: float) -> None:
        start, save = time.perf_counter(), (state.attempt, state.step)
        folder = checkpoints.step_folder(self.run_folder, state.step)
        own: Share = {name: (held.start, held.state.master.numpy()) for name, held in self._host.items()}
        if self.rank:
            offered = [ray.put(own)]
            ray.get(self.run_log.offer.remote(save, self.rank, {}, offered))
            files = checkpoints.write_fragments(folder, self.network, self._host, self.rank, self.world_size)
            ray.get(self.run_log.offer.remote(save, self.rank, files, offered))
            return
        with ThreadPoolExecutor() as pool:
            fragments = pool.submit(
                checkpoints.write_fragments, folder, self.network, self._host, self.rank, self.world_size
            )
            others = [ray.get(offered) for _, [offered] in self._offers(save)]
            masters = joined([own, *others], self._sizes)
            files = checkpoints.write_network(folder, self.network, masters, state) | fragments.result()
        for rank_files, _ in self._offers(save, written=True):
            files |= rank_files
        ray.get(self.run_log.sync.remote(state.attempt))
        checkpoints.commit(folder, files)
        written, seconds = sum(int(entry["size"]) for entry in files.values()), time.perf_counter() - start
        # The workers wait for a checkpoint that was asked for.
        details = {"seconds": blocked + (seconds if request else 0.0), "write_seconds": seconds, "bytes": written}
        ray.get(self.run_log.checkpointed.remote(save, request, details))
        checkpoints.retain(self.run_folder, self.settings.keep_last, self.settings.keep_best)

    def _offers(self, save: tuple[int, int], written: bool = False) -> list[tuple[Files, list[Any]]]:
        """What the other ranks offer, once all do, or once all have `written`; TimeoutError if one does not come."""
        others, until = range(1, self.world_size), time.monotonic() + OFFER_TIMEOUT_S
        while True:
            offers = ray.get(self.run_log.offers.remote(save)) if others else {}
            missing = [rank for rank in others if rank not in offers or (written and not offers[rank][0])]
            if not missing:
                return [offers[rank] for rank in others]
            if time.monotonic() > until:
                raise TimeoutError(f"checkpoint of step {save[1]}: ranks {missing} have not written their part")
            time.sleep(POLL_S)


def joined(shares: Iterable[Share], sizes: dict[str, int]) -> dict[str, list[npt.NDArray[np.float32]]]:
    """The masters' pieces in order, of all ranks' shares; RuntimeError if they leave a gap. No element is copied."""
    pieces: dict[str, dict[int, npt.NDArray[np.float32]]] = defaultdict(dict)
    for share in shares:
        for name, (start, piece) in share.items():
            pieces[name][start] = piece
    try:
        return {name: in_order(name, pieces[name], size) for name, size in sizes.items()}
    except ValueError as error:
        raise RuntimeError(f"the ranks' masters do not add up: {error}") from None


def parts(state: ParameterState) -> tuple[Tensor, Tensor, Tensor]:
    return state.master, state.exp_avg, state.exp_avg_sq
