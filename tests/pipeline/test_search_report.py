import csv
import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from upath import UPath

from pipeline.config import load_config, parse_config
from pipeline.search_budget import Budget
from pipeline.search_report import best_yaml, print_result, trials_csv, trials_table, write_result
from pipeline.search_trials import Report, TrialRecord

CONFIG = load_config("configs/search-demo.yaml", ["search.worker_hour_price=2"])
SETTINGS = [(512, 2), (1024, 8), (2048, 32)]


def record(number: int, status: str, losses: list[float], rate: float = 900.0, reason: str = "") -> TrialRecord:
    group_size, rank = SETTINGS[number - 1]
    reports = [Report(3 * n, 3 * n * 8192, loss, rate) for n, loss in enumerate(losses, 1)]
    settings = {"attention.group_size": group_size, "adapter.rank": rank}
    tokens = reports[-1].tokens if reports else 0
    return TrialRecord(number, f"search-demo.{number:04d}", settings, status, reason, tokens, 1800.0, reports)


RECORDS = [
    record(1, "stopped", [4.6], 1100.0, "behind other trials: eval/loss 4.6000 after 24,576 tokens"),
    record(2, "finished", [4.5, 4.3]),
    record(3, "finished", [4.5, 4.2], 700.0, reason="<script>alert(1)</script>"),
]


def shown(records: list[TrialRecord]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(trials_table(CONFIG, records))
    return console.export_text()


def test_the_table_begins_with_the_best() -> None:
    lines = [line.split() for line in shown(RECORDS).splitlines() if "finished" in line or "stopped" in line]
    assert [line[0] for line in lines] == ["3*", "2*", "1"]
    assert lines[0][1:6] == ["2048", "32", "4.2000", "700", "49,152"]


def test_the_csv_has_every_trial() -> None:
    rows = list(csv.DictReader(io.StringIO(trials_csv(CONFIG, RECORDS))))
    assert [row["trial"] for row in rows] == ["1", "2", "3"]
    assert [float(row["eval/loss"]) for row in rows] == [4.6, 4.3, 4.2]
    assert (rows[1]["adapter.rank"], rows[1]["train/tokens_per_second"], rows[1]["status"]) == (
        "8",
        "900.0",
        "finished",
    )


def test_no_cell_is_a_formula() -> None:
    [row] = csv.DictReader(io.StringIO(trials_csv(CONFIG, [record(1, "failed", [], reason="=HYPERLINK(0)")])))
    assert row["reason"] == "'=HYPERLINK(0)"


def test_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(CONFIG, UPath(tmp_path))
    folder = write_result(CONFIG, UPath(tmp_path), RECORDS, budget)
    names = {path.name for path in folder.iterdir()}
    assert names == {"trials.csv", "best.yaml", "pareto.png", "effects.png", "report.html"}
    best = parse_config(yaml.safe_load((folder / "best.yaml").read_text()))
    assert (best.run.name, best.attention.group_size, best.adapter.rank) == ("search-demo.0003", 2048, 32)
    assert best.workers == CONFIG.workers and not best.search.space
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "<script>" not in page and "&lt;script&gt;" in page
    print_result(CONFIG, UPath(tmp_path), RECORDS, budget)
    printed = capsys.readouterr().out
    assert "3 trials (2 finished, 1 stopped), 122,880 tokens" in printed and "1.50 worker-hours, cost 3.00" in printed
    assert "best: trial 3, group_size 2048, rank 32" in printed


def test_the_best_config_has_the_workers_that_were_tried() -> None:
    config = load_config("configs/search-demo.yaml", ["workers.max=4"])
    tried = TrialRecord(
        1, "s.1", {"workers.zero_stage": 3, "workers.min": 2}, "finished", reports=[Report(1, 1, 4.0, 1.0)]
    )
    workers = parse_config(yaml.safe_load(best_yaml(config, tried, 1))).workers
    assert (workers.zero_stage, workers.min, workers.max) == (3, 2, 4)


@pytest.mark.parametrize("records", [[], [record(1, "failed", [])], [record(1, "stopped", [4.6])]])
def test_without_a_finished_trial_there_is_no_best(
    tmp_path: Path, records: list[TrialRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    budget = Budget(CONFIG, UPath(tmp_path))
    folder = write_result(CONFIG, UPath(tmp_path), records, budget)
    assert not (folder / "best.yaml").exists() and "No trial has finished" in (folder / "report.html").read_text()
    print_result(CONFIG, UPath(tmp_path), records, budget)
    assert "no trial has finished: there is no best one yet" in capsys.readouterr().out
