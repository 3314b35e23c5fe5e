"""Rows of several documents, as the GPU benchmarks make them."""

import torch

from benchmarks.figures import documents_of
from benchmarks.step import judge, packed
from longlora.segments import plan_segments


def test_documents_fill_a_row() -> None:
    assert documents_of(20, None) == [20]
    assert documents_of(20, 8) == [8, 8, 4]
    assert documents_of(16, 8) == [8, 8]
    assert documents_of(5, 8) == [5]


def test_positions_and_targets_stay_inside_documents() -> None:
    plan = plan_segments([3, 2], 2)
    positions, targets = packed(torch.tensor([[5, 6, 7, 8, 9]]), plan)
    assert positions.tolist() == [[0, 1, 2, 0, 1]]
    assert targets.tolist() == [6, 7, -100, 9, -100]


def row(contender: str, seconds: float, group_size: int | None = 8192) -> dict[str, object]:
    return {
        "tokens": 32768, "group_size": group_size, "contender": contender, "seconds": seconds, "spread": "1.0%",
        "tokens/s": 32768 / seconds, "peak GiB": 100.0,
    }  # fmt: skip


def test_auto_is_judged_by_layers_that_run_again_to_their_end() -> None:
    """By 6 operations a weight and token, as the goals are; a speed over others has no goal, nor one on another GPU."""

    rows = [row("recompute-all", 2.8), row("recompute", 2.6), row("auto", 2.0)]
    judge(rows, "llama2-7b", has_goals=True)
    assert rows[0]["verdict"] == rows[1]["verdict"] == ""
    assert str(rows[2]["verdict"]).split("; ") == [
        "speed over recompute-all 1.400 (goal 1.35): PASS",
        "speed over recompute 1.300",
        "tokens/s over goal 1.092 (goal 1.00): PASS",
    ]
    rows[0]["seconds"] = 2.6
    judge(rows, "llama2-7b", has_goals=True)
    assert "recompute-all 1.300 (goal 1.35): FAIL" in str(rows[2]["verdict"])
    judge(rows, "llama2-7b", has_goals=False)
    assert "(goal" not in str(rows[2]["verdict"])


def test_cases_of_one_length_are_compared_within_their_group_size() -> None:
    rows = [row("hf", 5.0, None), row("recompute", 2.0, 2048), row("recompute", 2.5), row("auto", 1.0, 2048)]
    judge(rows, "llama2-7b", has_goals=True)
    assert [r["verdict"] for r in rows[1:]] == [
        "speed over hf 2.500",  # the goals are for G 8192 at this length
        "speed over hf 2.000 (goal 1.50): PASS",
        "speed over recompute 2.000",
    ]
