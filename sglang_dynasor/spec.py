"""The one field a client sends, checked and made into a ProgramSpec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from sglang_dynasor.answers import check_extractor
from sglang_dynasor.errors import FieldError
from sglang_dynasor.stopping import StopRule, parse_stop

ALGORITHMS = ("self_consistency",)
DEFAULT_BRANCHES = 16
MAX_DEADLINE_S = 86_400.0
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

FIELD_HELP = {
    "algorithm": ("self_consistency", "how branches become an answer: by majority vote"),
    "branches": ("1 to --dynasor-max-branches", f"the cap: most branches the program may use (default {DEFAULT_BRANCHES})"),
    "width": ("1 to branches", "most branches in flight at once (default: as many as the load allows)"),
    "stop": ("NAME[:LEVEL], joined by and / or", "when to end early (default predictive:0.02)"),
    "answer": ("auto, hash, boxed, choice, number, last_line, regex:PATTERN", "where the answer stands in the text (default auto)"),
    "deadline_s": ("above 0 to 86400", "seconds from arrival after which the best answer so far is given (default none)"),
    "tenant": ("1 to 128 of A-Z a-z 0-9 . _ : -", "who shares the engine by weight with other tenants (default none)"),
    "program": ("1 to 128 of A-Z a-z 0-9 . _ : -", "id of a program whose branches the client sends as requests of their own"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What a client asked for, every value in range."""

    algorithm: str
    branches: int
    width: int | None  # None: the load decides
    stop: StopRule
    answer: str
    program: str | None = None  # None: the server makes the branches; else the client sends them under this id
    deadline_s: float | None = None
    tenant: str = ""


def parse_field(field: Any, max_branches: int) -> ProgramSpec:
    """The program that a request's `dynasor` field asks for.

    Args:
        field: an algorithm's name, or a flat mapping of the keys in FIELD_HELP.
        max_branches: the operator's limit on the cap.

    Raises:
        FieldError: an unknown key, a wrong type or a value out of range; the message names the key and what is allowed.
    """
    if isinstance(field, str):
        field = {"algorithm": field}
    if not isinstance(field, dict):
        raise FieldError(
            f"dynasor={field!r} is a {type(field).__name__}; send an object such as "
            '{"algorithm": "self_consistency"}, or the algorithm\'s name'
        )
    options = cast("dict[str, Any]", field)
    for key in options:
        if key not in FIELD_HELP:
            raise FieldError(f"dynasor.{key} is not a key of the field; the keys are {', '.join(FIELD_HELP)}")
    algorithm = _text(options, "algorithm", ALGORITHMS[0])
    if algorithm not in ALGORITHMS:
        raise FieldError(f"dynasor.algorithm={algorithm!r} is not known; use one of {', '.join(ALGORITHMS)}")
    branches = _whole(options, "branches", min(DEFAULT_BRANCHES, max_branches), max_branches, "--dynasor-max-branches")
    width = _whole(options, "width", branches, branches, "dynasor.branches") if "width" in options else None
    answer = _text(options, "answer", "auto")
    check_extractor(answer)
    stop = parse_stop(_text(options, "stop", "predictive"))
    program = _id(options, "program")
    deadline_s = _seconds(options, "deadline_s") if "deadline_s" in options else None
    tenant = _id(options, "tenant")
    if program is not None and (deadline_s is not None or tenant is not None):
        key = "deadline_s" if deadline_s is not None else "tenant"
        raise FieldError(
            f"dynasor.{key}={options[key]!r} with dynasor.program={program!r}: branches that you send are queued like any other "
            "request; leave out one of the two"
        )
    return ProgramSpec(algorithm, branches, width, stop, answer, program, deadline_s, tenant or "")


def _id(options: dict[str, Any], key: str) -> str | None:
    if key not in options:
        return None
    value = _text(options, key, "")
    if not _ID.fullmatch(value):
        raise FieldError(f"dynasor.{key}={value!r} is not an id; use 1 to 128 of A-Z a-z 0-9 . _ : -")
    return value


def _seconds(options: dict[str, Any], key: str) -> float:
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(
            f"dynasor.{key}={value!r} is a {type(value).__name__}; send seconds, above 0 to {MAX_DEADLINE_S:g}"
        )
    if not 0 < value <= MAX_DEADLINE_S:
        raise FieldError(f"dynasor.{key}={value!r} is outside (0, {MAX_DEADLINE_S:g}]; send seconds inside")
    return float(value)


def _text(options: dict[str, Any], key: str, default: str) -> str:
    value = options.get(key, default)
    if not isinstance(value, str):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a string: {FIELD_HELP[key][0]}")
    return value


def _whole(options: dict[str, Any], key: str, default: int, high: int, limit_name: str) -> int:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError(f"dynasor.{key}={value!r} is a {type(value).__name__}; send a whole number, 1 to {high}")
    if not 1 <= value <= high:
        raise FieldError(f"dynasor.{key}={value} is outside [1, {high}] ({limit_name} is {high}); send a value inside")
    return value
