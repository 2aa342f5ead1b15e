"""A field for a driver outside the engine, checked and made into an algorithm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from sglang_dynasor.algorithms.catalogue import check_names, find
from sglang_dynasor.algorithms.tree import Algorithm
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.algorithm import SELF_CONSISTENCY, AlgorithmRecord
from sglang_dynasor.policy.rules import own_rule
from sglang_dynasor.policy.shared_budget import SharedBudget
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec, parse_field
from sglang_dynasor.symbolic import check_installed

MOST_BRANCHES = 256
MOST_STEP_CHARS = 64

# Of spec.FIELD_HELP; the others need the engine's logits, or a place in its line ...
_COMMON_KEYS = (
    "branches", "width", "stop", "answer", "equal", "deadline_s", "vote", "judge", "judge_suffix", "judge_good", "judge_bad",
    "budget_tokens",
)  # fmt: skip
# ... and these may be left out where nobody knows them: the answer is the same.
_IDLE_KEYS = ("tenant", "statistics", "group_tokens")


@dataclass(frozen=True, slots=True)
class Plan:
    """What an author asked for, every value in range."""

    about: AlgorithmRecord
    spec: ProgramSpec
    options: dict[str, Any]  # the algorithm's own keys that its constructor takes
    step: str

    def start(self, budget: SharedBudget | None = None, most_tokens: int = 0) -> Algorithm:
        """A fresh run of the algorithm.

        Args:
            budget: tokens that it shares with others.
            most_tokens: that one of its samples may take, for the budget.

        Raises:
            FieldError: an option out of range, or a class that is no algorithm.
        """
        search: Any = self.about.search
        given = {
            "width": self.spec.width, "vote": self.spec.vote, "has_rewards": self.spec.judge is not None, "budget": budget,
            "most_tokens": most_tokens,
        }  # fmt: skip
        options = {key: value for key, value in given.items() if self.about.takes(key)} | self.options
        try:
            signature(search).bind(self.spec.branches, self.spec.stop, **options)
        except TypeError as error:
            raise FieldError(
                f"dynasor.algorithm={self.about.name!r} cannot be started: {error}; its constructor takes cap and stop, and its own "
                "keys by name"
            ) from None
        algorithm = search(self.spec.branches, self.spec.stop, **options)
        check_names(self.about.name, algorithm)
        return algorithm


def parse_plan(field: dict[str, Any], *, has_reward: bool) -> Plan:
    """The plan that `field` asks for.

    Args:
        field: the keys of spec.FIELD_HELP and the algorithm's own; `algorithm` is what `catalogue.find` takes, and `stop` may be
            a function of the evidence.
        has_reward: whether the author's own code gives rewards.

    Raises:
        FieldError: an unknown key, a wrong type, a value out of range, or nobody to give the rewards that are needed.
    """
    field = dict(field)
    about = find(field.pop("algorithm", SELF_CONSISTENCY.name))
    if about.search is None and not about.is_engine_s:
        raise FieldError(f"dynasor.algorithm={about.name!r} has nothing to run; give its record search=CLASS")
    if about.search is None:
        raise FieldError(
            f"dynasor.algorithm={about.name!r} needs --scheduler dynasor: a running thought is probed inside the engine only, where "
            "no `reward` or `stop` of your own code can be sent; use such a server, or another algorithm"
        )
    own = {key: field.pop(key) for key in about.search_keys if key in field}
    if about.is_engine_s:
        field = {key: value for key, value in field.items() if key not in _IDLE_KEYS}
    _check_keys(field, about, has_reward=has_reward)
    rule = own_rule(field.pop("stop")) if callable(field.get("stop")) else None
    if about.is_engine_s:
        field["algorithm"] = about.name
    else:
        field = {"branches": about.branches, "vote": about.vote, "stop": about.stop, **field}
    # Rules on rewards are refused without a judge; the author's own code is one.
    spec = parse_field({**field, "judge": "model"} if has_reward else field, MOST_BRANCHES)
    if rule is not None:
        spec = replace(spec, stop=rule)
    if has_reward:
        spec = replace(spec, judge=JudgeSpec("", is_external=True))
    elif spec.judge is not None and spec.judge.is_external:
        raise FieldError(
            f"dynasor.judge={field['judge']!r} outside the engine: the operator's reward model is asked by a server with --scheduler dynasor "
            "only; send judge 'self', or give `reward`, a function of question and text"
        )
    if spec.stop.needs_statistics or spec.vote == "confidence":
        raise FieldError(
            f"dynasor.stop={spec.stop.text!r}, dynasor.vote={spec.vote!r}: confidences are read next to the logits, by a server "
            "with --scheduler dynasor only; use another rule"
        )
    if spec.comparer == "symbolic":
        check_installed()
    elif spec.comparer:
        raise FieldError(
            f"dynasor.equal={spec.equal!r} outside the engine: only a server with --scheduler dynasor compares answers so, of programs whose "
            "branches it makes itself; use symbolic, math or text"
        )
    step = own.get("step", "\n")
    if not isinstance(step, str) or not 1 <= len(step) <= MOST_STEP_CHARS:
        raise FieldError(f"dynasor.step={step!r} is no step mark; send 1 to {MOST_STEP_CHARS} characters")
    plan = Plan(about, spec, {key: value for key, value in own.items() if about.takes(key)}, step)
    plan.start()  # what is out of range is said now, not in the middle
    return plan


def _check_keys(field: dict[str, Any], about: AlgorithmRecord, *, has_reward: bool) -> None:
    """Refuse what `about` cannot be told, and rewards from nobody or from two."""
    for key in field:
        if key not in _COMMON_KEYS:
            keys = ", ".join([*_COMMON_KEYS, *about.search_keys])
            raise FieldError(f"dynasor.{key} is not a key of {about.name} outside the engine; the keys are {keys}")
    if "width" in field and not about.takes("width"):
        raise FieldError(
            f"dynasor.width={field['width']!r} with algorithm {about.name!r}: it says by itself how much it samples at once, such as "
            "a whole depth; leave it out, or bound the requests of all programs by `rows` of the backend"
        )
    if "vote" in field and not about.takes("vote"):
        raise FieldError(
            f"dynasor.vote={field['vote']!r} with algorithm {about.name!r}: its constructor takes no `vote`; leave it out"
        )
    if "budget_tokens" in field and not about.takes("budget"):
        raise FieldError(
            f"dynasor.budget_tokens={field['budget_tokens']!r} with algorithm {about.name!r}: its constructor takes no `budget`; use "
            "self_consistency, or leave it out"
        )
    if has_reward and "judge" in field:
        raise FieldError(f"dynasor.judge={field['judge']!r} with rewards of your own code; leave out one of the two")
    if about.needs_rewards and not has_reward and "judge" not in field:
        raise FieldError(
            f"dynasor.algorithm={about.name!r} without rewards; send judge 'self' with judge_suffix, judge_good and judge_bad, "
            "or give `reward`, a function of question and text"
        )


def runs_on_server(field: dict[str, Any], *, has_reward: bool) -> bool:
    """Whether a server with our scheduler can run this by itself, as one request: functions cannot be sent.

    Raises:
        FieldError: it names a template.
    """
    if "template" in field:
        raise FieldError(
            f"dynasor.template={field['template']!r} outside a request: the caller's own settings would win, all of which are sent; send "
            "the template's settings, or a request of your own"
        )
    about = find(field.get("algorithm", SELF_CONSISTENCY.name))
    if not about.is_engine_s or has_reward:
        return False
    return not callable(field.get("stop")) and not any(key in field for key in about.search_keys)
