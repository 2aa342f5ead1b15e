"""The streams of the benchmarks, and how the highest rate is read off a curve."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import pytest
from bench_online import BLOCK, WAYS, Bench, Point, Run, against, highest_rate, picks_of
from rows import percentile
from simulate_online import highest_rate as found_rate

from sglang_dynasor.demo import Solved
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.sim.arrivals import poisson, recorded


def point(rate: float, *latencies_s: float) -> Point:
    return Point(WAYS[0], "poisson", rate, [Run([Solved("1", True, 1, 1, one, None) for one in latencies_s], 1.0)])


def test_a_poisson_stream_is_seeded_and_has_its_rate() -> None:
    """The same seed gives the same times; the mean gap is 1 / rate, in short streams too."""
    times_s = poisson(4, 4000, seed=1)
    assert poisson(4, 9, seed=1)[-1] == pytest.approx(2)
    assert poisson(4, 1, seed=1) == [0]
    assert times_s == poisson(4, 4000, seed=1) != poisson(4, 4000, seed=2)
    assert times_s[-1] == pytest.approx(3999 / 4)


def test_a_recorded_stream_keeps_its_shape_at_any_rate(tmp_path: Path) -> None:
    """Only the scale changes: gaps keep their proportions, and the mean rate is the wanted one."""
    trace = tmp_path / "trace.csv.gz"
    trace.write_bytes(gzip.compress(b"t_s,input_tokens,output_tokens\n0,1,1\n1,1,1\n4,1,1\n5,1,1\n"))
    assert recorded(2, 4, 0, trace) == pytest.approx([0, 0.3, 1.2, 1.5])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seconds\n1\n", "no column t_s"),
        ("t_s\n1\nsoon\n", "line 3: t_s='soon' is no number"),
        ("t_s\n2\n1\n", "line 3: t_s=1 comes after 2.0"),
        ("t_s\n1\n", "has 1 arrivals"),
    ],
)
def test_a_stream_that_is_none_is_named(tmp_path: Path, text: str, named: str) -> None:
    """With its line."""
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(ConfigError, match=named):
        recorded(1, 2, 0, trace)


def test_the_highest_rate_is_where_the_curve_leaves_the_slo() -> None:
    """By the logarithm between neighbours; the first crossing counts; a curve that never leaves says so."""
    curve = [(0.0, 1.0), (2.0, 1.0), (4.0, 4.0), (6.0, 1.0)]
    assert highest_rate(curve, slo_s=2) == (pytest.approx(3), False)
    assert highest_rate(curve, slo_s=4) == (6, True)
    assert highest_rate(curve, slo_s=0.5) == (0, False)


def test_percentiles_of_few_values() -> None:
    """The last value is the 100th, one value is every percentile."""
    assert percentile([3, 1, 2], 1) == 3
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([7], 0.99) == 7


def test_blocks_drawn_anew_give_an_interval_around_p90() -> None:
    """Two points of the same streams are drawn alike; a point of fewer repeats is drawn from what it has."""
    latencies_s = [float(place % 100) for place in range(200)]
    one = point(1, *latencies_s)
    twice = point(2, *(2 * value for value in latencies_s))
    picks = picks_of(200, 1)
    draws = one.drawn_needs(picks)
    assert draws.min() < one.p90 < draws.max()
    assert twice.drawn_needs(picks) == pytest.approx(2 * draws)
    assert point(3, *[7.0] * BLOCK).drawn_needs(picks) == pytest.approx(7)
    assert point(3, 7.0).drawn_needs(picks_of(1, 1)) == pytest.approx(7)


def test_a_way_that_leaves_some_behind_is_not_inside() -> None:
    """Nine of ten are answered at once, and the last one long after the stream is over."""
    made = Run(point(1, *[1.0] * 19, 40.0).runs[0].solved, 50.0, drain_s=30.0)
    assert (Point(WAYS[0], "poisson", 1, [made]).p90, Point(WAYS[0], "poisson", 1, [made]).needs_s) == (1, 15)
    assert Point(WAYS[0], "poisson", 1, [made]).drawn_needs(picks_of(20, 1)).min() >= 15


def test_the_simulators_rate_is_found_by_halving() -> None:
    """Wherever the search begins."""
    for start in (0.01, 3.0, 700.0):
        assert found_rate(lambda rate: rate <= 3.7, start) == pytest.approx(3.7, rel=0.03)


def test_the_gain_over_stock_has_the_interval_of_both() -> None:
    """Draws in which stock serves nothing in time do not count; where it serves nothing at all there is no gain to tell."""
    rates, stocks = np.array([2.0, 4.0, 9.0]), np.array([1.0, 2.0, 0.0])
    assert against(3.0, 1.5, rates, stocks, "") == "2.00 (2.00 to 2.00)x"
    assert against(3.0, 1.5, rates, stocks, ">= ") == ">= 2.00 (2.00 to 2.00)x"
    assert against(3.0, 0.0, rates, stocks, "") == "-"


def test_the_summary_reads_each_ways_rate_off_its_own_curve() -> None:
    """By an SLO of twice the idle p90 of stock; a way that is never too slow says that it could do more."""
    bench = Bench(argparse.Namespace(num_programs=BLOCK, repeats=1, processes=["poisson"], rates=[1, 4]))
    stock, ours = WAYS[0], next(way for way in WAYS if way.name == "all")
    for way, curve in ((stock, {0: 1.0, 1: 4.0}), (ours, {0: 0.5, 1: 0.5, 4: 1.0})):
        for rate, latency_s in curve.items():
            made = point(rate, *[latency_s] * BLOCK)
            bench.points.append(Point(way, "idle" if rate == 0 else "poisson", rate, made.runs))
    first, second = bench.summary([stock, ours])
    assert first["highest rate in the SLO"] == "0.50 (0.50 to 0.50)/s"
    assert first["against the best stock"] == "1.00 (1.00 to 1.00)x"
    assert second["highest rate in the SLO"] == ">= 4.00 (4.00 to 4.00)/s"
    assert second["against the best stock"] == ">= 8.00 (8.00 to 8.00)x"
    assert (second["at rate"], second["slowest s"]) == ("1/s", "0.5")
