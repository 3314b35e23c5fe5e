"""Equal neighbouring segments as one dense batch, by strides alone, and results back into the row."""

import torch

from longlora.segments import Run


def as_batch(row: torch.Tensor, run: Run) -> torch.Tensor:
    """(T, heads, d) → the run's segments as a view (repeats, heads, length, d)."""
    return row[run.tokens].unflatten(0, (run.repeats, run.length)).transpose(1, 2)


def as_row(batch: torch.Tensor) -> torch.Tensor:
    """(repeats, heads, length, d) → (repeats · length, heads, d): a view, for the operators lay heads inside tokens."""
    return batch.transpose(1, 2).flatten(0, 1)


def copy_rows(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Copies (n, heads, d) into some of the heads of another tensor.

    On a GPU torch copies strided tensors an element a thread, which for 2-byte elements reaches a quarter of the
    memory's rate: there whole 16 bytes are taken for an element.
    """
    if source.is_cuda and source.shape[-1] * source.element_size() % 16 == 0:
        source, destination = source.view(torch.complex128), destination.view(torch.complex128)
    destination.copy_(source)
