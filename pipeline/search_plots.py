"""Plots of a search: quality against throughput, and what each setting does."""

import io
from collections.abc import Sequence
from math import isfinite
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.config import Config
from pipeline.search_space import Parameter
from pipeline.search_trials import TrialRecord, pareto_front, shown

BLUE, GREY = "#1f6fb4", "#a8a8a8"
CAPTIONS = {
    "pareto": "Held-out loss against throughput; the line joins trials that no other beats in both",
    "effects": "Held-out loss against each setting; grey trials were stopped early, at fewer tokens",
}


def plots(config: Config, records: Sequence[TrialRecord]) -> dict[str, Figure]:
    """`pareto` and `effects`, where there is something to plot."""
    known = [record for record in records if isfinite(record.loss)]
    figures = {"pareto": _pareto_plot(known), "effects": _effects_plot(config, known)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def image(figure: Figure, kind: str) -> bytes:
    """A figure as a file: kind `png`, or `svg`, from its `<svg` tag on, to stand in a page."""
    file = io.BytesIO()
    figure.savefig(file, format=kind)
    data = file.getvalue()
    return data[data.index(b"<svg") :] if kind == "svg" else data


def _pareto_plot(records: Sequence[TrialRecord]) -> Figure | None:
    timed = [record for record in records if record.throughput is not None]
    if not timed:
        return None
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = pareto_front(timed)
    axes.plot(*_points(front), color=BLUE, linewidth=1, alpha=0.6)
    for label, colour, chosen in _kinds(timed):
        axes.plot(*_points(chosen), "o", markersize=6, color=colour, label=label)
    for record, point in zip(timed, zip(*_points(timed), strict=True), strict=True):
        axes.annotate(str(record.number), point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens/s")
    _finish(axes)
    return figure


def _points(records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    return [record.throughput or 0.0 for record in records], [record.loss for record in records]


def _effects_plot(config: Config, records: Sequence[TrialRecord]) -> Figure | None:
    keys = [key for key in config.search.space if any(key in record.settings for record in records)]
    if not keys:
        return None
    rows = -(-len(keys) // 3)
    figure = Figure(figsize=(3.6 * min(3, len(keys)), 3.2 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(keys):
        axes = figure.add_subplot(rows, min(3, len(keys)), number + 1)
        _effect(axes, key, config.search.space[key], [record for record in records if key in record.settings])
    return figure


def _effect(axes: Axes, key: str, parameter: Parameter, records: Sequence[TrialRecord]) -> None:
    """One setting: a dot a trial; of choices also the median of those that finished."""
    choices = parameter.choice
    position = (lambda value: choices.index(value)) if choices is not None else float
    for label, colour, chosen in _kinds(records):
        places = [position(record.settings[key]) for record in chosen]
        axes.plot(places, [r.loss for r in chosen], "o", markersize=5, alpha=0.8, color=colour, label=label)
    if choices is not None:
        axes.set_xticks(range(len(choices)), [shown(choice) for choice in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
        for place, choice in enumerate(choices):
            losses = [r.loss for r in records if r.status == "finished" and r.settings[key] == choice]
            if losses:
                axes.hlines(median(losses), place - 0.25, place + 0.25, color=BLUE, linewidth=2)
    elif parameter.log_uniform:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    _finish(axes)


def _kinds(records: Sequence[TrialRecord]) -> list[tuple[str, str, list[TrialRecord]]]:
    finished = [record for record in records if record.status == "finished"]
    others = [record for record in records if record.status != "finished"]
    kinds = [("stopped early", GREY, others), ("finished", BLUE, finished)]
    return [kind for kind in kinds if kind[2]]


def _finish(axes: Axes) -> None:
    axes.set_ylabel("eval/loss (nats a token)")
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
