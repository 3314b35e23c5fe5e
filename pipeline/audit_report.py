"""What an audit looks like to its reader: a table for the terminal, JSON for programs, a timeline plot."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from upath import UPath

from pipeline.audit import Audit, counting_steps
from pipeline.ledger import Event, StepRecord, read_ledger
from pipeline.storage import write_atomic, write_json
from pipeline.timeline import PHASES, Line, goodput, goodput_at, percentiles

BLUE, GREY, RED = "#1f6fb4", "#b0b0b0", "#c0392b"
INTERRUPTIONS = ("failure", "resize", "driver")
DISTURBANCES = (*INTERRUPTIONS, "notice")
SHOWN = 20  # steps that a finding names at most, and recoveries that are listed
HOUR = 3600.0


def write_report(run_folder: UPath, result: Audit) -> UPath:
    """Writes `audit/audit.json` and `audit/timeline.png`; returns their folder."""
    numbered = list(read_ledger(run_folder))
    write_json(run_folder / "audit" / "audit.json", audit_json(result))
    plot = timeline_plot([line for _, line in numbered], counting_steps(numbered, result.committed))
    write_atomic(run_folder / "audit" / "timeline.png", plot)
    return run_folder / "audit"


def audit_json(result: Audit) -> dict[str, Any]:
    """The content of `audit/audit.json`."""
    wall = sum(result.seconds.values())
    return {
        **asdict(result),
        "recoveries": [{**asdict(recovery), "seconds": recovery.seconds} for recovery in result.recoveries],
        "recovery_percentiles": percentiles(result.recoveries),
        "whole": result.whole,
        "goodput": goodput(result.seconds),
        "mean_seconds_between_disturbances": wall / len(result.recoveries) if result.recoveries else None,
        "goodput_at_one_disturbance_an_hour": goodput_at(HOUR, result.seconds, result.lost_per_disturbance),
    }


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
    redone = f"of {result.trained:,} trained, before any checkpoint contained them"
    findings.add_row("redone", f"{result.redone:,}", redone, style="dim")
    parts: list[RenderableType] = [findings, _time_table(result)]
    if result.holder:
        parts.insert(1, Text(f" {result.holder} is working on this run: what has no checkpoint yet does not count\n"))
    if result.recoveries:
        parts += [_hourly(result), _recovery_table(result)]
    return Group(*parts)


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
            table.add_row(category.replace("_", " ").lower(), f"{seconds:,.1f}", f"{seconds / max(whole, 1e-9):.1%}")
    return table


def _hourly(result: Audit) -> Text:
    apart, lost = sum(result.seconds.values()) / len(result.recoveries), result.lost_per_disturbance
    hourly = goodput_at(HOUR, result.seconds, lost)
    return Text(
        f" a disturbance every {apart:,.0f} s cost {lost:.1f} s; at one an hour, goodput would be {hourly:.1%}\n"
    )


def _recovery_table(result: Audit) -> Table:
    shown = result.recoveries[-SHOWN:]
    count = f"the last {len(shown)} of {len(result.recoveries)}" if len(shown) < len(result.recoveries) else "all"
    table = Table(box=box.SIMPLE_HEAD, title=f"Recoveries ({count}), seconds", title_justify="left")
    for name in ("cause", "goes on from step", "redone", "detect", "schedule", "restore", "first step", "in all"):
        table.add_column(name, justify="left" if name == "cause" else "right")
    for one in shown:
        phases = (f"{getattr(one, phase):.1f}" for phase in PHASES)
        table.add_row(Text(one.cause[:40]), f"{one.step:,}", f"{one.redone:,}", *phases, end_section=one is shown[-1])
    of_all = percentiles(result.recoveries)
    for name in ("p50", "p95"):
        table.add_row(f"{name} of all", "", "", *(f"{of_all[phase][name]:.1f}" for phase in PHASES))
    return table
