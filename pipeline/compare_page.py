"""A comparison as one HTML page that needs nothing beside it. Every text from a run is escaped."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from html import escape
from math import isfinite
from string import Template

from pipeline.compare_plots import Plot, colour, dashes, plots, svg
from pipeline.compare_report import remarks, shortened
from pipeline.compare_values import Column, ComparedRun, columns, differing, labels, partial

STYLE = """
:root { --ink: #1c2530; --soft: #5b6673; --line: #dfe3e8; --tint: #f6f8fa; --best: #0a6640; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 2rem 1.5rem 4rem; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .3rem 0; }
.soft, figcaption small { color: var(--soft); }
.scroll { position: relative; overflow-x: auto; margin-top: 1.25rem; border: 1px solid var(--line);
          border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
tbody tr:hover > * { background: var(--tint); }
thead th, thead td { min-width: 6.5rem; background: var(--tint); font-weight: 600; vertical-align: bottom; }
thead .group { text-align: left; color: var(--soft); font-weight: 400; font-size: .85rem; padding-bottom: 0;
               border-bottom: 0; }
th:first-child, td.status { text-align: left; }
th:first-child { position: sticky; left: 0; min-width: 11rem; }
tbody th { font-weight: 500; background: #fff; }
.first { border-left: 1px solid var(--line); }
td div { max-width: 22rem; max-height: 6em; overflow: auto; overflow-wrap: anywhere; margin-left: auto; }
.best { font-weight: 700; color: var(--best); }
.none { color: #8a949f; }
.child { padding-left: 1.9rem; }
button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
         text-align: inherit; }
button:hover { text-decoration: underline; }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 1rem;
          padding: .6rem 0; background: #fffffff0; border: 0; border-bottom: 1px solid var(--line); max-height: 9rem;
          overflow-y: auto; }
.legend label { display: inline-flex; align-items: center; gap: .4rem; cursor: pointer; overflow-wrap: anywhere; }
.swatch { width: 26px; height: 10px; flex: none; }
tbody .swatch { margin-right: .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 1.25rem; }
figure { margin: 0; padding: .9rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: .4rem; overflow-wrap: anywhere; }
figcaption small { display: block; font-weight: 400; }
figure svg { width: 100%; height: auto; display: block; }
.faded { opacity: .15; } .hidden { display: none; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media print { .legend { position: static; } figure { break-inside: avoid; } }
"""

SCRIPT = """
const table = document.getElementById("runs"), body = table.tBodies[0];
const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
for (const button of table.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, down = head.ariaSort === "ascending";
  for (const other of table.querySelectorAll("thead [aria-sort]")) other.removeAttribute("aria-sort");
  head.ariaSort = down ? "descending" : "ascending";
  const compare = (one, two) => {
    const a = key(one, column), b = key(two, column);
    if (a === "" || b === "") return (a === "") - (b === "");  // runs without a value come last, both ways
    const numbers = isFinite(a) && isFinite(b);
    return (down ? -1 : 1) * (numbers ? a - b : a.localeCompare(b));
  };
  body.append(...[...body.rows].sort(compare));
});
const lines = run => document.querySelectorAll(`.plots [id$="-run-${run}"]`);
const all = document.querySelectorAll('.plots [id*="-run-"]');
for (const entry of document.querySelectorAll("[data-run]")) {
  const run = entry.dataset.run, box = entry.querySelector("input");
  box?.addEventListener("change", () => lines(run).forEach(line => line.classList.toggle("hidden", !box.checked)));
  entry.addEventListener("mouseenter", () => {
    all.forEach(line => line.classList.add("faded"));
    lines(run).forEach(line => line.classList.remove("faded"));
  });
  entry.addEventListener("mouseleave", () => all.forEach(line => line.classList.remove("faded")));
}
"""

# Nothing may be loaded, and only this script may run: that holds even if a run's text got past the escaping.
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{SCRIPT_HASH}'"

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="soft">$origin</p>
</header>
<main>
$table
$remarks
$plots
$partial
</main>
<script>$script</script>
</body>
</html>
""")


def comparison_page(runs: Sequence[ComparedRun], chosen: Sequence[str], origin: str, made: datetime) -> str:
    """The whole page. origin: where the runs are from."""
    drawn = plots(runs, chosen)
    return PAGE.substitute(
        policy=escape(POLICY),
        title=f"Comparison of {len(runs)} runs" if len(runs) > 1 else "One run",
        style=STYLE,
        script=SCRIPT,
        origin=escape(f"{origin} · {made:%Y-%m-%d %H:%M %Z}"),
        table=_table(runs, differing(runs), columns(runs, chosen), {run for plot in drawn for run in plot.lines}),
        remarks="".join(
            f'<p class="soft">{escape(line[:1].upper() + line[1:])}.</p>' for line in remarks(runs, chosen)
        ),
        plots=_plots(runs, drawn),
        partial=_partial(runs),
    )


def _table(
    runs: Sequence[ComparedRun], settings: dict[str, list[str | None]], metrics: Sequence[Column], drawn: set[int]
) -> str:
    groups = [(len(settings), "settings that differ"), (len(metrics), "metrics (best in bold)")]
    above = "".join(f'<th class="group first" scope="colgroup" colspan="{n}">{name}</th>' for n, name in groups if n)
    heads = ["run", *settings, *(column.title for column in metrics), "status"]
    first = {1, 1 + len(settings), len(heads) - 1}
    names = "".join(
        f'<th scope="col"{_first(n in first)}><button type="button">{escape(head).replace(".", ".<wbr>")}</button></th>'
        for n, head in enumerate(heads)
    )
    rows = "\n".join(_row(runs, number, settings, metrics, number in drawn) for number in range(len(runs)))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of runs"><table id="runs">'
        '<caption class="visually-hidden">Runs, settings and metrics; a click on a column sorts by it</caption>'
        f'<thead><tr><td class="group"></td>{above}<td class="group first"></td></tr><tr>{names}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(
    runs: Sequence[ComparedRun],
    number: int,
    settings: dict[str, list[str | None]],
    metrics: Sequence[Column],
    drawn: bool,
) -> str:
    run, known = runs[number], {run.run_id for run in runs}
    child = ' class="child"' if run.parent in known else ""
    swatch = _swatch(number) if drawn else ""
    cells = [
        f'<th scope="row" data-value="{escape(run.name)}"{child} title="{escape(run.run_id)}">'
        f"{swatch}{escape(labels(runs)[number])}</th>"
    ]
    for n, values in enumerate(settings.values()):
        cells.append(_setting(values[number], n == 0))
    for n, column in enumerate(metrics):
        cells.append(_metric(column, number, n == 0))
    return f'<tr data-run="{number}">{"".join(cells)}<td class="status first">{escape(run.status)}</td></tr>'


