"""The table, its plots and each question as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_dynasor.bench.chart import charts
from sglang_dynasor.bench.run import Measured
from sglang_dynasor.bench.table import Table, shown
from sglang_dynasor.bench.ways import Asking
from sglang_dynasor.sheet import Html, page_of, table_of, tag

SHOWN_CHARS = 160  # of a question
STYLE = """
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } .plots div { flex: 1 1 26rem; }
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
    plots = (tag("div", tag("h2", title), Html(svg)) for title, svg in charts(table))
    parts = [
        tag("p", f"{said[:1].upper()}{said[1:]}.", kind="verdict"),
        table_of(shown(table)),
        tag("ul", *(tag("li", note) for note in notes)),
        tag("div", *plots, kind="plots"),
        tag("h2", "Run"),
        table_of([{"setting": name, "value": value} for name, value in about.items()]),
        tag("details", tag("summary", "Questions"), table_of(_questions(table, measured, asking), ("text",))),
    ]
    return page_of(f"sglang-dynasor bench: {about.get('model', '')}", parts, STYLE)


def _questions(table: Table, measured: Measured, asking: Asking) -> list[dict[str, object]]:
    """Each question with every way's answer and tokens; a tick where it is right."""
    rows: list[dict[str, object]] = []
    for place, id in enumerate(table.ids):
        question, gold = measured.questions[id], asking.gold_key(measured.questions[id])
        text = question.text if len(question.text) <= SHOWN_CHARS else question.text[:SHOWN_CHARS] + "…"
        row: dict[str, object] = {"question": id, "text": text, "gold": question.gold or ""}
        for line in table.lines:
            solved = None if line.way.is_replayed else measured.solved[id][line.way.way]
            answer = "" if solved is None else (solved.keys[0] or "none")[:24]
            tick = " ✓" if solved is not None and gold is not None and solved.share(gold) else ""
            row[line.way.name] = tag("span", f"{answer}{tick} ", tag("small", f"{line.each_tokens[place]:,.0f}"))
        rows.append(row)
    return rows
