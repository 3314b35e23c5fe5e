"""HTML pages that need nothing beside them: no network, no other file."""

from collections.abc import Sequence
from html import escape

# Nothing may be loaded or run: that holds even if a text got past the escaping.
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
tr.marked { font-weight: 600; color: #1f6fb4 }
figure { margin: 2rem 0 } figcaption { color: #666 }
svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A page of HTML parts. Only `title` is escaped here."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n{HEAD}'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], marked: bool = False) -> str:
    """A table of texts; with `marked` its first row stands out."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        f"<tr{' class=marked' if marked and not number else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def figure_html(svg: str, caption: str) -> str:
    """A picture, from its `<svg` tag on, over its caption."""
    return f'<figure role="img" aria-label="{escape(caption)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
