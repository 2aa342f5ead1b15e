"""One program of a log, as a report reads it: bounded, and every value of the kind that it should be, whatever the line says."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from sglang_dynasor.observe.savings import saved_branches, saved_tokens
from sglang_dynasor.policy.program import StopReason

OPEN = "open"  # of branches that a client sends: no line says that it is over
UNKNOWN = "(unknown)"  # what the line of an older version, or of a fault of ours, does not say
OTHER = "(other)"
OUTCOMES = (*map(str, StopReason), OPEN, OTHER)
ANSWERED = ("certain", "cap", "deadline", "operator", "budget", "price")
MOST_CHARS = 160  # of a name or an answer
MOST_NUMBER = 1e15  # of tokens, of seconds; more is no measurement
_LISTED = 65_536  # branches


@dataclass(slots=True)
class Entry:
    """One program that is over; of a client's own branches as far as the line of one of them tells."""

    program: str
    outcome: str
    algorithm: str
    template: str
    tenant: str
    owner: str
    model: str
    endpoint: str
    stop_rule: str
    extractor: str  # `answer` of the field
    equal: str
    answer: str  # that was given
    prompt: str
    cap: int
    num_branches: int
    num_tokens: int
    num_extra_tokens: int  # of judges, probes and comparisons
    saved_branches: int
    saved_tokens: int
    num_truncated: int
    num_unread: int  # branches that came to their own end, and no answer was found
    num_answers: int  # different ones
    cut_tokens: int  # the longest branch that was cut by its length
    num_probes: int
    num_chains_closed: int
    certaindex: float | None
    leader_share: float
    prompt_tokens: int
    is_by_vote: bool  # nobody rewards its branches
    is_client_s: bool  # who sends its branches as requests
    arrived_at: float | None
    at: float | None
    took_s: float | None
    deadline_s: float | None
    price: float | None
    agree: float | None  # of a thought: probes in a row that must agree

    @property
    def is_answered(self) -> bool:
        return self.outcome in ANSWERED


def entry_of(line: dict[str, Any]) -> Entry:
    """What a line says.

    Raises:
        ValueError: a value is of the wrong kind, or no number that anybody could have measured.
    """
    record, settings = line["record"], line.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError("settings are no object")
    said = {**settings, **record}
    # As checked, for what is computed of them.
    known: dict[str, Any] = {
        "cap": round(_number(said, "cap")), "num_branches": round(_number(record, "num_branches")),
        "num_tokens": round(_number(record, "num_tokens") if "num_tokens" in record else _number(line, "output_tokens")),
        "branch_tokens": [_number({"": tokens}, "") for tokens in _list(record, "branch_tokens")], "stop_reason": _text(record, "stop_reason", OPEN),
    }  # fmt: skip
    outcome = known["stop_reason"]
    cut = [
        tokens
        for tokens, reason in zip(known["branch_tokens"], _list(said, "finish_reasons"), strict=False)
        if reason == "length"
    ]
    num_truncated = round(_number(said, "num_truncated"))
    return Entry(
        program=_text(said, "program"),
        outcome=outcome if outcome in OUTCOMES else OTHER,
        algorithm=_text(said, "algorithm", UNKNOWN),
        template=_text(said, "template"),
        tenant=_text(said, "tenant"),
        owner=_text(said, "owner") or _text(line, "owner"),
        model=_text(line, "model", UNKNOWN),
        endpoint=_text(line, "endpoint", UNKNOWN),
        stop_rule=_text(said, "stop_rule", UNKNOWN),
        extractor=_text(settings, "answer"),
        equal=_text(settings, "equal"),
        answer=_text(said, "answer") if "votes" in said else "",
        prompt=_text(line, "prompt"),
        cap=known["cap"],
        num_branches=known["num_branches"],
        num_tokens=known["num_tokens"],
        num_extra_tokens=round(sum(_number(said, f"num_{kind}_tokens") for kind in ("probe", "judge", "compare"))),
        saved_branches=max(0, saved_branches(known)),
        saved_tokens=saved_tokens(known),
        num_truncated=num_truncated,
        num_unread=max(0, round(_number(said, "num_abstentions") - num_truncated - _number(said, "num_weak"))),
        num_answers=len(_list(said, "votes")),
        cut_tokens=round(max(cut, default=0)),
        num_probes=round(_number(said, "num_probes")),
        num_chains_closed=sum(tokens is not None for tokens in _list(said, "closed_at_tokens")),
        certaindex=_number(said, "certaindex") if "certaindex" in said else None,
        leader_share=_number(said, "leader_share"),
        prompt_tokens=round(_number(line, "prompt_tokens")),
        is_by_vote="rewards" not in said,
        is_client_s="index" in said,
        arrived_at=_maybe(line, "arrived_at"),
        at=_maybe(line, "at"),
        took_s=_maybe(line, "took_s"),
        deadline_s=_maybe(settings, "deadline_s"),
        price=_maybe(said, "price"),
        agree=_maybe(settings, "agree"),
    )


def _text(values: dict[str, Any], key: str, default: str = "") -> str:
    """A text that is not too long; `default` where there is none."""
    value = values.get(key)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    return value if len(value) <= MOST_CHARS else value[:MOST_CHARS] + "…"


def _maybe(values: dict[str, Any], key: str) -> float | None:
    return None if values.get(key) is None else _number(values, key)


def _number(values: dict[str, Any], key: str) -> float:
    """A number that is 0 or more; 0 where there is none."""
    value = values.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is no number")
    if not 0 <= value <= MOST_NUMBER or not isfinite(value):
        raise ValueError(f"{key} is no number that could have been measured")
    return value


def _list(values: dict[str, Any], key: str) -> list[Any]:
    """A list; empty where there is none."""
    value = values.get(key, [])
    if not isinstance(value, list) or len(value) > _LISTED:
        raise ValueError(f"{key} is no list")
    return value
