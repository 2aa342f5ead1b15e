"""The stopping rules on recorded samples of real models, where the traces are at hand."""

from __future__ import annotations

import pytest
from engines import ROOT

TRACES = ROOT.parent / "shared" / "traces"


@pytest.mark.skipif(not TRACES.exists(), reason="the recorded samples are not part of the repository")
def test_predictive_saves_what_was_published() -> None:
    """MATH-500, R1-Distill-Llama-8B, cap 32: 62.7 % saved at risk 0.02 and 88.5 % accuracy, within half a point."""
    from replay_stopping import replay, workloads

    from sglang_dynasor.policy.rules import parse_stop

    _, questions, cap = next(iter(workloads(TRACES)))
    result = replay(questions, cap, parse_stop("predictive:0.02"))
    assert result["saved"] == pytest.approx(62.7, abs=0.5)
    assert result["accuracy"] == pytest.approx(88.5, abs=0.3)
    lossless = replay(questions, cap, parse_stop("margin"))
    assert lossless["saved"] == pytest.approx(30.0, abs=0.5)
    assert lossless["agreement"] == 100
