"""The page's plots, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from statistics import mean

from sglang_dynasor.bench.table import WIDE, Line, Table
from sglang_dynasor.bench.ways import STOCK

WIDTH, HEIGHT = 460, 280
LETTER = 5.9  # width of one, about
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 40
SHARES = ((0.0, 0.5, "below 50 %"), (0.5, 0.75, "50 to 74 %"), (0.75, 1.0, "75 to 99 %"), (1.0, 2.0, "all"))


def charts(table: Table) -> list[tuple[str, str]]:
    """Titles and pictures."""
    drawn = [
        (
            "Right answers in percent, by tokens of a question"
            if table.has_gold
            else "Agreement in percent, by tokens of a question",
            scatter(table),
        )
    ]
    drawn.append(("Seconds until the answer: mean, and p90 as a line", bars(table)))
    program = next((line for line in table.programs if line.way.width != WIDE), None)
    stock = table.line(STOCK)
    if stock is not None and program is not None:
        title = f"Tokens of a question, {stock.way.name} and {program.way.name}: by how many samples agree (number of questions)"
        drawn.append((title, by_vote(table, stock, program)))
    return [(title, svg) for title, svg in drawn if svg]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values, the first not above `low`, the last not below `high`."""
    rough = max(high - low, 1e-9) / 4
    size = 10 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = floor(low / step), ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def scatter(table: Table) -> str:
    """Each way with its intervals: tokens to the right, right answers upwards."""
    found = [(line, line.hits) for line in table.lines if line.hits is not None]
    if not found:
        return ""
    across = ticks(0, max(line.tokens for line, _ in found))
    up = ticks(max(0.0, min(hits.low for _, hits in found)), min(100.0, max(hits.high for _, hits in found)))

    def height(value: float) -> float:
        return _y(min(1.0, max(0.0, (value - up[0]) / (up[-1] - up[0]))))

    parts = _frame(
        [(x / across[-1], f"{x:,.0f}") for x in across], [((y - up[0]) / (up[-1] - up[0]), f"{y:g}") for y in up]
    )
    taken: list[tuple[float, float, float]] = []  # labels: from, to, and their line
    for line, hits in sorted(found, key=lambda pair: -pair[1].value):
        x, y, wide = _x(line.tokens / across[-1]), height(hits.value), LETTER * len(line.way.name)
        if hits.half is not None:
            parts.append(
                f'<line class="{kind(line)}" x1="{x:.1f}" x2="{x:.1f}" y1="{height(hits.low):.1f}" y2="{height(hits.high):.1f}"/>'
            )
        left = x + 8 if x + 8 + wide < WIDTH else x - 8 - wide
        label_y = y + 4
        while any(left < end and begin < left + wide and abs(label_y - at) < 11 for begin, end, at in taken):
            label_y += 11
        taken.append((left, left + wide, label_y))
        parts.append(f'<circle class="{kind(line)}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if label_y > y + 4:
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{left + (0 if left > x else wide):.1f}" y1="{y:.1f}" y2="{label_y - 3:.1f}"/>'
            )
        parts.append(f'<text x="{left:.1f}" y="{label_y:.1f}">{escape(line.way.name)}</text>')
    return _svg(parts)


def bars(table: Table) -> str:
    """Mean and p90 latency of each way of which they are known."""
    lines = [line for line in table.lines if line.mean_s is not None and line.p90_s is not None]
    if not lines:
        return ""
    up = ticks(0, max(max(line.p90_s or 0.0, line.mean_s or 0.0) for line in lines))
    parts = _frame([], [(y / up[-1], f"{y:g}") for y in up])
    room = 1 / len(lines)
    for place, line in enumerate(lines):
        left, right = _x((place + 0.2) * room), _x((place + 0.8) * room)
        top, mark = _y((line.mean_s or 0.0) / up[-1]), _y((line.p90_s or 0.0) / up[-1])
        parts.append(
            f'<rect class="{kind(line)}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{_y(0) - top:.1f}"/>'
        )
        parts.append(f'<line class="mark" x1="{left:.1f}" x2="{right:.1f}" y1="{mark:.1f}" y2="{mark:.1f}"/>')
        parts += _words((left + right) / 2, line.way.name)
    return _svg(parts)


def by_vote(table: Table, stock: Line, program: Line) -> str:
    """Stock's tokens and those of a program, for questions on which the samples agree more and less."""
    groups = [
        (name, [i for i, share in enumerate(table.vote_shares) if low <= share < high]) for low, high, name in SHARES
    ]
    groups = [(f"{name} ({len(who)})", who) for name, who in groups if who]
    means = [[mean(line.each_tokens[i] for i in who) for line in (stock, program)] for _, who in groups]
    up = ticks(0, 1.05 * max(max(pair) for pair in means))
    parts = _frame([], [(y / up[-1], f"{y:,.0f}") for y in up])
    room = 1 / len(groups)
    for place, ((name, _), pair) in enumerate(zip(groups, means, strict=True)):
        for which, (line, tokens) in enumerate(zip((stock, program), pair, strict=True)):
            left, top = _x((place + 0.15 + 0.35 * which) * room), _y(tokens / up[-1])
            wide = _x(0.32 * room) - _x(0)
            parts.append(
                f'<rect class="{kind(line)}" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{_y(0) - top:.1f}"/>'
            )
        if pair[0]:
            change = 100 * (pair[1] / pair[0] - 1)
            top = _y(max(pair) / up[-1]) - 4
            parts.append(
                f'<text x="{_x((place + 0.5) * room):.1f}" y="{top:.1f}" text-anchor="middle">{change:+.0f} %</text>'
            )
        parts += _words(_x((place + 0.5) * room), name)
    return _svg(parts)


def kind(line: Line) -> str:
    """The class that gives its colour."""
    return "program" if line.way.is_program else line.way.way


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> list[str]:
    """Lines of the grid with their values."""
    parts: list[str] = []
    for share, text in up:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{_y(share) + 4:.1f}" text-anchor="end">{text}</text>')
    parts += [
        f'<text x="{_x(share):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'
        for share, text in across
    ]
    return parts


def _words(x: float, name: str) -> list[str]:
    """A name below the axis, its parts on lines of their own."""
    return [
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 13 + 11 * row}" text-anchor="middle">{escape(part.strip())}</text>'
        for row, part in enumerate(name.split(","))
    ]


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
