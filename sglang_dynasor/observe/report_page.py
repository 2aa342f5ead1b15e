"""A report as one HTML page that needs nothing else, and as a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from time import gmtime, strftime

from sglang_dynasor.errors import quoted
from sglang_dynasor.observe.entry import OUTCOMES, Entry
from sglang_dynasor.observe.report import NONE, Report, Sum
from sglang_dynasor.sheet import Html, bar_of, page_of, table_of, tag

# The class that gives an outcome its colour.
_KINDS = {"certain": "sure", "price": "sure", "cap": "whole", "deadline": "late", "budget": "late", "operator": "late"}
_LOST = "lost"
_MEANINGS = {
    "sure": "certain, price",
    "whole": "cap",
    "late": "deadline, budget, operator",
    _LOST: "aborted, failed, others",
}
MOST_ADVICE = 30
STYLE = """
.bar { width: 10rem; height: .7rem; display: block; } .sure { fill: var(--program); background: var(--program); } .whole { fill: var(--stock); background: var(--stock); }
.late { fill: var(--greedy); background: var(--greedy); } .lost { fill: var(--wrong); background: var(--wrong); }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; } .figures div { display: flex; flex-direction: column; }
.figures b { font-size: 1.3rem; } .figures small, .key, .note { color: var(--soft); } .key i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
body { max-width: 84rem; } .wide { margin-bottom: 1.2rem; } td { vertical-align: top; } .bar { margin-top: .4rem; }
td.text { overflow-wrap: anywhere; min-width: 8rem; } td.text:last-child { min-width: 18rem; }
""".strip()


def page(report: Report, files: Sequence[str]) -> str:
    """The page.

    Args:
        files: that were read, by name.
    """
    parts = [
        tag("p", period(report), kind="note"),
        _figures(report),
        *_suggestions(report),
        tag("h2", "How programs ended"),
        table_of(_outcomes(report.all)),
        tag("h2", "Where tokens went"),
        tag("p", *(Html(f'<i class="{kind}"></i>{meaning}') for kind, meaning in _MEANINGS.items()), kind="key"),
    ]
    for name, group in report.groups.items():
        is_compared = name in ("model", "endpoint")  # else it is one line, the same as all
        if group and (name == "algorithm" or (len(group) > 1 if is_compared else set(group) != {NONE})):
            parts.append(table_of(_groups(name, group), (name,)))
    parts += [
        tag("h2", "Slowest"),
        _programs(report.slowest.entries(), "No line says how long a program took."),
        tag("h2", "Least certain"),
        _programs(report.unsurest.entries(), "No program was answered."),
        tag("h2", "Read"),
        tag("ul", *(tag("li", note) for note in [*notes(report), *(f"from {file}" for file in files)])),
    ]
    return page_of("sglang-dynasor report", parts, STYLE)


def summary(report: Report) -> list[str]:
    """The report in a few lines of text. What was sent stands in them as Python would write it: nothing in it steers a terminal."""
    lines = [period(report)]
    lines += [f"{name}: {value}" + (f" ({note})" if note else "") for name, value, note in figures(report)]
    lines += [f"- {note}" for note in notes(report)]
    found = report.advice()
    for each in found[:5]:
        lines.append(f"try {each.setting} = {each.value} for {quoted(each.kind.label)}: {each.why}")
    if len(found) > 5:
        lines.append(f"{len(found) - 5} more suggestions are in the page")
    return lines


def period(report: Report) -> str:
    """From when until when."""
    if not report.all.num_programs:
        return "no programs"
    if not report.last_at:
        return "no line says when"
    first, last = (strftime("%Y-%m-%d %H:%M:%S", gmtime(min(at, 2**37))) for at in (report.first_at, report.last_at))
    return f"programs that were over from {first} to {last}, UTC"


def figures(report: Report) -> list[tuple[str, str, str]]:
    """What is told first: names, values and how they are meant."""
    sums = report.all
    whole = sums.num_tokens + sums.num_tokens_saved
    return [
        ("programs", f"{sums.num_programs:,}", f"{sums.outcomes['certain']:,} certain before their cap"),
        ("tokens generated", f"{sums.num_tokens:,}", ""),
        ("tokens saved", f"{sums.num_tokens_saved:,}", f"an estimate: {_share(sums.num_tokens_saved, whole)} of what whole caps would take"),
        ("branches", f"{sums.num_branches:,}", f"{sums.num_branches_saved:,} of {sums.cap:,} saved"),
        ("seconds, median", _seconds(sums.seconds.quantile(0.5)) if sums.seconds.num else "–", "about"),
    ]  # fmt: skip


def notes(report: Report) -> list[str]:
    """What was read, what was not, and what is counted otherwise than one may think."""
    sums = report.all
    found = [f"{report.num_lines:,} lines"]
    told = {
        "could not be read: cut, or no lines of a program": report.num_unreadable,
        "are of a version that this one does not know, and were left out: use a newer sglang-dynasor": report.num_unknown,
    }
    found += [f"{num:,} of them {what}" for what, num in told.items() if num]
    if sums.num_extra_tokens:
        found.append(f"probes, judges and comparisons took {sums.num_extra_tokens:,} tokens beside those generated")
    if sums.num_prompt_tokens:
        found.append(f"prompts had {sums.num_prompt_tokens:,} tokens, each counted once")
    if sums.num_client_s:
        found.append(
            f"of {sums.num_client_s:,} programs clients sent the branches; /dynasor/status does not count these"
        )
    if report.num_unlooked:
        found.append(f"{report.num_unlooked:,} programs had yet other settings, and were not looked at for suggestions")
    found.append("who was sure, or priced out, has saved something; who was cut by time, budget or a person has not")
    return found


def _figures(report: Report) -> Html:
    told = (
        tag("div", tag("small", name), tag("b", value), tag("small", note)) for name, value, note in figures(report)
    )
    return tag("div", *told, kind="figures")


def _suggestions(report: Report) -> list[Html]:
    found = report.advice()
    rows = [
        {"setting": each.setting, "value": each.value, "of": each.kind.label, "their tokens": f"{each.num_tokens:,}", "because": each.why}
        for each in found[:MOST_ADVICE]
    ]  # fmt: skip
    none = "Nothing stands out, or too few programs have the same settings."
    left = [tag("p", f"{len(found) - MOST_ADVICE} more.", kind="note")] if len(found) > MOST_ADVICE else []
    return [tag("h2", "What to change"), table_of(rows, ("of", "because")) if rows else tag("p", none), *left]


def _outcomes(sums: Sum) -> list[dict[str, object]]:
    return [
        {
            "outcome": outcome,
            "programs": f"{sums.outcomes[outcome]:,}",
            "%": _share(sums.outcomes[outcome], sums.num_programs),
            "tokens": f"{sums.tokens[outcome]:,}",
            "of all tokens": bar_of([(_KINDS.get(outcome, _LOST), sums.tokens[outcome])], sums.num_tokens),
        }
        for outcome in OUTCOMES
        if sums.outcomes[outcome]
    ]


def _groups(name: str, group: dict[str, Sum]) -> list[dict[str, object]]:
    most = max(sums.num_tokens for sums in group.values())
    rows: list[dict[str, object]] = []
    for label, sums in sorted(group.items(), key=lambda pair: -pair[1].num_tokens):
        parts = [(_KINDS.get(outcome, _LOST), float(sums.tokens[outcome])) for outcome in OUTCOMES]
        rows.append(
            {
                name: label,
                "tokens": f"{sums.num_tokens:,}",
                "by outcome": bar_of(parts, most),
                "programs": f"{sums.num_programs:,}",
                "tokens each": f"{sums.num_tokens / sums.num_programs:,.0f}",
                "saved, estimate": _share(sums.num_tokens_saved, sums.num_tokens + sums.num_tokens_saved),
                "branches each": f"{sums.num_branches / sums.num_programs:.1f} of {sums.cap / sums.num_programs:.1f}",
                "certain": _share(sums.outcomes["certain"], sums.num_programs),
                "certaindex": f"{sums.certaindex.mean:.2f}" if sums.certaindex.num else "–",
                "median s": _seconds(sums.seconds.quantile(0.5)) if sums.seconds.num else "–",
                "p95 s": _seconds(sums.seconds.quantile(0.95)) if sums.seconds.num else "–",
            }
        )
    return rows


def _programs(entries: list[Entry], none: str) -> Html:
    if not entries:
        return tag("p", none)
    has_prompts = any(entry.prompt for entry in entries)
    rows: list[dict[str, object]] = []
    for entry in entries:
        row: dict[str, object] = {
            "program": entry.program,
            "s": "–" if entry.took_s is None else _seconds(entry.took_s),
            "certaindex": "–" if entry.certaindex is None else f"{entry.certaindex:.2f}",
            "answer": entry.answer,
            "outcome": entry.outcome,
            "branches": f"{entry.num_branches} of {entry.cap}",
            "tokens": f"{entry.num_tokens:,}",
            "tenant": entry.tenant,
            "settings": entry.template or f"{entry.algorithm}, {entry.stop_rule}",
        }
        rows.append(row | {"prompt": entry.prompt} if has_prompts else row)
    return table_of(rows, ("program", "answer", "tenant", "settings", "prompt"))


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
