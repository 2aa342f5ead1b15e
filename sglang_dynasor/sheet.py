"""One HTML page that needs nothing else: its frame, its style, tables and bars. Whatever is not `Html` is text, and is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

# Light and dark, on a phone and on paper.
STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66727f; --line: #d8dee5; --paper: #fff; --stock: #8b95a1; --program: #1f7a8c; --greedy: #c77d1f; --wrong: #b3423f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #98a4b1; --line: #37414d; --paper: #161b22; --program: #4fb3c6; --greedy: #e0a458; --wrong: #e07a75; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; } .verdict { font-size: 1.15rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; } td.text { white-space: normal; }
ul { color: var(--soft); padding-left: 1.2rem; }
""".strip()
# Nothing is loaded and nothing runs, whatever stands in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Html(str):
    """Markup of ours, in which all that is not ours has been escaped."""

    __slots__ = ()


def text_of(value: object) -> Html:
    """A value as it may stand in a page."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def page_of(title: str, parts: Iterable[Html], style: str = "") -> str:
    """A whole page.

    Args:
        title: of the page and of the browser's tab.
        style: beside STYLE.
    """
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{text_of(title)}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}\n{style}</style></head><body>',
            f"<h1>{text_of(title)}</h1>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def tag(name: str, *inner: object, kind: str = "") -> Html:
    """An element with what is in it; `kind` is its class."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{attribute}>{''.join(map(text_of, inner))}</{name}>")


def table_of(rows: Sequence[Mapping[str, object]], texts: Sequence[str] = ()) -> Html:
    """A table; its columns are the first row's keys, those named in `texts` are prose. Empty where there are no rows."""
    if not rows:
        return Html("")
    kinds = {name: "text" if name in texts else "" for name in rows[0]}
    head = "".join(tag("th", name, kind=kind) for name, kind in kinds.items())
    body = "".join(tag("tr", *(tag("td", cell, kind=kinds[name]) for name, cell in row.items())) for row in rows)
    return Html(
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def bar_of(parts: Iterable[tuple[str, float]], whole: float) -> Html:
    """A bar as wide as its column, of parts side by side; a part is the class that gives its colour and its size, of `whole`."""
    left, drawn = 0.0, ""
    for kind, size in parts:
        wide = 100 * size / whole if whole > 0 else 0.0
        drawn += f'<rect class="{kind}" x="{left:.2f}" y="0" width="{wide:.2f}" height="1"/>' if wide else ""
        left += wide
    return Html(f'<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>')
