"""Inputs of recomputed layers in pinned host memory while they are not needed.

A layer's input is copied out behind the computation of the layers after it, and copied back one layer ahead of the
backward pass, on a stream of its own: 8 kB a token and layer at 50 GB/s takes a third of the time of the computation
that it hides behind. Without a GPU nothing is copied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Copy:
    """One layer input: on the GPU until its copy is complete, then on the host, then back."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self.stream, self.device = stream, tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.fetched: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before the copy is complete

    def fetch(self) -> None:
        """Starts the copy back."""
        if self.fetched is None:
            with torch.cuda.stream(self.stream):
                self.fetched = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        self.fetch()
        torch.cuda.current_stream().wait_stream(self.stream)
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        tensor.record_stream(torch.cuda.current_stream())
        return tensor


class HostCopies:
    """The inputs of one model's recomputed layers, in the order in which the layers ran."""

    def __init__(self) -> None:
        self._waiting: list[_Copy] = []
        self._stream: torch.cuda.Stream | None = None

    def around(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """`recompute` with what it saves of its arguments on the host; what the layer itself saves is not touched."""

        def offloaded(function: Callable[..., Any], *arguments: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return recompute(function, *arguments)

        return offloaded

    def _pack(self, tensor: Tensor) -> Tensor | _Copy:
        if not tensor.is_cuda or tensor.ndim < 3:
            return tensor
        self._stream = self._stream or torch.cuda.Stream()
        self._waiting.append(_Copy(tensor, self._stream))
        return self._waiting[-1]

    def _unpack(self, packed: Tensor | _Copy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        while self._waiting and self._waiting.pop() is not packed:
            pass  # copies of a row whose backward pass never came
        if self._waiting:
            self._waiting[-1].fetch()
        return tensor
