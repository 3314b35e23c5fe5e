"""Files in the format of safetensors, as parts that are in memory already: nothing is copied before it is written.

`safetensors.torch.save` builds the whole file in memory first. For what a rank holds of a state that is as much memory
again, fresh pages that take longer to come than the disk takes to write them.
"""

import json
import struct
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Piece = TypeVar("Piece", bound=Sized)


@dataclass(frozen=True)
class FloatTensor:
    """An fp32 tensor of any shape whose elements lie in several flat arrays, one after the other."""

    shape: Sequence[int]
    pieces: Sequence[npt.NDArray[np.float32]]


def tensor_file(tensors: Mapping[str, FloatTensor]) -> list[bytes | memoryview]:
    """The content of a file with these tensors, in parts: a header, then the tensors' own memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + sum(piece.nbytes for piece in tensor.pieces)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        parts += [piece.view(np.uint8).data for piece in tensor.pieces]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned in the file
    return [struct.pack("<Q", len(text)) + text, *parts]


def in_order(name: str, pieces: Mapping[int, Piece], elements: int) -> list[Piece]:
    """Pieces of a flat tensor, given by their first elements, in order; ValueError if they do not just fill it."""
    starts = sorted(pieces)
    ends = list(accumulate((len(pieces[start]) for start in starts), initial=0))
    if starts != ends[:-1] or ends[-1] != elements:
        raise ValueError(f"{name} is incomplete: {ends[-1]} of {elements} elements, in pieces that begin at {starts}")
    return [pieces[start] for start in starts]
