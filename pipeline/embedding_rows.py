"""Gradients of trained embeddings between workers: only the rows that a step has touched.

A step of 100k tokens touches some 15k of 128k rows; those of the others are zero on every worker. The workers agree on
the touched rows (a byte a row), add up these, and leave the zeros where they are: the same sums as over all rows.
AdamW's state stays dense, since moments of rows that were touched earlier go on to move them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longlora.model import LongContextModel

LEAST_ELEMENTS = 1 << 24
"""Of embeddings for which it is worth it. DeepSpeed's buckets become smaller than they are, which costs small models
more messages than it spares bytes: steps of a test model took several times as long."""
DENSE_FROM = 0.5
"""Share of touched rows from which picking them out saves nothing."""


def sparse_embedding(model: LongContextModel) -> nn.Parameter | None:
    """The trained input embeddings, if they are large and a step touches only some of their rows.

    Where the output layer is tied to them it touches every row.
    """
    if getattr(model.causal_lm.config, "tie_word_embeddings", False):
        return None
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    weights = (weight for module in embeddings for weight in module.parameters())
    return next((w for w in weights if w.requires_grad and w.numel() >= LEAST_ELEMENTS), None)


class TouchedRows:
    """In the place of DeepSpeed's reduction (ZeRO-2) for one parameter; the others are reduced as before.

    DeepSpeed reduces a parameter alone if it is larger than a bucket, so the bucket must be smaller than this one. Of
    the ways that it has, all workers then get the whole sum, from which each keeps its partition.
    """

    def __init__(self, zero: Any, parameter: nn.Parameter) -> None:
        self._zero, self._shape = zero, parameter.shape
        self._number = zero.get_param_id(parameter)
        self._average = zero.average_tensor
        zero.average_tensor = self.average

    def average(self, gradient: Tensor, dtype: torch.dtype) -> None:
        """`gradient`: a flat bucket; with the parameter in it, it is all of it."""
        zero = self._zero
        if [number for _, _, number in zero.ipg_buckets[dtype].params] != [self._number]:
            self._average(gradient, dtype)
            return
        usual = zero.reduce_scatter, zero.gradient_reduction_w_predivide
        zero.reduce_scatter, zero.gradient_reduction_w_predivide = False, self._reduce
        try:
            self._average(gradient, dtype)
        finally:
            zero.reduce_scatter, zero.gradient_reduction_w_predivide = usual

    def _reduce(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean over the workers, in place."""
        rows = gradient.view(self._shape)
        touched = rows.any(dim=1).to(torch.uint8)
        dist.all_reduce(touched, op=dist.ReduceOp.MAX)
        places = touched.nonzero().squeeze(1)
        part = rows if len(places) > DENSE_FROM * len(rows) else rows[places]
        summed = part.to(dtype).div_(dist.get_world_size())
        dist.all_reduce(summed)
        if part is rows:
            rows.copy_(summed)
        else:
            rows[places] = summed.to(rows.dtype)
        return gradient
