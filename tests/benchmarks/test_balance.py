"""How even the work between workers is, on examples that can be checked by hand."""

from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from benchmarks import balance
from longlora.flops import attention_pairs
from longlora.segments import plan_segments
from pipeline.storage import read_json


def test_cost_of_a_row_is_that_of_its_segments() -> None:
    """a = 4·P and b = 7·D·L: with 8 tokens in groups of 4, halves of the heads see 4 + 4 and 2 + 4 + 2."""
    a, b = 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008), 7 * 4096 * 32
    assert a == pytest.approx(4 * 6.476e9, rel=1e-3)
    squares = (16 + 16 + 4 + 16 + 4) / 2
    assert balance.cost([8], 4) == a * 8 + b * squares
    assert balance.cost([8, 3], 4) == a * 11 + b * (squares + 9)
    assert balance.cost([8, 3], None) == a * 11 + b * (64 + 9)


@pytest.mark.parametrize("group_size", [64, 500, None])
def test_documents_add_up_to_the_row(group_size: int | None) -> None:
    row = [700, 1, 64, 233]
    pairs = attention_pairs(plan_segments(row, group_size))
    attention = balance.cost(row, group_size) - balance.operations_of_a_token() * sum(row)
    assert attention == pytest.approx(pairs * 14 * 4096 * 32, rel=1e-9)


def test_both_assignments_of_four_rows() -> None:
    costs = np.array([5.0, 4.0, 3.0, 2.0])
    assert balance.in_order(costs, 2).tolist() == [9, 5]
    assert balance.ours(costs, 2).tolist() == [7, 7]
    assert balance.unevenness(balance.in_order(costs, 2)) == 9 / 7


def test_equal_rows_are_even_whoever_takes_them() -> None:
    ratios = balance.compare(np.ones(32), steps=3, world_size=4, batch=8)
    assert {name: values.tolist() for name, values in ratios.items()} == {"ours": [1, 1, 1], "in order": [1, 1, 1]}


@pytest.mark.parametrize(
    ("ratios", "group_size", "verdict"),
    [
        ([1.0, 1.04], 8192, "PASS"),
        ([1.0, 1.05], 8192, "FAIL"),
        ([1.0, 1.05], 8194, "no goal"),
        ([1.0, 1.05], None, "no goal"),
    ],
)
def test_verdict(ratios: list[float], group_size: int | None, verdict: str) -> None:
    assert balance.judge(np.array(ratios), group_size) == verdict


def test_a_short_measurement_is_saved_and_repeats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("figures.RESULTS", tmp_path)
    monkeypatch.setattr(balance, "CONTEXTS", (1024,))
    monkeypatch.setattr(balance, "GROUP_SIZES", (128, 512, None))
    monkeypatch.setattr(balance, "WINDOW_TOKENS", 2**18)
    monkeypatch.setattr("sys.argv", ["balance.py", "--steps", "4", "--save"])
    tables = []
    for _ in range(2):
        balance.main()
        [saved] = tmp_path.glob("*-balance.json")
        tables.append(read_json(UPath(saved))["rows"])
    assert tables[0] == tables[1]
    assert [(row["documents"], row["G"]) for row in tables[0]] == [
        (documents, group_size) for documents in ("web", "long") for group_size in (128, 512, "none")
    ]
    assert all(float(row["ours mean"]) <= float(row["in order mean"]) for row in tables[0])
