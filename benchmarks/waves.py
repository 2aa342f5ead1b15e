"""Recorded thoughts that are asked in waves, as policy/wave.py says, and not at the recorded places: to count the probes.

A chain says what it said at the last recorded place before: nothing before the first. So what a wave finds may be said once
more a wave later, and the answer that leads looks steadier than it was: this counts probes, and says nothing of accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

from recorded_probes import Asked, Outcome

from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.thought import Trial, next_probe_tokens
from sglang_dynasor.policy.wave import chains_to_ask, next_turn_tokens

SUFFIX_TOKENS = 12
PROBE_TOKENS = SUFFIX_TOKENS + 4  # that a probe computes


class Waves(NamedTuple):
    outcome: Outcome
    num_probes: int
    num_waves: int


def run_waves(asked: Asked, spec: ProgramSpec, *, grows: bool, waits: bool) -> Waves:
    """What a program does on these chains.

    Args:
        grows: whether a thought must also have grown by a part of itself before it is asked again.
        waits: whether a program far from its end is asked half as often.
    """
    assert spec.thought is not None
    program = Program(asked.id, spec)
    chains = program.chains
    assert chains is not None
    ends = [thought.num_tokens for thought in asked.thoughts]
    costs: list[list[int]] = [[] for _ in ends]
    turns = [next_probe_tokens(spec.thought, 0, [], SUFFIX_TOKENS) for _ in ends]
    num_waves = 0
    for _ in ends:
        program.start_branch()
    time = 0

    def is_over() -> bool:
        return program.reason is not None or program.speaker is not None

    while not is_over():
        thinking = [i for i, branch in enumerate(program.branches) if branch.is_thought_open]
        time = min(min(ends[i] for i in thinking), min(turn for turn in _due(turns, thinking, time)))
        for i in thinking:
            if ends[i] == time and not is_over():
                program.count(i, asked.thoughts[i].answer, time, key=asked.thoughts[i].answer)
        thinking = [i for i in thinking if ends[i] > time]
        wave = [] if is_over() else chains_to_ask({i for i in thinking if turns[i] <= time}, thinking)
        num_waves += bool(wave)
        for i in wave:
            costs[i].append(PROBE_TOKENS)
            seen = [trial for trial in asked.thoughts[i].trials if trial.num_tokens <= time]
            last = seen[-1] if seen else Trial(None, None, 0.0, time)
            if not is_over() and program.see_trial(i, Trial(last.answer, last.key, last.probability, time)) == i:
                ends[i] = time
                if program.speaker is None:
                    program.count(i, last.answer, time, key=last.key)
        for i in wave:
            if grows:
                is_far = waits and chains.is_far
                turns[i] = next_turn_tokens(spec.thought, time, costs[i], SUFFIX_TOKENS, is_far=is_far)
            else:
                turns[i] = next_probe_tokens(spec.thought, time, costs[i], SUFFIX_TOKENS)
    winner = program.winner if program.speaker is None else program.speaker
    assert winner is not None
    answer = program.branches[winner].key or program.branches[winner].trials[-1].key
    assert answer is not None
    outcome = Outcome(answer, sum(min(end, time) for end in ends), time)
    return Waves(outcome, sum(map(len, costs)), num_waves)


def _due(turns: list[int], thinking: list[int], time: int) -> list[int]:
    """When chains come to their turn from now on; one that is late waits for others, and comes with the next of them."""
    return [turns[i] for i in thinking if turns[i] > time] or [max(turns) + 10**9]
