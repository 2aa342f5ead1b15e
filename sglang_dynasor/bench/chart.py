"""The page's plots, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import mean

from sglang_dynasor.bench.table import Line, Table

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 40
SHARES = ((0.0, 0.5, "below half"), (0.5, 0.75, "half"), (0.75, 1.0, "three quarters"), (1.0, 2.0, "all"))


def charts(table: Table) -> list[tuple[str, str]]:
    """Titles and pictures."""
    drawn = [("Right answers, by tokens" if table.has_gold else "Agreement, by tokens", scatter(table))]
    drawn.append(("Seconds until the answer: mean, and p90 as a line", bars(table)))
    if table.vote_shares and table.programs:
        drawn.append(("Tokens, by how much of the full vote agrees", by_vote(table)))
    return [(title, svg) for title, svg in drawn if svg]


def ticks(highest: float) -> list[float]:
    """Round values from 0 to a little above."""
    step = 1.0
    while step * 5 < highest:
        step *= 10
    while step * 5 >= highest * 2.5 and step > 1e-9:
        step /= 2
    num = 1
    while step * num < highest:
        num += 1
    return [step * i for i in range(num + 1)]


def scatter(table: Table) -> str:
    """Each way with its intervals: tokens to the right, right answers upwards."""
    lines = [line for line in table.lines if line.hits is not None]
    if not lines:
        return ""
    across = ticks(max(line.tokens for line in lines) * 1.05)
    low = max(0.0, min(line.hits.low for line in lines if line.hits) - 2)
    high = min(100.0, max(line.hits.high for line in lines if line.hits) + 2)
    low, high = 5 * (low // 5), 5 * -(-high // 5)
    steps = [low + (high - low) * i / 4 for i in range(5)]
    parts = _frame(
        [(x / across[-1], f"{x:,.0f}") for x in across], [((y - low) / (high - low), f"{y:.0f}") for y in steps]
    )
    taken: list[float] = []
    for line in sorted(lines, key=lambda line: -(line.hits.value if line.hits else 0)):
        assert line.hits is not None
        x, y = _x(line.tokens / across[-1]), _y((line.hits.value - low) / (high - low))
        if line.hits.half is not None:
            ends = [_y(min(1.0, max(0.0, (end - low) / (high - low)))) for end in (line.hits.low, line.hits.high)]
            parts.append(
                f'<line class="{kind(line)}" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
        label_y = y + 4
        while any(abs(label_y - other) < 12 for other in taken):
            label_y += 3
        taken.append(label_y)
        side = (x + 8, "start") if x < WIDTH * 0.6 else (x - 8, "end")
        parts.append(f'<circle class="{kind(line)}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(
            f'<text x="{side[0]:.1f}" y="{label_y:.1f}" text-anchor="{side[1]}">{escape(line.way.name)}</text>'
        )
    return _svg(parts)


def bars(table: Table) -> str:
    """Mean and p90 latency of each way of which they are known."""
    lines = [line for line in table.lines if line.mean_s is not None and line.p90_s is not None]
    if not lines:
        return ""
    up = ticks(max(max(line.p90_s or 0.0, line.mean_s or 0.0) for line in lines) * 1.05 or 1.0)
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


def by_vote(table: Table) -> str:
    """Stock's tokens and those of a program, for questions on which the samples agree more and less."""
    stock = next((line for line in table.lines if not line.way.is_program and line.hits_change is None), None)
    if stock is None:
        return ""
    program = table.programs[0]
    groups = [
        (name, [i for i, share in enumerate(table.vote_shares) if low <= share < high]) for low, high, name in SHARES
    ]
    groups = [(f"{name} ({len(who)})", who) for name, who in groups if who]
    means = [[mean(line.each_tokens[i] for i in who) for line in (stock, program)] for _, who in groups]
    up = ticks(max(max(pair) for pair in means) * 1.1)
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
