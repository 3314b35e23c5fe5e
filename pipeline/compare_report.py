"""A comparison for the terminal and for spreadsheets; for browsers: compare_page.py."""

import csv
import io
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.compare_values import Column, ComparedRun, columns, differing, labels, missing, partial

LONGEST_CELL = 40  # characters
LISTED = 6  # settings of some runs only that are named
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def print_comparison(console: Console, runs: Sequence[ComparedRun], chosen: Sequence[str]) -> None:
    """The runs side by side if they fit, else a row each, else as many side by side at a time as fit."""
    settings, metrics = differing(runs), columns(runs, chosen)
    every = range(len(runs))
    beside = _side_by_side(runs, settings, metrics, every)
    below = _row_each(runs, settings, metrics)
    if _fits(console, beside):
        console.print(beside)
    elif _fits(console, below):
        console.print(below)
    elif not console.is_terminal:  # a file or a pipe, which takes lines of any length
        console.width = _width(console, below)
        console.print(below)
    else:
        for some in _portions(console, every, lambda some: _side_by_side(runs, settings, metrics, some)):
            console.print(_side_by_side(runs, settings, metrics, some))
    for line in remarks(runs, chosen):
        console.print(Text(" " + line, style="dim"), soft_wrap=True)


def remarks(runs: Sequence[ComparedRun], chosen: Sequence[str]) -> list[str]:
    """What the table does not show, in sentences."""
    lines = []
    if len(runs) > 1 and not differing(runs):
        lines.append("no setting differs")
    if some := list(partial(runs)):
        more = f" and {len(some) - LISTED} more" if len(some) > LISTED else ""
        lines.append(f"settings that only some of the runs have: {', '.join(map(shortened, some[:LISTED]))}{more}")
    if not chosen and (absent := missing(runs)):
        lines.append(f"what no run has: {', '.join(absent)}")
    return lines


def comparison_csv(runs: Sequence[ComparedRun], chosen: Sequence[str]) -> str:
    """One row a run: id, name, status, parent, the settings that not all runs share, and the metrics, not rounded.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    settings, metrics = differing(runs) | partial(runs), columns(runs, chosen)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["run_id", "name", "status", "parent_run_id", *settings, *(column.title for column in metrics)]
    writer.writerow(map(no_formula, heads))
    for number, run in enumerate(runs):
        row = [run.run_id, run.name, run.status, run.parent, *(values[number] for values in settings.values())]
        writer.writerow([*map(no_formula, row), *(column.values[number] for column in metrics)])
    return text.getvalue()


def shortened(text: str) -> str:
    """In one line of at most 40 characters, none of which could control the terminal."""
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def no_formula(value: str | None) -> str | None:
    """A cell's text, with an apostrophe in front if a spreadsheet would take it for a formula."""
    if not value or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def _side_by_side(
    runs: Sequence[ComparedRun], settings: dict[str, list[str | None]], metrics: Sequence[Column], some: Sequence[int]
) -> Table:
    names = labels(runs)
    table = _table("")
    for run in some:
        table.add_column(_cell(names[run]), justify="right", no_wrap=True)
    for key, values in settings.items():
        table.add_row(_cell(key), *(_setting(values[run]) for run in some), end_section=key == list(settings)[-1])
    for column in metrics:
        table.add_row(column.title, *(_metric(column, run) for run in some))
    table.add_row("status", *(Text(runs[run].status) for run in some))
    return table


def _row_each(runs: Sequence[ComparedRun], settings: dict[str, list[str | None]], metrics: Sequence[Column]) -> Table:
    known = {run.run_id for run in runs}
    table = _table("run")
    for head in (*settings, *(column.title for column in metrics)):
        table.add_column(_cell(head), justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for number, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        table.add_row(
            _cell("↳ " + name if run.parent in known else name),
            *(_setting(values[number]) for values in settings.values()),
            *(_metric(column, number) for column in metrics),
            Text(run.status),
        )
    return table


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    return table


def _portions(console: Console, runs: Sequence[int], table: Callable[[Sequence[int]], Table]) -> list[Sequence[int]]:
    """The runs in portions whose tables fit into the terminal, each of one run at least."""
    portions: list[list[int]] = [[]]
    for run in runs:
        if portions[-1] and not _fits(console, table([*portions[-1], run])):
            portions.append([])
        portions[-1].append(run)
    return list(portions)


def _fits(console: Console, table: RenderableType) -> bool:
    return _width(console, table) <= console.width


def _width(console: Console, table: RenderableType) -> int:
    """Of the table where nothing is cut."""
    return Measurement.get(console, console.options.update(max_width=100_000), table).maximum


def _cell(text: str, style: str = "") -> Text:
    return Text(shortened(text), style=style)


def _setting(value: str | None) -> Text:
    return _cell("–", "dim") if value is None else _cell(value)


def _metric(column: Column, run: int) -> Text:
    return Text(column.text(run), style="bold green" if column.best(run) else "")
