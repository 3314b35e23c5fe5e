"""Saving without stopping training: a snapshot in host memory, then files, written in the background by every rank.

    each rank   copies what it holds of the state                      (the step waits for this alone)
                writes its moments, offers its masters to rank 0       (in the background)
    rank 0      puts the masters together, writes the weights, and commits when all ranks' files are there

Ranks meet through the run's log, which outlives them; the masters travel through Ray's object store.
"""

import threading
import time
from collections.abc import Iterable
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
from pipeline.checkpoints import Files, RunState
from pipeline.config import Checkpoint
from pipeline.optimizer import Fragment, ParameterState

OFFER_TIMEOUT_S = 1800.0
POLL_S = 0.1


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
        self._shapes = {name: tensor_shape(parameter) for name, parameter in trainable}
        self._host: dict[str, Fragment] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: RunState, fragments: Iterable[tuple[str, Fragment]], request: int) -> None:
        """Takes a snapshot and returns; waits before it for the save under way, so that no two pile up.

        Raises what that save raised. request: number of the CheckpointRequest that this answers, 0 if none.
        """
        start = time.perf_counter()
        self.wait()
        self._snapshot(fragments)
        blocked = time.perf_counter() - start
        self._thread = threading.Thread(target=self._run, args=(state, request, blocked), name="checkpoint")
        self._thread.start()

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
            source = fragment.state
            if name not in self._host:
                pinned = source.master.is_cuda
                buffers = (torch.empty_like(part, device="cpu", pin_memory=pinned) for part in parts(source))
                self._host[name] = Fragment(fragment.start, ParameterState(*buffers))
            for buffer, part in zip(parts(self._host[name].state), parts(source), strict=True):
                buffer.copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _run(self, state: RunState, request: int, blocked: float) -> None:
        try:
            self._write(state, request, blocked)
        except Exception as error:  # told to the training thread, which ends the worker
            self._error = error

    def _write(self, state: RunState, request: int, blocked: float) -> None:
        start, save = time.perf_counter(), (state.attempt, state.step)
        folder = checkpoints.step_folder(self.run_folder, state.step)
        files = checkpoints.write_fragments(folder, self.network, self._host, self.rank, self.world_size)
        masters = {name: (held.start, held.state.master.numpy()) for name, held in self._host.items()}
        ray.get(self.run_log.offer.remote(save, self.rank, files, [ray.put(masters)]))
        if self.rank:
            return
        offers = self._offers(save)
        for rank_files, _ in offers:
            files |= rank_files
        whole = joined((ray.get(offered) for _, [offered] in offers), self._shapes)
        files |= checkpoints.write_network(folder, self.network, whole, state)
        ray.get(self.run_log.sync.remote(state.attempt))
        checkpoints.commit(folder, files)
        written, seconds = sum(int(entry["size"]) for entry in files.values()), time.perf_counter() - start
        # The workers wait for a checkpoint that was asked for.
        details = {"seconds": blocked + (seconds if request else 0.0), "write_seconds": seconds, "bytes": written}
        ray.get(self.run_log.checkpointed.remote(save, request, details))
        checkpoints.retain(self.run_folder, self.settings.keep_last, self.settings.keep_best)

    def _offers(self, save: tuple[int, int]) -> list[tuple[Files, list[Any]]]:
        """What all ranks have written and hold; TimeoutError if one of them does not come."""
        until = time.monotonic() + OFFER_TIMEOUT_S
        while len(offers := ray.get(self.run_log.offers.remote(save))) < self.world_size:
            if time.monotonic() > until:
                missing = sorted(set(range(self.world_size)) - offers.keys())
                raise TimeoutError(f"checkpoint of step {save[1]}: ranks {missing} have not written their part")
            time.sleep(POLL_S)
        return [offers[rank] for rank in sorted(offers)]


def joined(
    shares: Iterable[dict[str, tuple[int, npt.NDArray[np.float32]]]], shapes: dict[str, torch.Size]
) -> dict[str, Tensor]:
    """The masters in full, of all ranks' pieces: (first element, piece) by name. RuntimeError if they leave a gap."""
    whole = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    missing = {name: tensor.numel() for name, tensor in whole.items()}
    for share in shares:
        for name, (start, piece) in share.items():
            whole[name].view(-1).numpy()[start : start + len(piece)] = piece
            missing[name] -= len(piece)
    if any(missing.values()):
        name = next(name for name, count in missing.items() if count)
        raise RuntimeError(f"the ranks' pieces of {name} do not add up: {missing[name]} elements are missing")
    return whole


def parts(state: ParameterState) -> tuple[Tensor, Tensor, Tensor]:
    return state.master, state.exp_avg, state.exp_avg_sq


def tensor_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)
