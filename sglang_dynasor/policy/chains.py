"""Several thoughts of one program: what they say together while they think, for how long, and who speaks for them.

Every chain has one unit. A finished one gives it to its answer, a running one to that of its latest trial, if that is likelier
than not; one that abstains, hesitates, is in doubt, was not asked yet or has not started gives it to nobody. The share of an
answer is of all chains that the program may use: a few that answer early decide nothing, nor do few because the engine is full.
docs/long_cot.md has what the numbers here were measured to bring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dynasor.policy.branch import Branch, BranchState
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.standing import NO_STANDING, Standing
from sglang_dynasor.policy.thought import Trial, is_likely, is_settled, may_settle, next_probe_tokens
from sglang_dynasor.policy.thought_spec import ThoughtSpec
from sglang_dynasor.policy.wave import is_far, next_turn_tokens

ASKED_FRAC = 0.8  # of all chains, that must have been asked or have finished before their shares count
FRESH_FRAC = 0.5  # of the chains that think, that must have been asked again while the leader was held


class Moment(NamedTuple):
    """A change of what the chains say."""

    tokens: int  # that the chains have thought since the first of them was asked
    leader: str | None
    share: float


class _Heard(NamedTuple):
    num_tokens: int  # of a chain, when it was heard of last
    clock: int  # then


@dataclass(slots=True)
class Chains:
    """The thoughts of one program, one or several.

    `clock` counts tokens that chains have thought side by side since the first of them was asked: the time of a chain that has
    thought from then on. Chains may begin late, wait, or end: the one that got on furthest since it was heard of last tells.
    """

    branches: list[Branch]  # the program's own
    spec: ProgramSpec
    speaker: int | None = None  # who answers for the program, its thought being closed
    clock: int = 0
    moments: list[Moment] = field(default_factory=list[Moment])
    standing: Standing = NO_STANDING  # now; once they have decided, what it was then
    num_heard: int = 0  # times that one was heard of
    is_decided: bool = False
    verdict: str | None = None  # the answer that they decided for while they thought; None: they did not, or votes did
    written: dict[str, str] = field(default_factory=dict[str, str])  # each key's answer as it was written first
    _heard: dict[int, _Heard] = field(default_factory=dict[int, _Heard])
    _since: int = 0  # by the clock, when the leader came to its share
    _held: str | None = None  # the leader that has its share now

    @property
    def decide_together(self) -> bool:
        """Whether what they say while they think may end the program."""
        return self.spec.stop.uses("trials")

    @property
    def are_asked_together(self) -> bool:
        """Whether each waits for its turn until others have come to theirs (wave.py); not where each is asked after its own word."""
        return self.decide_together and not self._thought.word

    @property
    def is_holding(self) -> bool:
        """Whether an answer has its share now: then what is said next may decide."""
        return self._held is not None

    def may_close(self, index: int) -> bool:
        """Whether what chain `index` says next could close a thought: its own, or, where an answer has its share, the speaker's."""
        may_itself = self._thought.settles and may_settle(self.branches[index].trials, self._thought)
        return may_itself or self.is_holding

    def next_turn_tokens(self, num_tokens: int, costs: Sequence[int], num_suffix_tokens: int) -> int:
        """The length in tokens, at least 1, from which on a chain is asked next; the arguments are `next_probe_tokens`'s."""
        if not self.decide_together:
            return next_probe_tokens(self._thought, num_tokens, costs, num_suffix_tokens)
        return next_turn_tokens(self._thought, num_tokens, costs, num_suffix_tokens, is_far=self.is_far)

    @property
    def is_far(self) -> bool:
        """Whether what they say when they are asked next can hardly end the program (wave.py)."""
        share = self.spec.stop.level_of("trials")
        if share is None:
            return False
        finished = Counter(
            branch.key for branch in self.branches if branch.state is BranchState.FINISHED and branch.key
        )
        num_open = self._num_chains - sum(branch.state is BranchState.FINISHED for branch in self.branches)
        return is_far(self.standing.counts, max(finished.values(), default=0), num_open, self._num_chains, share)

    @property
    def _num_chains(self) -> int:
        return self.spec.branches - sum(branch.state is BranchState.FAILED for branch in self.branches)

    def take(self, index: int, trial: Trial) -> bool:
        """Chain `index` was asked. Returns whether that counts: not of a thought that was closed, nor once somebody speaks."""
        branch = self.branches[index]
        if self.speaker is not None or branch.closed_at is not None:
            return False
        branch.trials.append(trial)
        self.hear(index, trial.num_tokens)
        return True

    def settle(self, index: int) -> int | None:
        """Close the thought of chain `index`, which was asked, if its own trials do that and have settled. Returns it if so."""
        if not self._thought.settles or not is_settled(self.branches[index].trials, self._thought):
            return None
        if self.spec.branches == 1:
            self.speaker = index
        return self._close(index)

    @property
    def held_answer(self) -> str | None:
        """The key of the answer that has its share, and has had it for long enough; None: no answer has."""
        standing, share = self.standing, self.spec.stop.level_of("trials")
        return standing.leader if share is not None and standing.is_held and standing.share >= share else None

    def have_answer(self, voters: Mapping[str, list[int]], evidence: Evidence) -> bool:
        """Whether a finished chain has given the answer that was decided for: that all chains hold, else that the vote leads to."""
        if (held := self.held_answer) is not None:
            return held in voters
        return evidence.lead > 0 and not evidence.is_contested

    def answering(self, voters: Mapping[str, list[int]]) -> list[int]:
        """The chains of which one is the program's answer: who was to speak, if it has, else who gave what was decided.

        Empty where the vote alone says.
        """
        if self.speaker is not None:
            branch = self.branches[self.speaker]
            if branch.state is BranchState.FINISHED and (branch.key is not None or not voters):
                return [self.speaker]
        return [] if self.verdict is None else voters.get(self.verdict, [])

    def decide(self) -> None:
        """They have decided, by what they say together or by the votes of finished ones; from here on their standing stays."""
        self.is_decided, self.verdict = True, self.held_answer

    def speak(self) -> int | None:
        """They have decided: let one speak. Returns it if its thought is to be closed for that; None where nobody can, or one
        is writing the answer already."""
        self.speaker = self._choose()
        if self.speaker is None:
            return None
        self.decide()
        return self._close(self.speaker) if self.branches[self.speaker].is_thought_open else None

    def _close(self, index: int) -> int:
        """Where it was asked last: the answer follows the text that was tried."""
        branch = self.branches[index]
        branch.closed_at = branch.trials[-1].num_tokens
        return index

    @property
    def _thought(self) -> ThoughtSpec:
        assert self.spec.thought is not None
        return self.spec.thought

    def hear(self, index: int, num_tokens: int) -> None:
        """Chain `index` was asked, or came to its end, with so many tokens; its branch says what it answers."""
        before = self._heard.get(index)
        if before is not None:
            self.clock += max(0, num_tokens - before.num_tokens - (self.clock - before.clock))
        self._heard[index] = _Heard(num_tokens, self.clock)
        self.num_heard += 1
        self._note_answer(self.branches[index])
        self.look()

    def _note_answer(self, branch: Branch) -> None:
        """What a chain says in its own words."""
        said = branch if branch.state is BranchState.FINISHED else branch.trials[-1]
        if said.key is not None and said.answer is not None:
            self.written.setdefault(said.key, said.answer)

    def look(self) -> Standing:
        """What they say now: counted again, as a chain may have been heard of, or failed."""
        least_share = self.spec.stop.level_of("trials")
        if least_share is None or self.is_decided or not self._heard:
            return self.standing
        units = Counter(key for branch in self.branches if (key := says(branch)) is not None)
        counts = tuple(sorted(units.values(), reverse=True))
        leader = next((key for key, num in units.items() if num == counts[0]), None)
        if counts[1:2] == counts[:1]:
            leader = None
        now = Standing(leader, counts, self._num_chains)
        num_asked = sum(
            branch.state is BranchState.FINISHED or (branch.state is BranchState.IN_FLIGHT and bool(branch.trials))
            for branch in self.branches
        )
        has_share = num_asked >= ASKED_FRAC * self._num_chains and now.share >= least_share
        held = leader if has_share else None
        if held is None or held != self._held:
            self._held, self._since = held, self.clock
        self.standing = now._replace(is_held=held is not None and self._is_held)
        if not self.moments or self.moments[-1][1:] != (leader, now.share):
            self.moments.append(Moment(self.clock, leader, now.share))
        return self.standing

    @property
    def _is_held(self) -> bool:
        if self.clock < self._since + self._thought.hold_tokens:
            return False
        thinking = [i for i, branch in enumerate(self.branches) if branch.is_thought_open]
        num_fresh = sum(i in self._heard and self._heard[i].clock > self._since for i in thinking)
        return num_fresh >= FRESH_FRAC * len(thinking)

    def _choose(self) -> int | None:
        """Of the running chains that give the leader their unit one that is writing its answer already, else the one that had
        thought most when it was asked; of equals the earliest."""
        leader = self.standing.leader
        giving = [
            i
            for i, branch in enumerate(self.branches)
            if branch.state is BranchState.IN_FLIGHT and leader is not None and says(branch) == leader
        ]
        return max(
            giving,
            key=lambda i: (self.branches[i].closed_at is not None, self.branches[i].trials[-1].num_tokens, -i),
            default=None,
        )


def says(branch: Branch) -> str | None:
    """The key of the answer that a chain gives its unit to; None: to nobody."""
    if branch.state is BranchState.FINISHED:
        return branch.key
    if branch.state is not BranchState.IN_FLIGHT or not branch.trials or not is_likely(branch.trials[-1]):
        return None
    return branch.trials[-1].key
