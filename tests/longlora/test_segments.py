"""Segment bounds of every small case, by hand and by property."""

import pytest
import torch

from longlora.segments import Run, plan_segments

# With G = 4, by hand: document lengths, straight bounds, shifted bounds.
BY_HAND = [
    ([4], [0, 4], [0, 4]),
    ([5], [0, 4, 5], [0, 2, 5]),
    ([6], [0, 4, 6], [0, 2, 6]),
    ([7], [0, 4, 7], [0, 2, 6, 7]),
    ([8], [0, 4, 8], [0, 2, 6, 8]),
    ([10], [0, 4, 8, 10], [0, 2, 6, 10]),
    ([3, 5, 4], [0, 3, 7, 8, 12], [0, 3, 5, 8, 12]),
    ([6, 6], [0, 4, 6, 10, 12], [0, 2, 6, 8, 12]),
]


@pytest.mark.parametrize(("document_lengths", "straight", "shifted"), BY_HAND)
def test_bounds_by_hand(document_lengths: list[int], straight: list[int], shifted: list[int]) -> None:
    plan = plan_segments(document_lengths, 4)
    assert plan.straight.tolist() == straight
    assert plan.shifted.tolist() == shifted
    assert plan.straight.dtype == plan.shifted.dtype == torch.int32


@pytest.mark.parametrize("group_size", [2, 4, 6])
def test_segments_tile_documents_and_none_is_longer_than_a_group(group_size: int) -> None:
    for length in range(1, 4 * group_size):
        plan = plan_segments([length, 3, length], group_size)
        for segments in (plan.straight_segments, plan.shifted_segments):
            lengths = segments.bounds.diff()
            assert lengths.min() >= 1
            assert lengths.max() == segments.longest <= group_size
            assert {0, length, length + 3, 2 * length + 3} <= set(segments.bounds.tolist())


def test_runs_are_the_same_segments_with_equal_neighbours_together() -> None:
    plan = plan_segments([16, 3], 4)
    assert plan.straight_runs == (Run(0, 4, 4), Run(16, 3, 1))
    assert plan.shifted_runs == (Run(0, 2, 1), Run(2, 4, 3), Run(14, 2, 1), Run(16, 3, 1))
    for segments in (plan.straight_segments, plan.shifted_segments):
        unrolled = [run.start + run.length * i for run in segments.runs for i in range(run.repeats)]
        assert [*unrolled, 19] == segments.bounds.tolist()


@pytest.mark.parametrize(("document_lengths", "group_size"), [([9, 2], None), ([4, 1, 3], 4)])
def test_full_attention_is_one_tensor_of_document_bounds(document_lengths: list[int], group_size: int | None) -> None:
    plan = plan_segments(document_lengths, group_size)
    assert plan.full and plan.shifted is plan.straight
    assert plan.straight.diff().tolist() == document_lengths
    moved = plan.to("meta")
    assert moved.full and moved.straight.device.type == "meta"


def test_moving_a_plan_keeps_its_halves_apart() -> None:
    moved = plan_segments([5, 2], 4).to("meta")
    assert not moved.full
    assert (moved.straight.device.type, moved.shifted.device.type, moved.tokens) == ("meta", "meta", 7)


@pytest.mark.parametrize("group_size", [0, -2, 3])
def test_group_size_must_be_positive_and_even(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"^group_size is {group_size}: it must be a positive even number"):
        plan_segments([8], group_size)


@pytest.mark.parametrize("document_lengths", [[], [4, 0], [-1]])
def test_documents_must_have_tokens(document_lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one is needed, each of 1 token or more"):
        plan_segments(document_lengths, 4)
