"""How wide a program runs: the time model against samples drawn, and the choice on a CPU and on a GPU, idle and loaded."""

from __future__ import annotations

import heapq
import random
from math import log, sqrt
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.rules import parse_stop
from sglang_dynasor.policy.spec import parse_field
from sglang_dynasor.policy.width import NEAR_BEST, SPREAD, Load, best_width, cost, time_to_finish

CPU, GPU = 8, 53  # fixed rows: 3.2 ms and 0.4 ms a row; 8 ms and 0.15 ms a row
IDLE_CPU, IDLE_GPU = Load(CPU, 0, 0), Load(GPU, 0, 0)
CAREFUL = parse_stop("careful")
FRESH = Evidence((), 0, 16)


def drawn(num: int, width: int, rng: random.Random) -> float:
    """When the `num`-th of lognormal lengths ends where `width` run at once, each followed by another."""
    sigma = sqrt(log(1 + SPREAD * SPREAD))
    ends = [rng.lognormvariate(-sigma * sigma / 2, sigma) for _ in range(width)]
    heapq.heapify(ends)
    for _ in range(num - 1):
        heapq.heapreplace(ends, ends[0] + rng.lognormvariate(-sigma * sigma / 2, sigma))
    return ends[0]


@pytest.mark.parametrize(
    ("num", "width"), [(1, 1), (3, 1), (10, 1), (3, 3), (3, 8), (8, 3), (8, 16), (12, 16), (30, 8)]
)
def test_the_time_is_what_drawn_lengths_take(num: int, width: int) -> None:
    """Within an eighth: one after another, the first few of many, and all of those that started together."""
    rng = random.Random(num * 100 + width)
    assert time_to_finish(num, width) == pytest.approx(mean(drawn(num, width, rng) for _ in range(4000)), rel=0.125)


@given(st.floats(0.1, 256), st.integers(1, 256))
def test_time_falls_with_width_and_grows_with_what_is_needed(num: float, width: int) -> None:
    """Never the other way, and never as fast as if no row ended for nothing."""
    assert 0 <= time_to_finish(num, width + 1) <= time_to_finish(num, width) <= time_to_finish(num + 1, width)
    assert time_to_finish(0, width) == 0.0


@pytest.mark.parametrize(
    ("load", "evidence", "width"),
    [
        (IDLE_CPU, FRESH, 4),
        (IDLE_GPU, FRESH, 10),
        (Load(CPU, 60, 15), FRESH, 3),  # others wait: no more than could decide
        (Load(GPU, 120, 31), FRESH, 4),
        (Load(CPU, 128, 200), FRESH, 3),
        (IDLE_CPU, Evidence((2,), 0, 14), 2),  # nearly decided
        (IDLE_CPU, Evidence((2, 2), 0, 12), 5),  # a tie: more are needed
        (IDLE_GPU, Evidence((2, 2), 0, 12), 10),
        (IDLE_GPU, Evidence((1,), 0, 1), 1),
    ],
)
def test_a_gpu_runs_wide_and_a_loaded_engine_narrow(load: Load, evidence: Evidence, width: int) -> None:
    """On a CPU a row costs an eighth of a step, on a large GPU next to nothing."""
    assert best_width(evidence, CAREFUL, 0.6, load) == width


def test_uncertain_programs_run_wider() -> None:
    """The more branches are expected to be needed, the wider; without a rule that stops, all that are left."""
    widths = [best_width(FRESH, CAREFUL, drift, IDLE_CPU) for drift in (1.0, 0.6, 0.3, 0.1)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert best_width(FRESH, parse_stop("never"), 0.6, Load(CPU, 64, 1000)) == 16


@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(0, 3),
    st.integers(0, 40),
    st.sampled_from(["careful", "fast", "beta", "margin", "window", "window:3 or careful", "never"]),
    st.floats(1 / 64, 1),
    st.tuples(st.integers(1, 1024), st.integers(0, 256), st.integers(0, 1000)),
)
def test_it_can_decide_and_is_near_the_best(
    counts: list[int], abstentions: int, num_left: int, rule: str, drift: float, drawn_load: tuple[int, int, int]
) -> None:
    """Within what the cap leaves; never fewer than could decide; no width that was compared costs much less."""
    stop, load = parse_stop(rule), Load(*drawn_load)
    recent = tuple(f"{i}" for i, num in enumerate(counts) for _ in range(num)) + (None,) * abstentions
    evidence = Evidence(tuple(sorted(counts, reverse=True)), abstentions, num_left, recent)

    def needed(width: int) -> int:
        seen = Evidence(evidence.counts, abstentions, num_left, recent, num_in_flight=width)
        return votes_needed(seen, stop) or num_left

    width = best_width(evidence, stop, drift, load)
    assert 1 <= width <= max(1, num_left)
    if num_left:
        assert width >= needed(width)
        narrowest = next(w for w in range(1, num_left + 1) if needed(w) <= w)
        ours = cost(width, min(num_left, needed(width) / drift), load)
        assert ours <= 1.001 * NEAR_BEST * cost(narrowest, min(num_left, needed(narrowest) / drift), load)


def test_equal_evidence_gives_the_same_width_in_every_order() -> None:
    """Which branch said what makes no difference to the rule, nor here."""
    one, other = Evidence((3, 1), 0, 12, ("a", "a", "b", "a")), Evidence((3, 1), 0, 12, ("b", "a", "a", "a"))
    assert best_width(one, CAREFUL, 0.5, IDLE_CPU) == best_width(other, CAREFUL, 0.5, IDLE_CPU)


@pytest.mark.parametrize("num_others", [0, 7, 31])
def test_thoughts_start_together_where_they_differ(num_others: int) -> None:
    """Where they mostly agree, a few that finish decide for less; idle on a GPU all of them are sooner."""
    spec = parse_field({"algorithm": "long_cot", "branches": 16, "answer": "hash"}, 64)
    evidence = Program("p", spec).evidence

    def width(drift: float, fixed_rows: int, *, decides_together: bool = True) -> int:
        load = Load(fixed_rows, 3 * num_others, num_others)
        return best_width(evidence, spec.stop, drift, load, decides_together=decides_together)

    for fixed_rows in (CPU, GPU):
        assert width(0.5, fixed_rows) == 16
        assert width(0.5, fixed_rows, decides_together=False) < 16
    assert width(0.95, 4) == 3
    assert (width(0.95, GPU) == 16) == (num_others == 0)
