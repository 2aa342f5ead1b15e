"""What a program would have made of samples that are there: the engine's own policy, on a server that does not have it.

Samples run side by side, a token each in every step, and end when they have as many as they had. Those that finish vote, in
that order; what the program no longer needs is ended, and what it starts is what its policy says.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dynasor.bench.ways import Sample, Solved
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import ProgramSpec

NUM_ORDERS = 4  # in which samples are taken, where not all start at once


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a program went."""

    program: Program
    num_steps: int  # until it was decided


def replay(samples: Sequence[Sample], spec: ProgramSpec, width: int, usual_tokens: float) -> Replayed:
    """One program whose branches are these samples, in this order.

    Args:
        spec: with a cap of as many.
        width: branches that may be in flight; the program starts more where fewer could not decide.
        usual_tokens: the server's mean length of a branch.
    """
    program = Program("replay", spec, usual_tokens=Mean(usual_tokens))
    running: list[tuple[int, int]] = []  # the step in which each ends, and which
    began: dict[int, int] = {}
    step = 0
    while True:
        for _ in range(program.num_to_start(width)[0]):
            index = program.start_branch()
            began[index] = step
            heapq.heappush(running, (step + samples[index].num_tokens, index))
        if not running:
            return Replayed(program, step)
        step, index = heapq.heappop(running)
        sample = samples[index]
        program.count(index, sample.answer, sample.num_tokens, ending=Ending(sample.is_cut), key=sample.key)
        if program.reason is not None:
            for _, other in running:
                program.end(other, step - began[other])
            return Replayed(program, step)


def replayed(stock: Solved, spec: ProgramSpec, width: int, usual_tokens: float) -> Solved:
    """What a program would have made of stock's samples: the mean over NUM_ORDERS of them, where not all start at once.

    Its latency is stock's for as many of its steps as the program took, where all branches start at once; else it is not known,
    as steps with fewer rows are faster.
    """
    samples = stock.samples
    is_wide = width >= len(samples)
    turns = 1 if is_wide else NUM_ORDERS
    keys: list[str | None] = []
    tokens = steps = branches = 0
    for turn in range(turns):
        first = turn * len(samples) // turns
        run = replay([*samples[first:], *samples[:first]], spec, width, usual_tokens)
        program, winner = run.program, run.program.winner
        keys.append(None if winner is None else program.branches[winner].key)
        tokens += sum(branch.num_tokens for branch in program.branches)
        branches += len(program.branches)
        steps += run.num_steps
    latency_s = None
    if is_wide and stock.latency_s is not None:
        latency_s = stock.latency_s * steps / max(1, *(sample.num_tokens for sample in samples))
    return Solved(tuple(keys), tokens / turns, latency_s, branches / turns)
