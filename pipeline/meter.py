"""What a training step did with its time: operations, peak memory, seconds by part."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from longlora.flops import attention_pairs, document_pairs, linear_operations, pair_operations
from longlora.model import LongContextModel
from longlora.segments import plan_segments
from pipeline.feed import MicroBatch
from pipeline.gpus import gpu_of_torch


class Meter:
    """Measures one worker's steps, one after the other."""

    def __init__(self, model: LongContextModel, device: torch.device) -> None:
        self._config, self._layers = model.causal_lm.config, model.layers
        self._linear = linear_operations(model, self._config)
        self._device = device
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside under `name`; what the GPU does behind it counts where it is waited for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def parts(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        parts, self._parts = self._parts, {}
        return {name: round(seconds, 6) for name, seconds in parts.items()}

    def peak_bytes(self) -> int:
        """Of GPU memory since the last call; 0 without a GPU."""
        if self._device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def operations(self, batches: Sequence[MicroBatch], group_size: int | None) -> float:
        """That these batches need, S²-Attn as S²-Attn; what is computed again for lack of memory does not count."""
        plans = [plan_segments(batch.document_lengths, group_size) for batch in batches]
        return self._operations(sum(plan.tokens for plan in plans), sum(attention_pairs(plan) for plan in plans))

    def row_operations(self, document_lengths: Sequence[int], group_size: int | None) -> float:
        """That a row needs, each document as if it were alone: a sum over lengths, most of which have been met."""
        pairs = sum(document_pairs(length, group_size) for length in document_lengths)
        return self._operations(sum(document_lengths), pairs)

    def _operations(self, tokens: int, pairs: float) -> float:
        return self._linear * tokens + pair_operations(self._config) * pairs * 7 / 2 * self._layers


def peak_rate(device: torch.device) -> float | None:
    """Dense bf16 operations a second of the GPU by its datasheet, to which MFU refers; None if it is not known."""
    gpu = gpu_of_torch(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak if gpu else None
