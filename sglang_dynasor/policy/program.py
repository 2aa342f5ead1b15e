"""A program: its branches, their votes, and the one place that decides whether it goes on.

Pure policy: it knows no engine. The engine (and a simulator) tells it what happened and does what it answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sglang_dynasor.policy.allocation import votes_needed
from sglang_dynasor.policy.branch import Branch, BranchState, Ending
from sglang_dynasor.policy.budget import branch_worth
from sglang_dynasor.policy.certaindex import overtake_risk
from sglang_dynasor.policy.chains import Chains
from sglang_dynasor.policy.comparison import Comparisons
from sglang_dynasor.policy.confidence import Confidence, warmup_branches, weak_level
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mean import Mean, cheapness
from sglang_dynasor.policy.mixture import NO_MIXTURE, Answers, Said
from sglang_dynasor.policy.record import record_of
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.standing import NO_STANDING
from sglang_dynasor.policy.thought import Trial
from sglang_dynasor.policy.votes import Votes

if TYPE_CHECKING:
    from sglang_dynasor.policy.shared_budget import SharedBudget


class StopReason(StrEnum):
    CERTAIN = "certain"  # the stopping rule fired before every branch was used
    CAP = "cap"  # every branch allowed has finished
    DEADLINE = "deadline"  # its time is up: the best so far
    OPERATOR = "operator"  # who runs the server wants its answer now: the best so far
    BUDGET = "budget"  # the tokens that it shares are used up, or worth nothing to it: the best so far
    PRICE = "price"  # under the load one more branch was not worth its price: the best so far
    ABORTED = "aborted"  # its client or a time-out gave it up: what there was
    FAILED = "failed"  # no branch is left that could finish


@dataclass(slots=True)
class Program:
    """One question being reasoned about.

    A branch is known by its index, given out in order. `reason` is None while the program goes on; it never changes
    once set.
    """

    id: str
    spec: ProgramSpec
    branches: list[Branch] = field(default_factory=list[Branch])
    votes: Votes = field(init=False)  # of its branches, by index
    comparisons: Comparisons = field(init=False)  # of its answers
    chains: Chains | None = field(init=False)  # its branches, where they are thoughts
    answers: Answers = field(default_factory=Answers)  # that its branches say, running ones too
    warmup: list[float] = field(default_factory=list[float])  # lowest confidences of the first branches to finish
    finished_tokens: list[int] = field(default_factory=list[int])  # lengths of the branches that came to their own end
    num_in_flight: int = 0
    most_in_flight: int = 0
    num_failed: int = 0
    num_judge_tokens: int = 0  # that its judges computed
    num_probes: int = 0
    num_probe_tokens: int = 0  # that its probes computed
    usual_tokens: Mean | None = None  # the server's mean length of a branch; None: not known
    constraint: str = ""  # the grammar of its texts, as the sampling parameter is called
    is_closed: bool = False  # no branch is started any more: the engine gave one up
    gang: int = 0  # branches admitted together at first
    overtaken_tokens: int = 0  # service given to later arrivals before its newest branches started
    budget: SharedBudget | None = None  # that it shares
    budget_number: int = 0  # its place in that
    granted: int | None = None  # branches that its budget lets it start now; None: it has none
    price: float | None = None  # of a branch when it was asked for last; None: branches have none
    reason: StopReason | None = None
    _gathered: tuple[tuple[float, ...], Evidence] | None = None  # the evidence, and what it was gathered of
    _needed: tuple[Evidence, int] | None = None  # the votes needed, and the evidence that says so

    def __post_init__(self) -> None:
        self.votes = Votes(self.spec.vote)
        self.comparisons = Comparisons(self.spec.comparer)
        self.chains = Chains(self.branches, self.spec) if self.spec.thought is not None else None

    def start_branch(self) -> int:
        """Count one more branch as in flight and return its index."""
        confidence = Confidence(self.spec.group_tokens) if self.spec.needs_statistics else None
        self.branches.append(Branch(confidence=confidence))
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        if self.granted is not None:
            self.granted -= 1
        if self.budget is not None:
            self.budget.note_start(self.budget_number)
        return len(self.branches) - 1

    @property
    def speaker(self) -> int | None:
        """The branch that answers for the program since thoughts were closed; None: nobody yet."""
        return None if self.chains is None else self.chains.speaker

    @property
    def num_allowed(self) -> int:
        """Branches that the cap still allows; none once decided or closed."""
        if self.reason is not None or self.is_closed or self.speaker is not None:
            return 0
        return self.spec.branches - len(self.branches)

    @property
    def num_unused(self) -> int:
        """Branches that may be started now: those that the cap allows, and its budget."""
        return self.num_allowed if self.granted is None else min(self.granted, self.num_allowed)

    @property
    def votes_needed(self) -> int:
        """The fewest votes that could decide; 0 if none short of the cap could (allocation.py)."""
        evidence = self.evidence
        if self._needed is None or self._needed[0] is not evidence:
            near = 1 if self._needed is None else self._needed[1] - 1  # one more has agreed, mostly
            self._needed = evidence, votes_needed(evidence, self.spec.stop, near)
        return self._needed[1]

    @property
    def needs_all(self) -> bool:
        """Whether every branch that the cap leaves is needed, whatever they say: nothing short of the cap decides."""
        return not self.votes_needed and not self.evidence.is_contested

    def num_to_start(self, width: int, *, is_fixed: bool = False) -> tuple[int, int]:
        """Branches to start now where `width` may be in flight, as (wanted, least).

        Wanted is never fewer than could decide (unless the width is fixed by the operator), nor more than the cap leaves
        or the client's own width allows. Least is what only makes sense together: where nothing is in flight, those
        that could decide (all wanted, if none short of the cap could); else one.
        """
        needed = self.votes_needed
        in_flight = min(width if is_fixed else max(width, needed), self.spec.width or self.spec.branches)
        wanted = max(0, min(in_flight - self.num_in_flight, self.num_unused))
        return wanted, min(wanted, 1 if self.num_in_flight else needed or wanted)

    @property
    def evidence(self) -> Evidence:
        """What the rule may look at. Gathered once per change: order, width and gang ask for it many times."""
        usual_tokens = 0.0 if self.usual_tokens is None else self.usual_tokens.value
        key = (
            len(self.votes.recent), len(self.comparisons.merges), self.num_failed, len(self.branches), self.is_closed,
            self.answers.num_changes, usual_tokens, 0 if self.chains is None else self.chains.num_heard,
        )  # fmt: skip
        if self._gathered is None or self._gathered[0] != key:
            self._gathered = key, self._gather()
        return self._gathered[1]

    def _gather(self) -> Evidence:
        num_left = self._num_unheard if self.is_closed else self._num_open
        mixture = NO_MIXTURE
        answered = self.answers.branches
        if answered and self.votes.voters and any(i in answered for i in self.votes.ranking[0]):
            mixture = self.answers.mixture
        standing = NO_STANDING if self.chains is None else self.chains.look()
        return self.votes.evidence(
            num_left, mixture, num_in_flight=self._num_unheard, cheapness=self._cheapness, standing=standing
        )  # fmt: skip

    @property
    def _num_unheard(self) -> int:
        """Branches started that have neither voted nor failed: in flight, or ended by the decision."""
        return len(self.branches) - self.num_failed - len(self.votes.recent)

    @property
    def _cheapness(self) -> float:
        """What its branches cost beside the server's (mean.py)."""
        return 1.0 if self.usual_tokens is None else cheapness(self.finished_tokens, self.usual_tokens.value)

    @property
    def _num_open(self) -> int:
        """Branches of the cap that have neither voted nor failed."""
        return self.spec.branches - self.num_failed - len(self.votes.recent)

    @property
    def weak_level(self) -> float | None:
        """The confidence below which a running branch is weak (confidence.py); None until enough have finished."""
        if len(self.warmup) < warmup_branches(self.spec.branches):
            return None
        return weak_level(self.warmup, self.spec.weak_frac)

    @property
    def winner(self) -> int | None:
        """The earliest branch that gave the leading answer; of tied answers, that of the earliest branch.

        With vote "best" the branch of the highest reward; of a long chain of thought the one that was closed to answer, if it
        did. Where chains decided while they thought, their answer leads. Not the first to finish, which would depend on the
        load. Where nobody voted, the same of all finished branches; None where none finished.
        """
        voters = self.votes.voters
        who = [] if self.chains is None else self.chains.answering(voters)
        if not who and voters:
            who = self.votes.ranking[0]
        elif not who:
            who = [i for i, branch in enumerate(self.branches) if branch.state is BranchState.FINISHED]
        return self._speaks_for(who) if who else None

    @property
    def speakers(self) -> set[int]:
        """The branch of each answer that would be the winner if that answer led."""
        return {self._speaks_for(who) for who in self.votes.voters.values()}

    def _speaks_for(self, who: list[int]) -> int:
        if self.spec.vote == "best":
            return max(who, key=lambda i: (self.branches[i].reward or 0.0, -i))
        return min(who)

    @property
    def certaindex(self) -> float:
        """How sure it is, in [0, 1]: 1 - risk, the best reward (`AlgorithmRecord.is_sure_by_reward`), or the share of chains that
        decided while they thought."""
        if self.chains is not None and self.chains.verdict is not None:
            winner = self.winner
            if self.reason is None or (winner is not None and self.branches[winner].key == self.chains.verdict):
                return self.chains.standing.share
        if self.spec.about.is_sure_by_reward:
            return max((branch.reward or 0.0 for branch in self.branches), default=0.0)
        return 1.0 - self.risk

    @property
    def risk(self) -> float:
        """Bound on the chance that the branches left would change the answer; once all are used, that as many again would."""
        evidence = self.evidence
        num_left = self.spec.branches if self.reason is StopReason.CAP else evidence.num_left
        return overtake_risk(evidence.counts, evidence.abstentions, num_left, evidence.trust)

    def finish(
        self, index: int, text: str, num_tokens: int, reward: float | None = None, *, lead: str = "", ending: Ending | None = None
    ) -> None:  # fmt: skip
        """Branch `index` came to its own end with this text, after `lead`. One that ends after the decision does not vote.

        Whatever is raised in reading the text or by the rule, the branch has been counted: unread, it abstained.
        """
        answer, ending = None, ending or Ending()
        try:
            if self.reason is None:
                end = "" if self.spec.thought is None else self.spec.thought.end.strip()  # where the client names it
                answer = self.branches[index].read(
                    text, self.spec.answer, lead=lead, think_end=end, is_cut=ending.is_cut
                )
        finally:
            self.count(index, answer, num_tokens, reward, ending=ending)

    def count(
        self, index: int, answer: str | None, num_tokens: int, reward: float | None = None, *, ending: Ending | None = None,
        key: str | None = None,
    ) -> None:  # fmt: skip
        """As `finish`, where the branch's answer has been read already; None: an abstention. `key`, if somebody has found that too.

        One that was to speak for chains that had decided, and did not come to its answer, gives that of its trial.
        """
        branch = self._leave(index, BranchState.FINISHED, num_tokens)
        branch.reward, branch.ending = reward, ending
        if answer is None and index == self.speaker and self.chains is not None and self.chains.verdict is not None:
            answer, key = branch.trials[-1].answer, branch.trials[-1].key
        if self.reason is not None:  # it does not vote; but who was to speak still does
            if index == self.speaker:
                branch.answer, branch.key = answer, key
            return
        lowest = None if branch.confidence is None else branch.confidence.lowest
        if lowest is not None and len(self.warmup) < warmup_branches(self.spec.branches):
            self.warmup.append(lowest)
        branch.answer = answer
        try:
            if answer is not None:
                branch.key = self.votes.root(key or answer_key(answer, self.spec.equal, self.spec.answer))
        finally:
            self.votes.cast(index, branch.key, reward=reward, confidence=lowest)
            self.comparisons.see(index, self.branches, self.votes)
            if self.chains is not None:
                self.chains.hear(index, num_tokens)
            if index == self.speaker:
                self.reason = StopReason.CERTAIN
            else:
                self._stop_if_used_up()
        if index != self.speaker:
            self._stop_if_certain()

    def settle(self, index: int, into: int | None, score: float | None = None) -> None:
        """The answer of branch `index` was compared: it is that of branch `into`, or of nobody. Then the rule is asked again."""
        if self.reason is None:
            self.comparisons.settle(index, into, score, self.branches, self.votes)
            self._stop_if_used_up()
            self._stop_if_certain()
            if self.budget is not None:
                self.budget.note_change(self.budget_number)

    def may_close(self, index: int) -> bool:
        """Whether the next trial of branch `index` could close a thought: its own, or where an answer leads that of who speaks for it."""
        return self.chains is not None and self.chains.may_close(index)

    def see_trial(self, index: int, trial: Trial) -> int | None:
        """Branch `index` was asked for its answer. Returns the branch whose thought is to be closed now, at its `closed_at`; or None.

        Where the rule says of all chains that they have decided, one of them answers and the others are no longer needed: where
        one has finished with that answer `reason` is set, else `speaker`, a running one, which may be writing it already.
        """
        chains = self.chains
        if chains is None or self.reason is not None or not chains.take(index, trial):
            return None
        if not chains.decide_together or not self.spec.stop.stops(self.evidence):
            return chains.settle(index)
        if not chains.have_answer(self.votes.voters, self.evidence):
            return chains.speak()
        chains.decide()
        self.reason = StopReason.CERTAIN
        return None

    def mix_answers(self, said: Said, num: int, entropy: float) -> None:
        """The device has mixed what `num` branches said there."""
        if self.answers.tell(said, num, entropy):
            self._stop_by_answers()

    def end_answer(self, index: int, said: Said) -> None:
        """Branch `index`, running still, has said its answer to its end: `said`, and a last token."""
        self.answers.end(index, said)
        self._stop_by_answers()

    def _stop_by_answers(self) -> None:
        if self.reason is None and self.spec.stop.reads_answers:
            self._stop_if_certain()

    def weaken(self, index: int, num_tokens: int) -> None:
        """Branch `index` was ended for its low confidence: it abstains, and its place in the cap is used."""
        self._leave(index, BranchState.WEAK, num_tokens)
        self.answers.forget(index)
        if self.reason is None:
            self.votes.cast(index, None)
            self._stop_if_used_up()
            self._stop_if_certain()

    def end(self, index: int, num_tokens: int) -> None:
        """Branch `index` was ended because the program no longer needs it."""
        self._leave(index, BranchState.ENDED, num_tokens)

    def fail(self, index: int, num_tokens: int, *, closes: bool) -> None:
        """The engine gave branch `index` up (time-out, full queue, abort); the cap shrinks by one.

        With `closes` no replacement is started, so that a time-out holds for the program and not for each branch in turn.
        """
        self._leave(index, BranchState.FAILED, num_tokens)
        self.answers.forget(index)
        self.num_failed += 1
        self.is_closed |= closes
        if self.reason is None:
            self._stop_if_used_up()
            self._stop_if_certain()

    def _leave(self, index: int, state: BranchState, num_tokens: int) -> Branch:
        branch = self.branches[index]
        if branch.state is not BranchState.IN_FLIGHT:
            raise ValueError(f"branch {index} of program {self.id} is already {branch.state}")
        branch.state, branch.num_tokens = state, num_tokens
        if state is BranchState.FINISHED:
            self.finished_tokens.append(num_tokens)
        if branch.confidence is not None:
            branch.confidence.close()
        self.num_in_flight -= 1
        if self.reason is not None and not self.num_in_flight:
            self.answers.close()
        if self.budget is not None:
            self.budget.settle(self.budget_number, num_tokens, is_whole=state is BranchState.FINISHED)
        return branch

    def give_up(self, reason: StopReason) -> bool:
        """End undecided, with the answer that leads. Returns whether it does: not while a branch runs or answers are compared."""
        if self.reason is not None or self.num_in_flight or self._is_open:
            return False
        self.reason = reason if self.votes.recent else StopReason.FAILED
        return True

    @property
    def has_price(self) -> bool:
        """Whether it may end because its next branch is not worth a price: somebody has voted, and votes decide."""
        is_judgeable = self.reason is None and bool(self.votes.voters) and not self._is_open
        return is_judgeable and self.spec.thought is None and self.spec.vote != "best"

    def end_if_dear(self, price: float) -> None:
        """End where the next branch to finish is worth less than `price` (budget.py)."""
        self.price = price
        if branch_worth(self.evidence) < price:
            self.reason = StopReason.PRICE

    @property
    def _is_open(self) -> bool:
        """Whether answers are compared whose finding could change the one that leads: then it waits for that."""
        return self.comparisons.may_change_leader(self.votes)

    def _stop_if_certain(self) -> None:
        if (
            self.reason is not None
            or self.speaker is not None
            or self._is_open
            or not self.spec.stop.stops(self.evidence)
        ):
            return
        if self.chains is not None:
            if not self.chains.have_answer(self.votes.voters, self.evidence):
                return  # a running chain is to speak: who, the next trial says
            self.chains.decide()
        self.reason = StopReason.CERTAIN

    def _stop_if_used_up(self) -> None:
        is_used_up = self.num_in_flight == 0 and (self.is_closed or len(self.branches) == self.spec.branches)
        if is_used_up and not self._is_open:
            self.reason = StopReason.CAP if self.votes.recent else StopReason.FAILED

    def record(self) -> dict[str, Any]:
        """What the client and the operator are told; JSON. Keys are explained in docs/reference.md."""
        if self.reason is not None:
            self.answers.close()
        return record_of(self)
