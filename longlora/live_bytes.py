"""Bytes of living tensors, counted operator by operator: on the CPU, and on the meta device, which allocates nothing.

On a GPU torch's allocator counts itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """As a context: `now` and `peak`, in bytes, of the tensors that were made in it and have not gone since.

    What existed before does not count. An operator's results count together with what it read; what it allocates
    inside and frees again does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[StorageWeakRef, int] = {}
        self._before: set[StorageWeakRef] = set()
        self._at_most = 0  # what would be there if nothing had gone since the last count
        self.peak = 0

    @property
    def now(self) -> int:
        self._storages = {ref: size for ref, size in self._storages.items() if not ref.expired()}
        self._at_most = sum(self._storages.values())
        return self._at_most

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref not in self._storages:
                self._before.add(ref)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref not in self._before and ref not in self._storages:
                self._storages[ref] = storage.nbytes()
                self._at_most += storage.nbytes()
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.now)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
