"""What a client says of thoughts that are asked for their answer, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.algorithm import LONG_COT, AlgorithmRecord
from sglang_dynasor.policy.rules import StopRule
from sglang_dynasor.policy.values import read_text, read_whole

MAX_SUFFIX_CHARS = 1024
MAX_WORD_CHARS = 32
MOST_PROBE_TOKENS = 65_536
MOST_AGREE = 64
MOST_MIN_TOKENS = 1_000_000
EXITS = "trial[:PROBABILITY], published"
# Of several thoughts: how they end, beside the level of the votes, and for how long their leading answer keeps its share.
# docs/long_cot.md has the replay that both come from.
TOGETHER = "trials:0.8"
HOLD_TOKENS = 512
# How many probes must agree, how likely each answer must be, and from where on: by how much the client wants thought over.
# docs/results.md, "Recorded probes", has the replay that these come from.
EFFORTS = {"low": (1, 0.95, 256), "medium": (2, 0.99, 512), "high": (3, 0.995, 1024)}


@dataclass(frozen=True, slots=True)
class ThoughtSpec:
    """How a chain of thought is probed, and when it is closed (policy/thought.py)."""

    agree: int
    level: float  # of a trial answer's probability, in [0, 1]
    min_tokens: int
    every_tokens: int | None  # None: as often as their price allows
    suffix: str = ""  # empty: from the model and the extractor (engine/probe.py)
    end: str = ""  # empty: the model's own
    word: str = ""  # empty: it is asked at the end of a line
    is_published: bool = False
    hold_tokens: int = HOLD_TOKENS  # that several think on while the leading answer keeps its share (chains.py)
    settles: bool = True  # whether its own trials close it


def check_together(stop: StopRule, branches: int, about: AlgorithmRecord) -> None:
    """Raise FieldError where the rule asks chains that are not there."""
    if stop.uses("trials") and not about.is_thought:
        raise FieldError(
            f"dynasor.stop={quoted(stop.text)} with algorithm {about.name!r}: trials are what thoughts are asked for; use algorithm "
            f"{LONG_COT.name!r}, or another rule"
        )
    if stop.uses("trials") and branches == 1:
        raise FieldError(
            f"dynasor.stop={quoted(stop.text)} with dynasor.branches=1: one chain has nobody to agree with, and is closed by dynasor.exit; "
            "send more branches, or leave stop out"
        )


def parse_thought(options: dict[str, Any], stop: StopRule) -> ThoughtSpec:
    """How thoughts are probed, by a field that asks for them.

    Raises:
        FieldError: a value out of range, or a time that no probe falls into.
    """
    effort = read_text(options, "effort", "medium", ", ".join(EFFORTS))
    if effort not in EFFORTS:
        raise FieldError(f"dynasor.effort={quoted(effort)} is not known; use one of {', '.join(EFFORTS)}")
    agree, level, min_tokens = EFFORTS[effort]
    every_tokens: int | None = None
    rule, sep, text = read_text(options, "exit", "trial", EXITS).partition(":")
    is_published = rule == "published" and not sep
    if is_published:
        agree, level, min_tokens, every_tokens = 3, 0.0, 0, 64
    elif sep:
        try:
            level = float(text)
        except ValueError:
            level = -1.0
    if rule not in ("trial", "published") or (rule == "published" and sep) or not 0 <= level <= 1:
        raise FieldError(
            f"dynasor.exit={quoted(options['exit'])} is no rule; write 'trial', 'trial:PROBABILITY' (0 to 1) or 'published'"
        )
    if "probe_tokens" in options:
        every_tokens = read_whole(options, "probe_tokens", 1, MOST_PROBE_TOKENS, "the limit")
    limits = {"probe_suffix": MAX_SUFFIX_CHARS, "think_end": MAX_SUFFIX_CHARS, "probe_word": MAX_WORD_CHARS}
    texts = {key: read_text(options, key, "", f"up to {limits[key]} characters") for key in limits}
    for key, text in texts.items():
        if len(text) > limits[key]:
            raise FieldError(f"dynasor.{key} has {len(text)} characters; at most {limits[key]} are allowed")
    return ThoughtSpec(
        read_whole(options, "agree", agree, MOST_AGREE, "the limit"),
        level,
        read_whole(options, "min_tokens", min_tokens, MOST_MIN_TOKENS, "the limit", low=0),
        every_tokens,
        texts["probe_suffix"],
        texts["think_end"],
        texts["probe_word"],
        is_published,
        _hold_tokens(options, every_tokens, stop),
        # Several that decide together think on, unless the client says otherwise: where trials are surer than they should be
        # it costs accuracy to close each for itself (docs/long_cot.md).
        settles=not stop.uses("trials") or "exit" in options or "agree" in options,
    )


def _hold_tokens(options: dict[str, Any], every_tokens: int | None, stop: StopRule) -> int:
    """For how long several thoughts keep their leader before it decides: one interval of their probes at least."""
    default = max(HOLD_TOKENS, every_tokens or 0)
    if "hold_tokens" not in options:
        return default
    if not stop.uses("trials"):
        raise FieldError(
            f"dynasor.hold_tokens={quoted(options['hold_tokens'])} with stop {quoted(stop.text)}: no answer is held; leave it out, or send "
            f"several branches and a rule such as {TOGETHER!r}"
        )
    hold_tokens = read_whole(options, "hold_tokens", default, MOST_PROBE_TOKENS, "the limit")
    if every_tokens is not None and hold_tokens < every_tokens:
        raise FieldError(
            f"dynasor.hold_tokens={hold_tokens} is below one probe interval, {every_tokens} tokens: nobody would be asked in that time; "
            f"send {every_tokens} or more, or a smaller probe_tokens"
        )
    return hold_tokens
