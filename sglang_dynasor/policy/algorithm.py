"""What is known of an algorithm before it runs: one record each, read by every place that has to tell them apart.

Here are the engine's own; `algorithms/catalogue.py` has all, with the classes that run outside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

from sglang_dynasor.config import CAREFUL

DEFAULT_BRANCHES = 16
# What a plan can give to a constructor besides cap, rule and the algorithm's own keys.
GIVEN_KEYS = ("width", "vote", "has_rewards", "budget", "most_tokens")


@dataclass(frozen=True, slots=True)
class AlgorithmRecord:
    """One algorithm: its name, its needs and its defaults."""

    name: str
    summary: str = ""  # what it is, for help texts
    search: type[Any] | None = None  # with the names of algorithms.tree.Algorithm; None: only the engine can run it
    is_engine_s: bool = False  # the engine drives it: one request is the whole program
    is_thought: bool = False  # its branches are chains of thought, which only the engine can probe
    needs_rewards: bool = False
    is_sure_by_reward: bool = False  # its certaindex is the best reward (arXiv 2412.20993, section B.1), else 1 - risk
    vote: str = "majority"  # by default
    stop: str = CAREFUL  # by default; of this one the operator may choose another level
    branches: int = DEFAULT_BRANCHES  # by default
    engine_keys: tuple[str, ...] = ()  # of the engine's field, for this algorithm only

    @property
    def takes_forks(self) -> bool:
        """Whether its branches are whole answers to one prompt, so that an author may fork them."""
        return self.is_engine_s and not self.is_thought

    @property
    def search_keys(self) -> tuple[str, ...]:
        """Its own keys outside the engine: what `search` takes by name, and `step` where it samples by steps."""
        if self.search is None:
            return ()
        own = [name for name in parameters(self.search) if name not in GIVEN_KEYS]
        if getattr(self.search, "is_stepwise", False) and "step" not in own:
            own.append("step")
        return tuple(own)

    def takes(self, key: str) -> bool:
        """Whether the constructor of `search` has a parameter of this name."""
        return self.search is not None and key in parameters(self.search)


@cache
def parameters(search: type[Any]) -> dict[str, Any]:
    """What a constructor takes besides cap and rule, with the defaults."""
    kinds = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    found = list(signature(search).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in found if parameter.kind in kinds}


SELF_CONSISTENCY = AlgorithmRecord("self_consistency", "majority vote of branches", is_engine_s=True)
BEST_OF_N = AlgorithmRecord(
    "best_of_n",
    "the branch that its judge likes best",
    is_engine_s=True,
    needs_rewards=True,
    is_sure_by_reward=True,
    vote="best",
    stop="best",
)
LONG_COT = AlgorithmRecord(
    "long_cot",
    "one thought that is closed once its answer stands",
    is_engine_s=True,
    is_thought=True,
    branches=1,
    engine_keys=(
        "exit", "agree", "min_tokens", "probe_tokens", "hold_tokens", "probe_word", "probe_suffix", "think_end", "effort",
    ),
)  # fmt: skip
# By name; the first is what a field without a name gets.
ENGINE_ALGORITHMS = {record.name: record for record in (SELF_CONSISTENCY, BEST_OF_N, LONG_COT)}
