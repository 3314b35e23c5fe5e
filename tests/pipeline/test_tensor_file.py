import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from pipeline.tensor_file import FloatTensor, in_order, tensor_file


def test_safetensors_reads_what_lies_in_pieces(tmp_path):
    whole = np.arange(6, dtype=np.float32)
    tensors = {
        "in two": FloatTensor((2, 3), [whole[:2], whole[2:]]),
        "of none": FloatTensor((0, 4), []),
        "ein Stück ²": FloatTensor((3,), [whole[3:]]),
    }
    content = b"".join(tensor_file(tensors))
    loaded = load(content)
    assert loaded.keys() == tensors.keys()
    assert torch.equal(loaded["in two"], torch.arange(6.0).reshape(2, 3))
    assert loaded["of none"].shape == (0, 4)
    assert torch.equal(loaded["ein Stück ²"], torch.tensor([3.0, 4.0, 5.0]))
    (tmp_path / "file").write_bytes(content)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "which transformers demands"


def test_the_tensors_are_not_copied():
    whole = np.zeros(5, dtype=np.float32)
    [header, part] = tensor_file({"w": FloatTensor((5,), [whole])})
    whole[2] = 1.0
    assert len(header) % 8 == 0
    assert np.array_equal(np.frombuffer(part, dtype=np.float32), [0, 0, 1, 0, 0])


def test_pieces_come_in_any_order():
    assert in_order("w", {3: [3, 4], 0: [0, 1, 2]}, 5) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    "pieces", [{}, {0: [0, 1]}, {1: [1, 2]}, {0: [0], 2: [2]}, {0: [0, 1], 1: [1, 2]}, {0: [0] * 4}]
)
def test_pieces_that_do_not_just_fill_it_are_refused(pieces):
    with pytest.raises(ValueError, match=r"w is incomplete: . of 3 elements"):
        in_order("w", pieces, 3)
