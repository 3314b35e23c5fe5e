"""What an audit looks like to its reader: a table for the terminal, JSON for programs, a timeline plot."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from upath import UPath

from pipeline.audit import Audit, counting_steps
from pipeline.ledger import Event, StepRecord, read_ledger
from pipeline.storage import write_atomic, write_json
from pipeline.timeline import Line, goodput

BLUE, GREY, RED = "#1f6fb4", "#b0b0b0", "#c0392b"
INTERRUPTIONS = ("failure", "resize", "driver")
DISTURBANCES = (*INTERRUPTIONS, "notice")
SHOWN = 20  # steps that a finding names at most


def write_report(run_folder: UPath, result: Audit) -> UPath:
    """Writes `audit/audit.json` and `audit/timeline.png`; returns their folder."""
    numbered = list(read_ledger(run_folder))
    write_json(run_folder / "audit" / "audit.json", audit_json(result))
    plot = timeline_plot([line for _, line in numbered], counting_steps(numbered, result.committed))
    write_atomic(run_folder / "audit" / "timeline.png", plot)
    return run_folder / "audit"


def audit_json(result: Audit) -> dict[str, Any]:
    """The content of `audit/audit.json`."""
    recoveries = [{**asdict(recovery), "seconds": recovery.seconds} for recovery in result.recoveries]
    return {**asdict(result), "recoveries": recoveries, "whole": result.whole, "goodput": goodput(result.seconds)}


def audit_table(result: Audit) -> Group:
    """Findings, time by category, and each recovery by phase."""
    findings = Table(box=box.SIMPLE_HEAD, title="Every committed step, once and in order", title_justify="left")
    findings.add_column("checked")
    findings.add_column("steps", justify="right")
    findings.add_column("which")
    findings.add_row(
        "committed", f"{result.committed:,}", f"{result.sequences:,} sequences, {result.attempts} attempts"
    )
    for name, steps in (
        ("lost", result.lost),
        ("doubled", result.doubled),
        ("in another order", result.misordered),
        ("other tokens than packed", result.changed),
    ):
        style = "bold red" if steps else None
        findings.add_row(name, f"{len(steps):,}", ", ".join(map(str, steps[:SHOWN])), style=style)
    findings.add_row("redone", f"{result.redone:,}", "before any checkpoint contained them", style="dim")
    return Group(findings, _time_table(result), *([_recovery_table(result)] if result.recoveries else []))


def timeline_plot(lines: Sequence[Line], counting: set[int]) -> bytes:
    """A PNG over wall time: loss (steps that were redone in grey), world size, and disturbances as vertical lines."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, world = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    begin = lines[0].time
    steps = [(number, line) for number, line in enumerate(lines) if isinstance(line, StepRecord)]
    for label, colour, chosen in (
        ("committed", BLUE, [line for number, line in steps if number in counting]),
        ("redone or not yet committed", GREY, [line for number, line in steps if number not in counting]),
    ):
        if chosen:
            times, losses = [line.time - begin for line in chosen], [line.loss for line in chosen]
            loss.plot(times, losses, ".", markersize=3, color=colour, label=label)
    sizes = _world_sizes(lines)
    world.step([time - begin for time, _ in sizes], [size for _, size in sizes], where="post", color=BLUE)
    for line in lines[1:]:
        if isinstance(line, Event) and line.event in DISTURBANCES:
            for axes in (loss, world):
                axes.axvline(line.time - begin, color=RED, linewidth=0.8, alpha=0.5)
    loss.plot([], [], color=RED, linewidth=0.8, alpha=0.5, label="disturbance")
    loss.set_ylabel("loss (nats a token)")
    loss.legend(frameon=False, fontsize=8)
    world.set_ylabel("workers")
    world.set_xlabel("seconds since the first start")
    world.set_ylim(bottom=0)
    world.yaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, world):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _world_sizes(lines: Sequence[Line]) -> list[tuple[float, int]]:
    """(time, workers in training) at each change, and at the end."""
    sizes = [(lines[0].time, 0)]
    for line in lines:
        if isinstance(line, Event) and line.event == "start":
            sizes.append((line.time, line.details["world_size"]))
        elif isinstance(line, Event) and line.event in INTERRUPTIONS:
            sizes.append((line.time, 0))
    return [*sizes, (lines[-1].time, sizes[-1][1])]


def _time_table(result: Audit) -> Table:
    whole = sum(result.seconds.values())
    title = f"{whole:,.0f} s from the first line to the last, goodput {goodput(result.seconds):.1%}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("time went to")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for category, seconds in result.seconds.items():
        if seconds:
            table.add_row(category.replace("_", " "), f"{seconds:,.1f}", f"{seconds / max(whole, 1e-9):.1%}")
    return table


def _recovery_table(result: Audit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Recoveries, seconds", title_justify="left")
    for name in ("cause", "goes on from step", "redone", "detect", "schedule", "restore", "first step", "in all"):
        table.add_column(name, justify="left" if name == "cause" else "right")
    for one in result.recoveries:
        phases = (one.detect, one.schedule, one.restore, one.first_step, one.seconds)
        cause = Text(one.cause[:40])
        table.add_row(cause, f"{one.step:,}", f"{one.redone:,}", *(f"{seconds:.1f}" for seconds in phases))
    return table
