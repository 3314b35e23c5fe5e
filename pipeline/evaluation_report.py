"""What an evaluation looks like to its reader: tables for the terminal, a plot for the run's folder."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.table import Table

Row = dict[str, Any]
COLOURS = ("#9a9a9a", "#d98c3f", "#1f6fb4")  # from the first model, a mere reference, to the trained one
WIDE_RANGE = 5  # perplexities further apart than this factor are drawn on a logarithmic axis


def perplexity_table(rows: list[Row]) -> Table:
    """Perplexity of each model at each length, over whole windows and over their last 256 tokens, with token counts.

    rows: as in `perplexity.json`.
    """
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows))
    cell = {(row["model"], row["length"]): row for row in rows}
    table = Table(title="Perplexity on held-out documents (dense attention)", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("context")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for title, key in (("whole window", "perplexity"), ("last 256 tokens", "perplexity_last256")):
        table.add_row(f"[bold]{title}")
        for name in names:
            values = [f"{cell[name, length][key]:.2f}" for length in lengths]
            table.add_row(f"  {name}", *values, style="bold blue" if name == names[-1] else None)
        counts = [_targets(cell[names[0], length], key) for length in lengths]
        table.add_row("  tokens", *[f"{count:,}" for count in counts], style="dim", end_section=True)
    return table


def _targets(row: Row, key: str) -> int:
    """Predictions that a perplexity is over: each window gives its length, or the last 256 of it."""
    return row["tokens"] if key == "perplexity" else row["tokens"] // row["length"] * min(256, row["length"])


def context_table(rows: list[Row], blocks: int, block_tokens: int) -> Table:
    """Loss of each model with each context, and its difference to the shortest; rows as in `context_use.json`."""
    table = Table(
        title=f"Loss on the same {blocks} blocks of {block_tokens} tokens, with more context",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    shortest = min(row["context"] for row in rows)
    for header in ("model", "context", "loss (nats)", f"less that with {shortest:,}", "95 % interval"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for row in rows:
        low, high = row["interval95"]
        compared = row["context"] != shortest
        table.add_row(
            row["model"],
            f"{row['context']:,}",
            f"{row['loss']:.4f}",
            f"{row['difference']:+.4f}" if compared else "",
            f"{low:+.4f} … {high:+.4f}" if compared else "",
        )
    return table


def perplexity_plot(rows: list[Row], native_length: int) -> bytes:
    """A PNG of whole-window perplexity against context length, one line a model; rows as in `perplexity.json`.

    native_length, the context of the base, is marked.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["model"] for row in rows))
    for name, colour in zip(names, COLOURS[-len(names) :], strict=True):
        points = sorted((row["length"], row["perplexity"]) for row in rows if row["model"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=2, color=colour, label=name)
    values, lengths = [row["perplexity"] for row in rows], sorted({row["length"] for row in rows})
    if max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    if native_length < lengths[-1]:
        axes.axvline(native_length, color="#bbbbbb", linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            "context of the base",
            (native_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=8,
            color="#888888",
        )
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity, whole window")
    axes.set_title("Perplexity on held-out documents, dense attention", fontsize=11, loc="left")
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
