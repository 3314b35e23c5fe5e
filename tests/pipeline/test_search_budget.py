from pathlib import Path

import pytest
from upath import UPath

from pipeline.config import load_config
from pipeline.search_budget import Budget
from pipeline.search_trials import TrialRecord

WHOLE = 12 * 2 * 4096  # tokens of a trial of the demonstration


def budget(folder: Path, *overrides: str) -> Budget:
    return Budget(load_config("configs/search-demo.yaml", list(overrides)), UPath(folder))


def trial(number: int, status: str, tokens: int = 0, seconds: float = 0.0) -> TrialRecord:
    return TrialRecord(number, f"s.{number}", {}, status, tokens=tokens, worker_seconds=seconds)


def test_trials(tmp_path: Path) -> None:
    two = [trial(1, "failed"), trial(2, "running")]
    assert budget(tmp_path, "search.trials=3").refuses_another(two) == ""
    assert budget(tmp_path, "search.trials=2").refuses_another(two) == "search.trials 2 have been begun"


def test_tokens_are_granted_for_a_whole_trial(tmp_path: Path) -> None:
    """What ASHA has saved is there for others; what a running trial may still need is not."""
    limited = budget(tmp_path, f"search.max_tokens={2 * WHOLE}")
    assert limited.refuses_another([trial(1, "running", tokens=10)]) == ""
    assert "leaves no room" in limited.refuses_another([trial(1, "running"), trial(2, "running")])
    assert "leaves no room" in limited.refuses_another([trial(1, "finished", WHOLE), trial(2, "stopped", 1)])
    assert limited.refuses_another([trial(1, "stopped", WHOLE // 2), trial(2, "stopped", WHOLE // 2)]) == ""
    assert limited.exhausted([trial(1, "finished", 9 * WHOLE)]) == ""


def test_money(tmp_path: Path) -> None:
    paid = budget(tmp_path, "search.max_cost=3", "search.worker_hour_price=2")
    cheap, dear = [trial(1, "running", seconds=3600)], [trial(1, "stopped", seconds=3600), trial(2, "running", 0, 1800)]
    assert (paid.cost(cheap), paid.cost(dear)) == (2.0, 3.0)
    assert paid.exhausted(cheap) == ""
    assert paid.exhausted(dear) == "search.max_cost 3 is spent"
    assert budget(tmp_path).cost(dear) is None


def test_hours_count_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("pipeline.search_budget.time.monotonic", lambda: now)
    first = budget(tmp_path, "search.max_hours=1")
    now += 3000
    assert first.exhausted([]) == ""
    first.keep()
    now += 10**6  # nobody worked on it
    second = budget(tmp_path, "search.max_hours=1")
    assert second.exhausted([]) == ""
    now += 601
    assert second.exhausted([]) == "search.max_hours 1 is spent"
