"""A field for a driver outside the engine, checked and made into an algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang_dynasor.algorithms.beam import Beam
from sglang_dynasor.algorithms.best_of_n import BestOfN
from sglang_dynasor.algorithms.mcts import Mcts
from sglang_dynasor.algorithms.rebase import Rebase
from sglang_dynasor.algorithms.self_consistency import SelfConsistency
from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.spec import ALGORITHMS, JudgeSpec, ProgramSpec, parse_field

MOST_BRANCHES = 256
SEARCHES = ("rebase", "mcts", "beam")  # only a driver runs them
MOST_STEP_CHARS = 64

# Keys that only a driver knows, by algorithm.
OWN_KEYS: dict[str, tuple[str, ...]] = {
    "self_consistency": (),
    "best_of_n": ("hopeless",),
    "rebase": ("hopeless", "step", "max_depth", "round_width", "reward_temperature"),
    "mcts": ("hopeless", "step", "max_depth", "branching", "exploration"),
    "beam": ("hopeless", "step", "max_depth", "beams"),
}
# Of spec.FIELD_HELP; the others need the engine's logits, or a place in its line ...
_COMMON_KEYS = (
    "branches", "width", "stop", "answer", "deadline_s", "vote", "judge", "judge_suffix", "judge_good", "judge_bad",
)  # fmt: skip
_WHOLE_DEPTHS = ("rebase", "beam")  # sample a whole depth at once, so that no width can hold for them
# ... and these may be left out where nobody knows them: the answer is the same.
_IDLE_KEYS = ("tenant", "statistics", "group_tokens")


@dataclass(frozen=True, slots=True)
class Plan:
    """What an author asked for, every value in range."""

    algorithm: str
    spec: ProgramSpec
    options: dict[str, Any]  # of OWN_KEYS, but for step
    step: str

    def start(self, prompt: str = "") -> Algorithm:
        """A fresh run of the algorithm, on what the samples continue.

        Raises:
            FieldError: an option out of range.
        """
        cap, stop, width = self.spec.branches, self.spec.stop, self.spec.width
        options: dict[str, Any] = {"vote": self.spec.vote, **self.options}
        match self.algorithm:
            case "best_of_n":
                return BestOfN(cap, stop, width=width, **options)
            case "rebase":
                if "reward_temperature" in options:
                    options["temperature"] = options.pop("reward_temperature")
                return Rebase(cap, stop, **options)
            case "mcts":
                return Mcts(cap, stop, width=width, step=self.step, **options)
            case "beam":
                return Beam(cap, stop, **options)
            case _:
                return SelfConsistency(self.spec, prompt)


def parse_plan(field: dict[str, Any], *, has_reward: bool) -> Plan:
    """The plan that `field` asks for.

    Args:
        field: the keys of spec.FIELD_HELP and, by algorithm, of OWN_KEYS.
        has_reward: whether the author's own code gives rewards.

    Raises:
        FieldError: an unknown key, a wrong type, a value out of range, or nobody to give the rewards that are needed.
    """
    field = dict(field)
    algorithm = field.pop("algorithm", "self_consistency")
    if algorithm not in OWN_KEYS:
        raise FieldError(f"dynasor.algorithm={algorithm!r} is not known; use one of {', '.join(OWN_KEYS)}")
    own = {key: field.pop(key) for key in OWN_KEYS[algorithm] if key in field}
    if algorithm not in SEARCHES:
        field = {key: value for key, value in field.items() if key not in _IDLE_KEYS}
    for key in field:
        if key not in _COMMON_KEYS:
            keys = ", ".join([*_COMMON_KEYS, *OWN_KEYS[algorithm]])
            raise FieldError(f"dynasor.{key} is not a key of {algorithm} outside the engine; the keys are {keys}")
    if algorithm in _WHOLE_DEPTHS and "width" in field:
        raise FieldError(
            f"dynasor.width={field['width']!r} with algorithm {algorithm!r}: it samples a whole depth at once; leave it out, or "
            "bound the requests of all programs by `rows` of the backend"
        )
    if has_reward and "judge" in field:
        raise FieldError(f"dynasor.judge={field['judge']!r} with rewards of your own code; leave out one of the two")
    if algorithm != "self_consistency" and not has_reward and "judge" not in field:
        raise FieldError(
            f"dynasor.algorithm={algorithm!r} without rewards; send judge 'self' with judge_suffix, judge_good and judge_bad, "
            "or give `reward`, a function of the text"
        )
    if algorithm in SEARCHES:
        field.setdefault("vote", "reward")
    else:
        field["algorithm"] = algorithm
    # Rules on rewards are refused without a judge; the author's own code is one.
    spec = parse_field({**field, "judge": "model"} if has_reward else field, MOST_BRANCHES)
    if has_reward:
        spec = replace(spec, judge=JudgeSpec("", is_external=True))
    elif spec.judge is not None and spec.judge.is_external:
        raise FieldError(
            f"dynasor.judge={field['judge']!r} outside the engine: the operator's reward model is asked by a server with --scheduler dynasor "
            "only; send judge 'self', or give `reward`, a function of the text"
        )
    if spec.stop.needs_statistics or spec.vote == "confidence":
        raise FieldError(
            f"dynasor.stop={spec.stop.text!r}, dynasor.vote={spec.vote!r}: confidences are read next to the logits, by a server "
            "with --scheduler dynasor only; use another rule"
        )
    step = own.pop("step", "\n")
    if not isinstance(step, str) or not 1 <= len(step) <= MOST_STEP_CHARS:
        raise FieldError(f"dynasor.step={step!r} is no step mark; send 1 to {MOST_STEP_CHARS} characters")
    for key, low in (("reward_temperature", 0.0), ("exploration", -1e-9)):
        value = own.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < 1e3:
            raise FieldError(f"dynasor.{key}={value!r} is outside its range; send a number such as 0.2 or 1")
    plan = Plan(algorithm, spec, own, step)
    plan.start()  # what is out of range is said now, not in the middle
    return plan


def runs_on_server(field: dict[str, Any], *, has_reward: bool) -> bool:
    """Whether a server with our scheduler can run this by itself, as one request."""
    return field.get("algorithm", "self_consistency") in ALGORITHMS and "hopeless" not in field and not has_reward
