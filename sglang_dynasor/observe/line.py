"""A line of the log: one program that is over, as JSON. docs/operations.md is made from LINE_HELP, and a test compares it with real lines."""

from __future__ import annotations

import json
from typing import Any

from sglang_dynasor.policy.spec import ProgramSpec

VERSION = 1  # of what is below; lines without `v` are older: `id`, `at` and `record` only

# By key: where a line has it, and what it says.
LINE_HELP: dict[str, tuple[str, str]] = {
    "v": ("always", "version of these keys: 1. A key may come without a new version, none changes its meaning without one"),
    "id": ("always", "of the response"),
    "arrived_at": ("always", "when the request came, Unix time"),
    "at": ("always", "when its answer went out, Unix time"),
    "took_s": ("always", "seconds in between, by a clock that nobody sets"),
    "model": ("always", "the name that the server goes by"),
    "endpoint": ("always", "that the request was sent to; empty for `sgl.Engine`"),
    "prompt_tokens": ("always", "of the prompt, once"),
    "output_tokens": ("always", "of the text that was sent back; all that were generated are the record's `num_tokens`"),
    "settings": ("always", "what the field came to, defaults included, under the [field's names](reference.md#keys-of-the-field) or the record's; what the record says is not said twice. And `max_new_tokens`, `temperature`; of thoughts `level`, the least probability of `exit`"),
    "record": ("always", "[the record](reference.md#keys-of-the-record)"),
    "owner": ("of who sends a credential, or is named by a gateway", "who sent the request, as a hash ([whose is what](#who-may-read-and-do-what))"),
    "prompt": ("`--dynasor-show-texts`", "how the prompt begins: up to 2,000 characters"),
}  # fmt: skip


def settings_of(spec: ProgramSpec, record: dict[str, Any]) -> dict[str, Any]:
    """What a client's field came to, without what the record says. No text of the client's: a suffix may hold anything."""
    thought, judge, budget = spec.thought, spec.judge, spec.budget
    found: dict[str, Any] = {
        "algorithm": spec.algorithm, "template": spec.template or None, "tenant": spec.tenant or None, "cap": spec.branches, "width": spec.width,
        "stop_rule": spec.stop.text, "answer": spec.answer, "equal": spec.equal, "deadline_s": spec.deadline_s, "vote": spec.vote,
        "weak_frac": spec.weak_frac or None, "statistics": spec.statistics or None,
    }  # fmt: skip
    if judge is not None:
        found["judge"] = "self" if not judge.is_external else "steps" if judge.by_steps else "model"
    if spec.needs_statistics:
        found["group_tokens"] = spec.group_tokens
    if budget is not None:
        found |= {"budget": budget.id or None, "budget_tokens": budget.tokens, "budget_programs": budget.num_programs}
    if thought is not None:
        found |= {
            "agree": thought.agree,
            "level": thought.level,
            "min_tokens": thought.min_tokens,
            "probe_tokens": thought.every_tokens,
        }
        found["hold_tokens"] = None if thought.settles and spec.branches == 1 else thought.hold_tokens
    said = record.keys() - {"answer"}  # the record's is the answer, the field's what reads it
    return {key: value for key, value in found.items() if value is not None and key not in said}


def read_line(text: bytes) -> dict[str, Any] | None:
    """The line that these bytes are: of any version, with an `id` and a `record` of a program, that can be written as JSON again.

    None for everything else, whatever it is.
    """
    try:
        line = json.loads(text)
        record = line["record"]
        if isinstance(line["id"], str) and isinstance(record["program"], str):
            json.dumps(line, allow_nan=False, ensure_ascii=False).encode()  # as it will be sent
            return line
    except (ValueError, TypeError, KeyError, RecursionError):  # an index or a key where there is none, too
        pass
    return None
