"""The chunked loss against plain fp32 cross-entropy, and the largest tensor that it makes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longlora.loss import summed_cross_entropy

TOKENS, WIDTH, VOCABULARY = 23, 6, 40


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)
    head.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[[4, 5, 22]] = -100
    return hidden, head, targets


def test_two_tokens_by_hand():
    # logits (0, ln 3) and (0, 0): the targets have probabilities 3/4 and 1/2; the third token has no target
    hidden = torch.tensor([[0.0, torch.log(torch.tensor(3.0))], [0.0, 0.0], [5.0, 0.0]])
    loss = summed_cross_entropy(hidden, nn.Identity(), torch.tensor([1, 0, -100]))
    torch.testing.assert_close(loss, -torch.log(torch.tensor(0.75 * 0.5)))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 22, 23, 2048])
@pytest.mark.parametrize("head_trains", [True, False])
def test_equals_plain_cross_entropy_with_all_gradients(chunk_tokens, head_trains):
    hidden, head, targets = example()
    head.requires_grad_(head_trains)
    plain = F.cross_entropy(head(hidden), targets, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad(plain, [hidden, *(p for p in head.parameters() if p.requires_grad)])
    loss = summed_cross_entropy(hidden, head, targets, chunk_tokens)
    (3 * loss).backward()  # a scaled loss scales the gradients
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, 3 * wanted[0], rtol=1e-5, atol=1e-6)
    if head_trains:
        torch.testing.assert_close(head.weight.grad, 3 * wanted[1], rtol=1e-5, atol=1e-6)
    else:
        assert head.weight.grad is None


def test_a_tied_head_gathers_the_gradients_of_both_uses():
    _, head, targets = example()
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight = head.weight
    tokens = torch.arange(TOKENS)
    plain = F.cross_entropy(head(embedding(tokens)), targets, ignore_index=-100, reduction="sum")
    (wanted,) = torch.autograd.grad(plain, [head.weight])
    summed_cross_entropy(embedding(tokens), head, targets, chunk_tokens=4).backward()
    torch.testing.assert_close(head.weight.grad, wanted, rtol=1e-5, atol=1e-6)


def test_bf16_hidden_states_get_an_fp32_softmax():
    hidden, head, targets = example(torch.bfloat16)
    exact = F.cross_entropy(head(hidden).float(), targets, ignore_index=-100, reduction="sum")
    loss = summed_cross_entropy(hidden, head, targets, chunk_tokens=4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """The most elements that one tensor made inside has, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_logits_of_more_than_a_chunk_never_exist():
    hidden, head, targets = example()
    with LargestTensor() as largest:
        summed_cross_entropy(hidden, head, targets, chunk_tokens=8).backward()
    assert largest.elements == 8 * VOCABULARY
    with LargestTensor() as plain:
        F.cross_entropy(head(hidden), targets).backward()
    assert plain.elements == TOKENS * VOCABULARY


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    hidden, head, targets = example()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        summed_cross_entropy(hidden, head, targets, chunk_tokens=8)
    assert sum(kept) <= hidden.numel() + targets.numel() + head.weight.numel()


def test_without_gradients_nothing_is_recorded():
    hidden, head, targets = example()
    with torch.no_grad():
        assert not summed_cross_entropy(hidden, head, targets, chunk_tokens=8).requires_grad


def test_one_target_a_token():
    hidden, head, targets = example()
    with pytest.raises(ValueError, match="23 hidden states and 22 targets"):
        summed_cross_entropy(hidden, head, targets[1:])
