"""What a search has found: a table, the best config, and plots of quality against throughput and of each setting."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from upath import UPath

from pipeline.compare_report import no_formula
from pipeline.config import Config
from pipeline.page import figure_html, page, table_html
from pipeline.search_budget import Budget
from pipeline.search_plots import CAPTIONS, image, plots
from pipeline.search_space import LOSS, THROUGHPUT
from pipeline.search_trials import TrialRecord, best_trial, described, pareto_front, shown, trial_config
from pipeline.storage import write_atomic

FOLDER = "result"


def write_result(config: Config, folder: UPath, records: Sequence[TrialRecord], budget: Budget) -> UPath:
    """Writes `<search>/result/`: trials.csv, best.yaml once a trial has finished, plots, report.html; returns it."""
    result = folder / FOLDER
    write_atomic(result / "trials.csv", trials_csv(config, records).encode())
    best = best_trial(records)
    if best is not None:
        write_atomic(result / "best.yaml", best_yaml(config, best, len(records)).encode())
    figures = plots(config, records)
    for name, figure in figures.items():
        write_atomic(result / f"{name}.png", image(figure, "png"))
    write_atomic(result / "report.html", report_html(config, records, budget, figures).encode())
    return result


def print_result(config: Config, folder: UPath, records: Sequence[TrialRecord], budget: Budget) -> None:
    """The table, what was spent, and where the best config is."""
    console = Console()
    console.print(trials_table(config, records))
    print(_spent(records, budget))
    best = best_trial(records)
    if best is None:
        print("no trial has finished: there is no best one yet")
    else:
        print(f"best: trial {best.number}, {described(best.settings)}")
        print(f"its config: {folder / FOLDER / 'best.yaml'} (run --config takes it: evaluates and exports that trial)")


def best_yaml(config: Config, best: TrialRecord, trials: int) -> str:
    """The config of the best trial's run, which may grow to the workers of the search's config."""
    run = trial_config(config, best.settings, best.number)
    most = max(run.workers.min, config.workers.max)
    run = run.model_copy(update={"workers": run.workers.model_copy(update={"max": most})})
    head = (
        f"# Best of {trials} trials of the search {config.run.name}: {described(best.settings)};\n"
        f"# eval/loss {best.loss:.4f} after {best.tokens:,} tokens. The trial's run has this name: `run` evaluates\n"
        "# and exports what it has trained. To train anew, for longer or on more data, change run.name.\n"
    )
    return head + run.to_yaml()


def trials_table(config: Config, records: Sequence[TrialRecord]) -> Table:
    """All trials, the best first: finished ones by loss, then others by how far they came."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Search {config.run.name}", title_justify="left")
    for name in _header(config):
        table.add_column(name, justify="left" if name in ("status", "why") else "right")
    best, front = best_trial(records), {record.number for record in pareto_front(records)}
    for record in sorted(records, key=_rank):
        style = "bold blue" if record is best else None if record.status == "finished" else "dim"
        cells = _cells(config, record)
        mark = "*" if record.number in front and THROUGHPUT in config.search.objectives else ""
        table.add_row(f"{cells[0]}{mark}", *cells[1:], style=style)
    if THROUGHPUT in config.search.objectives:
        table.caption = "* no other trial is better in both objectives"
    return table


def trials_csv(config: Config, records: Sequence[TrialRecord]) -> str:
    """A row a trial, by number: the space's keys in full, and what the trial came to."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    outcome = [LOSS, THROUGHPUT, "tokens", "worker_seconds", "status", "reason"]
    writer.writerow(["trial", "run", *config.search.space, *outcome])
    for record in sorted(records, key=lambda record: record.number):
        loss = record.loss if record.reports else None
        settings = [record.settings.get(key) for key in config.search.space]
        spent = [record.tokens, round(record.worker_seconds, 1)]
        row = [record.number, record.run, *settings, loss, record.throughput, *spent, record.status, record.reason]
        writer.writerow([no_formula(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def report_html(config: Config, records: Sequence[TrialRecord], budget: Budget, figures: dict[str, Figure]) -> str:
    """A page that needs nothing beside it: what was spent, the table, the plots and the best config."""
    best, ranked = best_trial(records), sorted(records, key=_rank)
    table = table_html(_header(config), [_cells(config, record) for record in ranked], marked=ranked[:1] == [best])
    found = f"<pre>{escape(best_yaml(config, best, len(records)))}</pre>" if best else "<p>No trial has finished.</p>"
    drawn = [figure_html(image(figure, "svg").decode(), CAPTIONS[name]) for name, figure in figures.items()]
    spent = f"<p>{escape(_spent(records, budget))}</p>"
    return page(f"Search {config.run.name}", [spent, table, *drawn, "<h2>Best config</h2>", found])


def _header(config: Config) -> list[str]:
    keys = [key.rpartition(".")[2] for key in config.search.space]
    return ["trial", *keys, "eval/loss", "tokens/s", "tokens", "status", "why"]


def _cells(config: Config, record: TrialRecord) -> list[str]:
    rate = record.throughput
    settings = [shown(record.settings[key]) if key in record.settings else "" for key in config.search.space]
    loss = f"{record.loss:.4f}" if record.reports else ""
    status = "interrupted" if record.status == "running" else record.status
    rest = [loss, "" if rate is None else f"{rate:,.0f}", f"{record.tokens:,}", status, record.reason]
    return [str(record.number), *settings, *rest]


def _spent(records: Sequence[TrialRecord], budget: Budget) -> str:
    count = Counter("interrupted" if record.status == "running" else record.status for record in records)
    kinds = ", ".join(f"{number} {kind}" for kind, number in count.most_common())
    hours, cost = sum(record.worker_seconds for record in records) / 3600, budget.cost(records)
    money = "" if cost is None else f", cost {cost:,.2f}"
    tokens = sum(record.tokens for record in records)
    return (
        f"{len(records)} trials ({kinds}), {tokens:,} tokens, {budget.seconds / 60:.1f} min, "
        f"{hours:.2f} worker-hours{money}"
    )


def _rank(record: TrialRecord) -> tuple[object, ...]:
    """Finished trials first, by loss; others by how far they came."""
    finished = record.status == "finished"
    return (not finished, 0 if finished else -record.tokens, record.loss, record.number)
