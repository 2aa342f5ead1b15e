"""What reads the logits, on held-out questions: confidence, weak branches, mixed answers and the judge, against stock.

    python benchmarks/bench_statistics.py --csv benchmarks/results/statistics.csv

As bench_self_consistency.py, with other programs. What a step pays for statistics is in bench_statistics_overhead.py.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from bench_self_consistency import main

JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
GROUP_TOKENS = 16  # a branch of the tiny reasoner has about 50 tokens
CONFIDENCE: dict[str, Any] = {"stop": "confidence", "group_tokens": GROUP_TOKENS}
PROGRAMS: dict[str, dict[str, Any]] = {
    "predictive (default)": {},
    "predictive, votes by confidence": {"stop": "predictive", "vote": "confidence", "group_tokens": GROUP_TOKENS},
    "predictive, votes by judge": {"vote": "reward", **JUDGE},
    "whole cap, votes by judge": {"stop": "never", "vote": "reward", **JUDGE},
    "confidence": CONFIDENCE,
    "confidence, weak_frac 0.1": {**CONFIDENCE, "weak_frac": 0.1},
    "confidence, weak_frac 0.5": {**CONFIDENCE, "weak_frac": 0.5},
    "mixture": {"stop": "mixture"},
}

if __name__ == "__main__":
    multiprocessing.freeze_support()
    main(PROGRAMS, __doc__)
