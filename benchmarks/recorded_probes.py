"""Recorded thoughts that were asked for their answer, and what a program of several of them would have done.

A thought has a trial after each tenth of it, the last at its end. All chains of a question think side by side, a token of each
at a time, so that time is counted in tokens of one chain. What a probe itself computes, and the few tokens of an answer that is
written after a thought was closed, are not in the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from recorded import read_questions

from sglang_dynasor.policy.chains import ASKED_FRAC, FRESH_FRAC
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.rules import StopRule
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.thought import Trial, is_likely

FILE = "gemma4_12b_probes.jsonl.zst"


class Thought(NamedTuple):
    """One recorded chain."""

    trials: tuple[Trial, ...]  # the last at its end: what it answered
    letters: tuple[dict[str, float], ...]  # of each trial, how likely each answer that is listed was, together 1
    masses: tuple[float, ...]  # of each trial, how likely any answer was at all

    @property
    def num_tokens(self) -> int:
        return self.trials[-1].num_tokens

    @property
    def answer(self) -> str:
        assert self.trials[-1].key is not None
        return self.trials[-1].key


class Asked(NamedTuple):
    """One question with its recorded chains."""

    id: str
    gold: str
    thoughts: tuple[Thought, ...]

    @property
    def num_tokens(self) -> int:
        return sum(thought.num_tokens for thought in self.thoughts)

    @property
    def longest_tokens(self) -> int:
        return max(thought.num_tokens for thought in self.thoughts)

    @property
    def vote(self) -> str:
        """What all chains answer together; of answers with equal votes the one that came earliest by chain."""
        answers = [thought.answer for thought in self.thoughts]
        return max(dict.fromkeys(answers), key=answers.count)


def read_asked(traces: Path) -> dict[str, list[Asked]]:
    """The recorded questions by data set."""
    found: dict[str, list[Asked]] = {}
    for raw in read_questions(traces / FILE):
        seeds = sorted(raw["seeds"].items(), key=lambda item: int(item[0]))
        thoughts = tuple(_thought(probes) for _, probes in seeds)
        asked = Asked(str(raw["qid"]), raw["gold"], tuple(thought for thought in thoughts if thought.num_tokens))
        found.setdefault(raw["dataset"], []).append(asked)
    return found


def _thought(probes: list[list[Any]]) -> Thought:
    """One chain. Its trials were forced to be a letter: a trial's likelihood is that of its letter among all letters.

    The trace also has how likely any letter was at that place, for most of the GPQA thoughts below a tenth, as the text that
    asked was not the model's own; and the likelihoods of those letters alone that were at least 0.001 likely, maybe of none.
    """
    trials: list[Trial] = []
    letters: list[dict[str, float]] = []
    masses: list[float] = []
    for _, num_tokens, answer, likelihood, mass, others, *_ in sorted(probes)[1:]:  # the first is before any thought
        trials.append(Trial(answer, answer, likelihood / mass if mass else 0.0, num_tokens))
        total = sum(others.values())
        letters.append({key: value / total for key, value in others.items()} if total else {answer: 1.0})
        masses.append(mass)
    return Thought(tuple(trials), tuple(letters), tuple(masses))


class Outcome(NamedTuple):
    """What a rule made of one question."""

    answer: str
    tokens: int  # of all chains
    time: int  # to the answer


def all_to_their_ends(asked: Asked) -> Outcome:
    return Outcome(asked.vote, asked.num_tokens, asked.longest_tokens)


class Event(NamedTuple):
    """A chain was asked, or came to its end."""

    time: int
    chain: int
    place: int  # in its trials


def events_of(thoughts: Sequence[Thought], chain: int, start: int = 0) -> list[Event]:
    """What happens to a chain that starts at a time."""
    return [Event(start + trial.num_tokens, chain, place) for place, trial in enumerate(thoughts[chain].trials)]


def run_program(asked: Asked, spec: ProgramSpec, *, first: int | None = None, later: int = 0) -> Outcome:
    """What a program does on these chains, asked at the recorded places.

    Args:
        first: chains that start at once. None: all.
        later: when the others start, unless an answer has its share then; so they do as soon as it has not.
    """
    thoughts = asked.thoughts[: spec.branches]
    program = Program(asked.id, spec)
    chains = program.chains
    assert chains is not None
    starts: list[int] = []
    ends = [thought.num_tokens for thought in thoughts]
    events: list[Event] = []

    def start(num: int, time: int) -> None:
        for _ in range(num):
            events.extend(events_of(thoughts, program.start_branch(), time))
            starts.append(time)
        heapify(events)

    start(len(thoughts) if first is None else first, 0)
    time = 0
    while events and program.reason is None and program.speaker is None:
        time, chain, place = heappop(events)
        trial = thoughts[chain].trials[place]
        if trial.num_tokens > ends[chain]:
            continue
        if place == len(thoughts[chain].trials) - 1:
            program.count(chain, trial.answer, trial.num_tokens, key=trial.key)
        elif program.see_trial(chain, trial) == chain and program.speaker is None:
            ends[chain] = trial.num_tokens  # it has settled, and answers
            program.count(chain, trial.answer, trial.num_tokens, key=trial.key)
        if time >= later and len(starts) < len(thoughts) and not chains.is_holding:
            start(len(thoughts) - len(starts), time)
    speaker = program.winner if program.speaker is None else program.speaker
    assert speaker is not None
    branch = program.branches[speaker]
    answer = branch.trials[-1].key if program.speaker is not None else branch.key
    assert answer is not None
    tokens = sum(min(end, time - start) for end, start in zip(ends, starts, strict=False))
    return Outcome(answer, tokens, time)


def timeline(thoughts: Sequence[Thought]) -> list[Event]:
    """What happens to chains that all start at once, in order; at one time by chain."""
    return sorted(event for chain in range(len(thoughts)) for event in events_of(thoughts, chain))


Weigh = Callable[[Thought, int], dict[str, float]]  # what a running chain gives to which answers, by its trial's place


def likely(thought: Thought, place: int) -> dict[str, float]:
    """One unit for an answer that is likelier than not: as the rule `trials`."""
    trial = thought.trials[place]
    return {key_of(trial): 1.0} if is_likely(trial) else {}


def every(thought: Thought, place: int) -> dict[str, float]:
    """One unit for whatever was answered."""
    return {key_of(thought.trials[place]): 1.0}


def by_likelihood(thought: Thought, place: int) -> dict[str, float]:
    """As much as the answer is likely, the rest to nobody."""
    trial = thought.trials[place]
    return {key_of(trial): trial.probability}


def spread(thought: Thought, place: int) -> dict[str, float]:
    """One unit, spread over all answers by their likelihood."""
    return thought.letters[place]


def steady(thought: Thought, place: int) -> dict[str, float]:
    """As large a part of a unit as its last three trials say what the latest says; of fewer, those that are missing do not."""
    key = key_of(thought.trials[place])
    same = takewhile(lambda trial: trial.key == key, reversed(thought.trials[max(0, place - 2) : place + 1]))
    return {key: sum(1 for _ in same) / 3}


def key_of(trial: Trial) -> str:
    assert trial.key is not None
    return trial.key


def units_of(thoughts: Sequence[Thought], places: Sequence[int], weigh: Weigh) -> dict[str, float]:
    """What chains that were asked last at these places (-1: not yet) give to each answer."""
    units: dict[str, float] = {}
    for thought, place in zip(thoughts, places, strict=True):
        is_over = place == len(thought.trials) - 1
        for key, unit in ({thought.answer: 1.0} if is_over else weigh(thought, place) if place >= 0 else {}).items():
            units[key] = units.get(key, 0.0) + unit
    return units


def run_share(asked: Asked, weigh: Weigh, share: float, hold_tokens: int) -> Outcome:
    """The rule `trials` of policy/chains.py with other weights, alone: no chain settles by itself."""
    thoughts = asked.thoughts
    places, heard = [-1] * len(thoughts), [0] * len(thoughts)
    held, since = None, 0
    for time, chain, place in timeline(thoughts):
        places[chain], heard[chain] = place, time
        units = units_of(thoughts, places, weigh)
        leader = max(units, key=units.__getitem__, default="")
        is_asked = sum(at >= 0 for at in places) >= ASKED_FRAC * len(thoughts)
        now = leader if is_asked and units.get(leader, 0.0) >= share * len(thoughts) - 1e-9 else None
        if now is None or now != held:
            held, since = now, time
        thinking = [i for i, thought in enumerate(thoughts) if places[i] < len(thought.trials) - 1]
        is_fresh = sum(heard[i] > since for i in thinking) >= FRESH_FRAC * len(thinking)
        if held is not None and time >= since + hold_tokens and is_fresh:
            return Outcome(held, tokens_at(thoughts, time), time)
    return all_to_their_ends(asked)


def run_confident(asked: Asked, stop: StopRule, probability: float) -> Outcome:
    """The rule before `trials`: running chains whose latest trial is so likely count as votes."""
    thoughts = asked.thoughts
    places = [-1] * len(thoughts)

    def confident(thought: Thought, place: int) -> dict[str, float]:
        return every(thought, place) if thought.trials[place].probability >= probability else {}

    for time, chain, place in timeline(thoughts):
        places[chain] = place
        votes = units_of(thoughts, places, confident)
        counts = tuple(sorted((int(num) for num in votes.values()), reverse=True))
        num_left = len(thoughts) - sum(counts)
        if stop.stops(Evidence(counts, 0, num_left, num_in_flight=num_left)):
            return Outcome(max(votes, key=votes.__getitem__), tokens_at(thoughts, time), time)
    return all_to_their_ends(asked)


def tokens_at(thoughts: Sequence[Thought], time: int) -> int:
    return sum(min(thought.num_tokens, time) for thought in thoughts)
