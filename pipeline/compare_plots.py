"""Overlays of runs: which plots their metrics allow, and each drawn as SVG, without a word from the runs in it."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from pipeline.compare_values import (
    EVALUATION_LOSS,
    GOODPUT,
    GPU_MEMORY,
    HOST_MEMORY,
    THROUGHPUT,
    TRAINING_LOSS,
    ComparedRun,
    Quantity,
    by_step,
    by_time,
    by_tokens,
    perplexities,
    scale,
)

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#555555")
"""Of the runs in turn: those of Okabe and Ito, which the colour-blind can tell apart; two darker ones for yellow."""
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2))
"""Of the runs after each turn of colours."""
WIDE_RANGE = 5  # values further apart than this factor are drawn on a logarithmic axis
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10}

Points = list[tuple[float, float]]
Axis = Literal["tokens", "steps", "time", "length"]
X_LABELS = {"tokens": "trained tokens", "steps": "steps", "length": "context length (tokens)"}


@dataclass(frozen=True)
class Plot:
    """Lines of several runs; or bars, where no run has more than one value."""

    title: str
    axis: Axis
    y_label: str
    lines: dict[int, Points]
    """Number of the run → points (x, y), ascending in x; time in seconds."""

    @property
    def bars(self) -> bool:
        return self.axis != "length" and all(len(points) == 1 for points in self.lines.values())


def colour(run: int) -> str:
    """Colour of a run's lines, by its number."""
    return COLOURS[run % len(COLOURS)]


def dashes(run: int) -> tuple[int, ...]:
    """Dashes and gaps of a run's lines, in points; empty for a whole line."""
    return DASHES[run // len(COLOURS) % len(DASHES)]


def plots(runs: Sequence[ComparedRun], chosen: Sequence[str] = ()) -> list[Plot]:
    """The plots that the runs' metrics allow, in the order of the page; one more for each metric that was chosen."""
    found = [
        *_over_progress(runs, "Training loss", "loss", TRAINING_LOSS.source),
        _over_time(runs, "Training loss", "loss", TRAINING_LOSS),
        *_over_progress(runs, "Evaluation loss", "loss", EVALUATION_LOSS.source),
        _perplexity(runs),
        *_over_progress(runs, "Throughput", "tokens/s", THROUGHPUT.source),
        _over_time(runs, "GPU memory of the fullest device", "GB", GPU_MEMORY),
        _over_time(runs, "Memory of the fullest node", "GB", HOST_MEMORY),
        _over_time(runs, "Goodput", "share of the time", GOODPUT),
    ]
    for metric in chosen:
        found += _over_progress(runs, metric, "", partial(_own, metric))
    return [plot for plot in found if plot.lines]


def _own(metric: str, run: ComparedRun) -> str | None:
    return metric if metric in run.histories else None


def _over_progress(
    runs: Sequence[ComparedRun], title: str, y_label: str, source: Callable[[ComparedRun], str | None]
) -> list[Plot]:
    """Against tokens the runs whose tokens are known; against steps all of them, if there are others."""
    metrics = {number: metric for number, run in enumerate(runs) if (metric := source(run)) is not None}
    tokens = {number: by_tokens(runs[number], metric) for number, metric in metrics.items()}
    known = {number: points for number, points in tokens.items() if points}
    found = [Plot(f"{title} against tokens", "tokens", y_label, known)]
    if len(known) < len(metrics):
        steps = {number: by_step(runs[number], metric) for number, metric in metrics.items()}
        stepped = {number: points for number, points in steps.items() if points}
        found.append(Plot(f"{title} against steps", "steps", y_label, stepped))
    return found


def _over_time(runs: Sequence[ComparedRun], title: str, y_label: str, quantity: Quantity) -> Plot:
    lines = {}
    for number, run in enumerate(runs):
        if (metric := quantity.source(run)) is not None and (points := by_time(run, metric)):
            lines[number] = [(time, value * scale(metric)) for time, value in points]
    return Plot(f"{title} against time", "time", y_label, lines)


def _perplexity(runs: Sequence[ComparedRun]) -> Plot:
    lines = {number: list(values.items()) for number, run in enumerate(runs) if (values := perplexities(run))}
    return Plot("Perplexity by context length", "length", "perplexity", lines)  # type: ignore[arg-type]


def svg(plot: Plot, number: int, labels: Sequence[str]) -> str:
    """The plot as an SVG element for a page. Its lines have ids `…-run-<number of the run>`.

    number: of the plot, which makes its ids unique in the page. labels: of the runs, for bars.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": str(number)}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _bars(axes, plot, labels) if plot.bars else _lines(axes, plot)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bec6")
        axes.tick_params(color="#b8bec6", labelcolor="#3d4650")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Title": plot.title})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>plot-{number}-", drawn)
    return drawn.replace("<svg ", '<svg role="img" ', 1)


def _lines(axes: Axes, plot: Plot) -> None:
    unit, unit_name = _time_unit(plot) if plot.axis == "time" else (1.0, "")
    for run, points in plot.lines.items():
        marker = "o" if plot.axis == "length" or len(points) <= 12 else None
        xs, ys = [x / unit for x, _ in points], [y for _, y in points]
        [line] = axes.plot(xs, ys, color=colour(run), linewidth=1.6, marker=marker, markersize=4, gid=f"run-{run}")
        if dashes(run):
            line.set_dashes(dashes(run))
    axes.set_xlabel(X_LABELS.get(plot.axis) or f"time since the run's first value ({unit_name})")
    axes.set_ylabel(plot.y_label)
    axes.grid(axis="y", color="#e6e9ed")
    axes.set_axisbelow(True)
    if plot.axis == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    elif plot.axis == "steps":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step == int(step) else ""))
    elif plot.axis == "length":
        lengths = sorted({x for points in plot.lines.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
    _value_axis(axes, plot)


def _value_axis(axes: Axes, plot: Plot) -> None:
    values = [y for points in plot.lines.values() for _, y in points]
    if plot.y_label == "share of the time":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    elif min(values) > 0 and max(values) > WIDE_RANGE * min(values) and plot.y_label in ("perplexity", "tokens/s"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif max(values) >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if plot.y_label in ("GB", "tokens/s") and axes.get_yscale() == "linear" and max(values) > 0:
        axes.set_ylim(0, 1.05 * max(values))


def _bars(axes: Axes, plot: Plot, labels: Sequence[str]) -> None:
    """One value a run: there is no line to draw, and nothing along its axis to tell."""
    for place, (run, [(_, value)]) in enumerate(plot.lines.items()):
        axes.barh(place, value, height=0.6, color=colour(run), gid=f"run-{run}")[0].set_gid(f"run-{run}")
        written = f"{value:.1%}" if plot.y_label == "share of the time" else f"{value:,.4g}"
        axes.annotate(written, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    names = [name if len(name := labels[run]) <= 24 else name[:23] + "…" for run in plot.lines]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 4) - 0.5, -0.5)  # the first on top; a few bars are not thicker than many
    axes.margins(x=0.15)
    axes.set_xlabel(plot.y_label)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e9ed")
    axes.set_axisbelow(True)


def _time_unit(plot: Plot) -> tuple[float, str]:
    """Seconds in the unit that suits the longest line, and its name."""
    longest = max(points[-1][0] for points in plot.lines.values())
    return next(
        (unit, name) for unit, name in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if longest >= 2 * unit or unit == 1
    )