def _first(first: bool, also: str = "") -> str:
    classes = " ".join(filter(None, (also, "first" if first else "")))
    return f' class="{classes}"' if classes else ""


def _setting(value: str | None, first: bool) -> str:
    if value is None:
        return f'<td{_first(first, "none")} data-value="">–</td>'
    return f"<td{_first(first)}><div>{escape(value)}</div></td>"


def _metric(column: Column, run: int, first: bool) -> str:
    value, best = column.values[run], column.best(run)
    known = value if value is not None and isfinite(value) else ""
    mark = '<span class="visually-hidden"> (best)</span>' if best else ""
    return f'<td{_first(first, "best" if best else "")} data-value="{known}">{column.text(run)}{mark}</td>'


def _swatch(run: int) -> str:
    dashed = " ".join(map(str, dashes(run)))
    return (
        f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" stroke="{colour(run)}" '
        f'stroke-width="3" stroke-dasharray="{dashed or "none"}"/></svg>'
    )


def _plots(runs: Sequence[ComparedRun], drawn: Sequence[Plot]) -> str:
    if not drawn:
        return '<h2>Plots</h2><p class="soft">No run has a metric that could be drawn.</p>'
    names = labels(runs)
    shown = sorted({run for plot in drawn for run in plot.lines})
    entries = "".join(
        f'<label data-run="{run}"><input type="checkbox" checked>{_swatch(run)}{escape(shortened(names[run]))}</label>'
        for run in shown
    )
    figures = "\n".join(_figure(plot, number, names, shown) for number, plot in enumerate(drawn))
    return (
        '<h2>Plots</h2>\n<fieldset class="legend"><legend class="visually-hidden">Runs that are drawn</legend>'
        f'{entries}</fieldset>\n<div class="plots">\n{figures}\n</div>'
    )


def _figure(plot: Plot, number: int, names: Sequence[str], shown: Sequence[int]) -> str:
    absent = [shortened(names[run]) for run in shown if run not in plot.lines]
    without = f"<small>without {escape(_some(absent))}</small>" if absent else ""
    title = plot.title.split(" against ")[0] if plot.bars else plot.title
    return f"<figure><figcaption>{escape(title)}{without}</figcaption>{svg(plot, number, names)}</figure>"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} others"


def _partial(runs: Sequence[ComparedRun]) -> str:
    """Settings that some runs do not have; they may be hundreds, and are folded away."""
    settings = partial(runs)
    if not settings:
        return ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in labels(runs))
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(_setting(value, False) for value in values)}</tr>'
        for key, values in settings.items()
    )
    return (
        "<h2>Settings that only some of the runs have</h2>"
        f"<details><summary>{len(settings)} settings, equal in the runs that have them</summary>"
        f'<div class="scroll"><table><thead><tr><th scope="col">setting</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
