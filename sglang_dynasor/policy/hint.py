"""What a record says where nobody could vote, or where what was asked for works against itself; None: nothing to say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang_dynasor.policy.branch import Branch, BranchState
from sglang_dynasor.policy.spec import ProgramSpec

# What makes JSON, and extractors that find nothing there but by chance.
_JSON_CONSTRAINTS = ("json_schema", "structural_tag")
_NOT_IN_JSON = ("boxed", "hash", "last_line", "code", "tag")
DEFAULT_TOKENS = 128  # SGLang's own max_new_tokens


def hint(spec: ProgramSpec, branches: Iterable[Branch], constraint: str = "") -> str | None:
    """One line to act on.

    Args:
        spec: of the program.
        branches: all that were started.
        constraint: the grammar that the request constrains its text by, as its sampling parameter is called; empty: none.
    """
    if constraint in _JSON_CONSTRAINTS and spec.answer.partition(":")[0] in _NOT_IN_JSON:
        return f"{constraint} makes JSON, and dynasor.answer={spec.answer!r} reads none; send json, json:PATH or auto"
    ended = [branch for branch in branches if branch.state is BranchState.FINISHED]
    stopped = [branch for branch in ended if branch.is_thinking and branch.ending is not None and branch.ending.stop]
    if stopped:
        stop = stopped[0].ending.stop if stopped[0].ending is not None else ""
        return (
            f"{len(stopped)} of {len(ended)} branches were ended inside their thought by the stop string {stop!r}: no answer was "
            "written; leave it out, or send one that a thought does not say"
        )
    if num := sum(branch.thinks_on for branch in ended):
        return f"{num} of {len(ended)} branches went on thinking after their thought was closed: see if think_end is the model's own"
    if not ended or any(branch.answer is not None for branch in ended):
        return None
    return unanswered(spec, ended, constraint)


def unanswered(spec: ProgramSpec, ended: list[Branch], constraint: str) -> str:
    """Why none of these has an answer."""
    num_cut = sum(branch.ending is not None and branch.ending.is_cut for branch in ended)
    if num_cut:
        where = (
            "in the middle of a thought"
            if any(branch.is_thinking for branch in ended)
            else "before an answer was complete"
        )
        who = f"all {num_cut}" if num_cut == len(ended) else f"{num_cut} of {len(ended)}"
        most = max(branch.num_tokens for branch in ended)
        return (
            f"{who} branches that ended were cut {where}, at {most} tokens; send a larger max_new_tokens (max_tokens)"
        )
    if all(branch.is_thinking for branch in ended):
        return f"all {len(ended)} branches ended inside a thought: no answer was written"
    grammar = f", under {constraint}" if constraint else ""
    return (
        f"none of {len(ended)} texts has an answer that dynasor.answer={spec.answer!r} reads{grammar}; "
        "docs/answers.md says what each extractor finds"
    )


def name_default(record: dict[str, Any]) -> None:
    """Say in the hint of a record, of which nobody gave a limit of tokens, that its texts were cut at SGLang's."""
    if f"at {DEFAULT_TOKENS} tokens" in record.get("hint", ""):
        record["hint"] += f" ({DEFAULT_TOKENS} is what holds where none is given)"
