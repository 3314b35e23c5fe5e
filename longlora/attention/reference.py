"""The definition of S²-Attn as a mask, attended by brute force: the oracle of the tests.

Written from the definition, token pair by token pair, without the planner and without segments, so that it shares no
mistake with what it judges. Memory O(heads · T²).
"""

from collections.abc import Sequence

import torch


def reference_mask(document_lengths: Sequence[int], group_size: int | None, shifted: bool) -> torch.Tensor:
    """Bool (T, T): whether the query of the row (first index) attends to the key of the column.

    ``shifted`` chooses the half of the heads whose groups are displaced by G/2 (arXiv 2309.12307, section 3.2).
    """
    document = torch.repeat_interleave(torch.arange(len(document_lengths)), torch.tensor(document_lengths))
    position = torch.cat([torch.arange(length) for length in document_lengths])
    group = torch.zeros_like(position)
    if group_size is not None:
        is_long = torch.tensor(document_lengths)[document] > group_size
        displacement = group_size // 2 if shifted else 0
        group = torch.where(is_long, (position + displacement) // group_size, 0)
    same_document = document[:, None] == document[None, :]
    same_group = group[:, None] == group[None, :]
    not_future = position[:, None] >= position[None, :]
    return same_document & same_group & not_future


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    document_lengths: Sequence[int],
    group_size: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """S²-Attn by masked softmax over all token pairs, differentiable by autograd.

    q (T, H, d); k, v (T, Hkv, d) with Hkv dividing H; returns (T, H, d). The first ⌊H/2⌋ query heads are straight.
    """
    heads, head_dim = q.shape[1:]
    per_kv_head = heads // k.shape[1]
    k = k.repeat_interleave(per_kv_head, dim=1)
    v = v.repeat_interleave(per_kv_head, dim=1)
    straight = reference_mask(document_lengths, group_size, shifted=False)
    shifted = reference_mask(document_lengths, group_size, shifted=True)
    mask = torch.stack([straight if head < heads // 2 else shifted for head in range(heads)]).to(q.device)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (head_dim**-0.5 if scale is None else scale)
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v)
