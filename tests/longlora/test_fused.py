"""When fused operators are put in; what they compute is tested where there is a GPU (test_gpu.py)."""

import pytest
import torch
from torch import nn

from longlora import fused
from longlora.fused import can_fuse_head
from longlora.model import build_base

CUDA = torch.device("cuda")


def test_without_a_gpu_the_models_own_operators_stay() -> None:
    assert fused.refusal("llama", "cpu") == "needs a CUDA device, not cpu"
    assert fused.refusal("llama", "meta") is None, "stand-ins take their place"


def test_without_liger_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert fused.refusal("llama", "cuda") == "liger-kernel is not installed"
    assert not can_fuse_head(nn.Linear(4, 8), CUDA)


def test_which_output_layers_are_fused_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain linear one: a hook on it must run (ZeRO-3 gathers its weight in one), and an adapter around it too."""
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    head = nn.Linear(4, 8)
    assert can_fuse_head(head, CUDA)
    assert not can_fuse_head(head, torch.device("cpu"))
    assert not can_fuse_head(nn.Sequential(head), CUDA)
    head.register_forward_pre_hook(lambda module, inputs: None)
    assert not can_fuse_head(head, CUDA)


def test_stand_ins_keep_shapes_and_gradients_flow() -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 32}
    settings = {"dtype": torch.bfloat16, "rope": None, "context_length": 32, "init_seed": 0, "device": "meta"}
    model = build_base(None, config, fuse=True, attention="sdpa", **settings)
    out = model(torch.zeros(1, 8, dtype=torch.int64, device="meta")).logits
    out.sum().backward()
    assert out.shape == (1, 8, 50)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
