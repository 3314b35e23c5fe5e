"""One function for a frozen layer and its LoRA: PEFT's outputs and gradients, and fewer bytes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from longlora.live_bytes import LiveBytes
from longlora.lora_linear import fuse_lora


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def network(dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **settings)
    peft = get_peft_model(Two(), lora).to(dtype)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return peft


def outcome(peft: nn.Module, needs_grad: bool = True) -> list[torch.Tensor]:
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).to(next(peft.parameters()).dtype)
    x.requires_grad_(needs_grad)
    out = peft(x)
    wanted = [p for p in peft.parameters() if p.requires_grad] + [x] * needs_grad
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("needs_grad", [True, False])
def test_gives_what_peft_gives(needs_grad: bool) -> None:
    peft = network()
    wanted = outcome(peft, needs_grad)
    assert fuse_lora(peft) == 2
    torch.testing.assert_close(outcome(peft, needs_grad), wanted)


def test_rank_stabilised_scaling_is_peft_s() -> None:
    peft = network(use_rslora=True)
    wanted = outcome(peft)
    fuse_lora(peft)
    torch.testing.assert_close(outcome(peft), wanted)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_leaves_other_variants_alone(settings: dict[str, object]) -> None:
    assert fuse_lora(network(**settings)) == 0


def test_leaves_a_partitioned_layer_alone() -> None:
    peft = network()
    peft.base_model.model.first.base_layer.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks it
    assert fuse_lora(peft) == 1


def test_merged_disabled_and_lowered_layers_run_as_peft_runs_them() -> None:
    peft = network(torch.float32)
    x = torch.randn(3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lowered = peft(x)
    with peft.disable_adapter():
        without = peft(x)
    fuse_lora(peft)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(peft(x), lowered)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(x), without)
    separate = peft(x)
    peft.merge_adapter()
    torch.testing.assert_close(peft(x), separate)


def test_holds_less_at_its_peak() -> None:
    peft = network()
    x = torch.randn(1, 2000, 24, dtype=torch.float64)
    peaks = []
    for _ in range(2):
        with LiveBytes() as live:
            peft(x).sum().backward()
        peaks.append(live.peak)
        fuse_lora(peft)
    assert peaks[1] < 0.8 * peaks[0]
