"""The streams of the benchmarks, and how the highest rate is read off a curve."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from bench_online import WAYS, Point, Run, highest_rate
from rows import percentile

from sglang_dynasor.demo import Solved
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.sim.arrivals import poisson, recorded


def point(rate: float, latency_s: float) -> Point:
    return Point(WAYS[0], "poisson", rate, [Run([Solved("1", True, 1, 1, latency_s, None)], 1.0)])


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
    curve = [point(0, 1), point(2, 1), point(4, 4), point(6, 1)]
    assert highest_rate(curve, slo_s=2) == (pytest.approx(3), False)
    assert highest_rate(curve, slo_s=4) == (6, True)
    assert highest_rate(curve, slo_s=0.5) == (0, False)


def test_percentiles_of_few_values() -> None:
    """The last value is the 100th, one value is every percentile."""
    assert percentile([3, 1, 2], 1) == 3
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([7], 0.99) == 7
