import pytest
import torch

from longlora.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_made_counts_until_it_is_gone(device: str) -> None:
    before = torch.ones(1000, device=device)
    with LiveBytes() as live:
        doubled = before * 2
        assert live.now == 4000
        view = doubled[:10].view(2, 5)
        assert live.now == 4000, "a view has no bytes of its own"
        before.add_(1)
        assert live.now == 4000, "what existed before does not count"
        halves = [before.half(), before.half()]
        assert (live.now, live.peak) == (8000, 8000)
        halves.pop()
        assert (live.now, live.peak) == (6000, 8000)
        live.reset_peak()
        del doubled
        assert live.now == 6000, "the view keeps it"
        del view
        assert (live.now, live.peak) == (2000, 6000)


def test_the_backward_pass_counts_too() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = (x * 2).exp()  # exp keeps its output
        del y
        z = (x * 2).exp().sum()
        assert live.now == 4000 + 4
        torch.autograd.grad(z, x)
    assert live.peak >= 8000
    assert live.now == 4
