"""The table, its plots and each question as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sglang_dynasor.bench.chart import charts
from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.table import Table, shown
from sglang_dynasor.bench.ways import Asking

SHOWN_CHARS = 160  # of a question
STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66727f; --line: #d8dee5; --paper: #fff; --stock: #8b95a1; --program: #1f7a8c; --greedy: #c77d1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #98a4b1; --line: #37414d; --paper: #161b22; --program: #4fb3c6; --greedy: #e0a458; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; } .verdict { font-size: 1.15rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text { white-space: normal; text-align: left; }
ul { color: var(--soft); padding-left: 1.2rem; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } .plots div { flex: 1 1 26rem; }
svg { width: 100%; } svg text { fill: var(--soft); font-size: 10px; } svg .grid { stroke: var(--line); } svg .mark { stroke: var(--ink); stroke-width: 2; }
.stock { fill: var(--stock); stroke: var(--stock); } .program { fill: var(--program); stroke: var(--program); } .greedy { fill: var(--greedy); stroke: var(--greedy); }
""".strip()


def page(
    table: Table, measured: Measured, asking: Asking, said: str, notes: Sequence[str], about: Mapping[str, object]
) -> str:
    """The page.

    Args:
        said: the verdict.
        about: what was run, by name.
    """
    rows = shown(table)
    plots = "".join(f"<div><h2>{escape(title)}</h2>{svg}</div>" for title, svg in charts(table))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>sglang-dynasor bench</title>',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
            f"<h1>sglang-dynasor bench: {escape(str(about.get('model', '')))}</h1>",
            f'<p class="verdict">{escape(said[:1].upper() + said[1:])}.</p>',
            f'<div class="wide">{_table(rows)}</div>',
            f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>",
            f'<div class="plots">{plots}</div>',
            f"<h2>Run</h2>{_table([{'setting': name, 'value': value} for name, value in about.items()])}",
            f"<details><summary>Questions</summary><div class='wide'>{_questions(table, measured, asking)}</div></details>",
            "</body></html>",
            "",
        ]
    )


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _questions(table: Table, measured: Measured, asking: Asking) -> str:
    """Each question with every way's answer and tokens; a tick where it is right."""
    names = [line.way.name for line in table.lines]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("question", "text", "gold", *names))
    rows: list[str] = []
    for place, id in enumerate(table.ids):
        question, gold = measured.questions[id], asking.gold_key(measured.questions[id])
        text = question.text if len(question.text) <= SHOWN_CHARS else question.text[:SHOWN_CHARS] + "…"
        cells = [
            f"<td>{escape(id)}</td>",
            f'<td class="text">{escape(text)}</td>',
            f"<td>{escape(question.gold or '')}</td>",
        ]
        for line in table.lines:
            tokens = f"{line.each_tokens[place]:,.0f}"
            solved = None if line.way.is_replayed else measured.solved[id][line.way.way]
            answer = "" if solved is None else (solved.keys[0] or "none")[:24]
            tick = " ✓" if solved is not None and gold is not None and solved.share(gold) else ""
            cells.append(f"<td>{escape(answer)}{tick} <small>{tokens}</small></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
