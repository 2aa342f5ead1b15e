"""A budget that programs share: who may start a branch, what is spent, and when programs end."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.observe.ledger import FEWEST_BRANCHES, BudgetBook
from sglang_dynasor.policy.budget import MOST_PASSED, Budget, branch_worth
from sglang_dynasor.policy.budget_spec import BudgetSpec
from sglang_dynasor.policy.evidence import Evidence
from sglang_dynasor.policy.mean import Mean
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.shared_budget import HOLD, MOST_ENDED, SharedBudget, SharedBudgets
from sglang_dynasor.policy.spec import parse_field

MOST_TOKENS = 200


@dataclass(eq=False)
class Job:
    """A program with the branches that it would sample, and what of them runs."""

    program: Program
    samples: list[tuple[str | None, int]]  # answer, tokens
    running: dict[int, int] = field(default_factory=dict)  # branch: tokens so far

    @property
    def progress_tokens(self) -> int:
        return sum(self.running.values())


def job(samples: list[tuple[str | None, int]], stop: str = "careful", usual: Mean | None = None) -> Job:
    spec = parse_field({"branches": len(samples), "stop": stop}, 64)
    return Job(Program("p", spec, usual_tokens=usual or Mean(50.0)), samples)


@dataclass
class Table:
    """An engine of so many rows that gives every branch a token a step, and notes what it saw."""

    budget: SharedBudget
    rows: int = 64
    jobs: list[Job] = field(default_factory=list)
    num_tokens: int = 0
    most_at_once: int = 0
    most_over: float = 0.0  # spent beyond the budget, less what was in flight when it was overdrawn

    def come(self, one: Job) -> None:
        self.budget.join(one.program, one, MOST_TOKENS)
        self.jobs.append(one)

    def step(self) -> bool:
        """Returns whether anything runs or was started."""
        while self.budget.due:
            self.budget.share_out(self.rows, lambda owner: owner.progress_tokens)
        for one in self.jobs:
            if one.program.reason is not None:
                self.over(one)
        free = self.rows - sum(len(one.running) for one in self.jobs)
        for one in self.jobs:
            wanted, _ = one.program.num_to_start(64)
            for _ in range(min(wanted, free)):
                one.running[one.program.start_branch()] = 0
                free -= 1
        self.most_at_once = max(self.most_at_once, sum(len(one.running) for one in self.jobs))
        is_busy = any(one.running for one in self.jobs)
        for one in self.jobs:
            for index in list(one.running):
                one.running[index] += 1
                self.num_tokens += 1
                answer, length = one.samples[index]
                if one.running[index] == length:
                    del one.running[index]
                    one.program.count(index, answer, length)
        return is_busy

    def over(self, one: Job) -> None:
        """What still runs of a decided program ends."""
        for index, tokens in one.running.items():
            one.program.end(index, tokens)
        one.running.clear()
        self.budget.leave(one.program.budget_number)

    def run(self) -> None:
        while self.step() or self.budget.due:
            pass


def easy(cap: int, length: int = 40) -> Job:
    return job([("7", length)] * cap)


def hard(cap: int, length: int = 40) -> Job:
    return job([(str(i % 3), length) for i in range(cap)])


def test_hard_questions_get_what_easy_ones_leave() -> None:
    """Twelve easy ones and four hard ones share what four branches of each would take."""
    table = Table(SharedBudget(16 * 4 * 40, 16))
    jobs = [hard(16) if i % 4 == 3 else easy(16) for i in range(16)]
    for one in jobs:
        table.come(one)
    table.run()
    branches = [len(one.program.branches) for one in jobs]
    assert table.num_tokens <= 16 * 4 * 40
    assert max(num for i, num in enumerate(branches) if i % 4 != 3) < min(branches[3::4])
    assert min(branches[3::4]) > 4
    assert all(one.program.reason in (StopReason.CERTAIN, StopReason.BUDGET, StopReason.CAP) for one in jobs)
    assert any(one.program.reason is StopReason.BUDGET for one in jobs)


def test_a_budget_that_is_large_ends_nobody() -> None:
    """Each goes on to its rule or its cap, as without one."""
    table = Table(SharedBudget(10**6, 8))
    jobs = [hard(8) if i % 2 else easy(8) for i in range(8)]
    for one in jobs:
        table.come(one)
    table.run()
    assert [one.program.reason for one in jobs] == [StopReason.CERTAIN, StopReason.CAP] * 4


def test_what_could_change_nothing_is_not_bought() -> None:
    """Though there is enough, and its rule would go on to the cap: five of eight agree."""
    table = Table(SharedBudget(10**6, 2))
    table.come(sure := job([("7", 40)] * 8, stop="never"))
    table.come(unsure := job([(str(i), 40) for i in range(8)], stop="never"))
    table.run()
    assert (sure.program.reason, len(sure.program.branches)) == (StopReason.BUDGET, 5)
    assert (unsure.program.reason, len(unsure.program.branches)) == (StopReason.CAP, 8)


def test_every_question_has_a_branch_whatever_is_left() -> None:
    """Also where first branches alone take more than there is; then nobody gets a second one."""
    table = Table(SharedBudget(40, 16))
    for _ in range(16):
        table.come(hard(8))
    table.run()
    assert all(len(one.program.branches) == 1 for one in table.jobs)
    assert all(one.program.reason is StopReason.BUDGET and one.program.winner == 0 for one in table.jobs)
    assert table.budget.left_tokens == 40 - 16 * 40


def test_few_run_beside_each_other_beyond_first_branches() -> None:
    """All first ones at once; then one of each program, and of a quarter of them at most."""
    table = Table(SharedBudget(10**6, 16))
    for _ in range(16):
        table.come(hard(8))
    table.step()
    assert table.most_at_once == 16
    later = 0
    while table.step():
        running = [len(one.running) for one in table.jobs]
        assert max(running) <= 1
        if all(len(one.program.branches) > 1 or not one.running for one in table.jobs):
            later = max(later, sum(running))
    assert 0 < later <= 4


@pytest.mark.parametrize("rows", [1, 5])
def test_first_branches_come_before_second_ones(rows: int) -> None:
    """Nobody's second branch waits for rows while first ones do."""
    table = Table(SharedBudget(10**6, 20), rows=rows)
    for _ in range(20):
        table.come(hard(4))
    while any(not one.program.branches for one in table.jobs):
        assert all(len(one.program.branches) <= 1 for one in table.jobs)
        assert table.step()


def test_those_that_come_later_keep_their_share() -> None:
    """Of two that were announced the first may spend half, and what the second leaves when that is there."""
    budget = SharedBudget(1000, 2)
    table = Table(budget)
    first = job([(str(i), 40) for i in range(64)], stop="never")
    table.come(first)
    table.run()
    assert first.program.reason is StopReason.BUDGET
    assert 500 - HOLD * 50 < table.num_tokens <= 500
    second = easy(16)
    table.come(second)
    table.run()
    assert second.program.reason is StopReason.CERTAIN
    assert table.num_tokens <= 1000
    assert not budget.members
    assert budget.is_over


def test_what_one_leaves_another_that_waits_gets() -> None:
    """While the easy one has not come to its end the hard one waits; then it goes on."""
    table = Table(SharedBudget(2 * 6 * 40, 2))
    table.come(one := job([(str(i), 20) for i in range(32)], stop="never"))
    table.come(easy(16, length=60))
    table.run()
    assert len(one.program.branches) > 6
    assert table.num_tokens <= 480


def test_a_program_that_is_gone_holds_nothing_back() -> None:
    """Its client left while its branch ran: the others go on, and what it held is spent."""
    table = Table(SharedBudget(1000, 2))
    gone, other = hard(16), hard(16)
    table.come(gone)
    table.come(other)
    table.step()
    gone.running.clear()
    table.budget.leave(gone.program.budget_number)
    table.budget.leave(gone.program.budget_number)
    table.jobs.remove(gone)
    table.run()
    assert other.program.reason is StopReason.BUDGET or other.program.reason is StopReason.CAP
    assert table.budget.left_tokens >= 0
    assert table.budget.budget.held_tokens == {}


@pytest.mark.parametrize("num_started", [0, 3])
def test_who_leaves_before_it_starts_spends_nothing(num_started: int) -> None:
    """Three of four are given up in line, or while a branch of theirs runs: then what was held for that is spent."""
    budget = SharedBudget(4000, 4)
    jobs = [job([("1", 100)], usual=Mean(256.0)) for _ in range(4)]
    for one in jobs:
        budget.join(one.program, one, 1000)
    for one in jobs[:num_started]:
        one.program.start_branch()
    for one in jobs[:3]:
        budget.leave(one.program.budget_number)
    jobs[3].program.start_branch()
    jobs[3].program.count(0, "1", 100)
    budget.leave(3)
    assert budget.left_tokens == 3900 - num_started * HOLD * 256
    assert not budget.budget.held_tokens


def test_a_look_asks_only_those_that_run() -> None:
    """However many wait for their first branch."""
    budget, asked = SharedBudget(10**6, 1000), []
    jobs = [hard(16) for _ in range(1000)]
    for one in jobs:
        budget.join(one.program, one, MOST_TOKENS)
    for one in jobs[10:13]:
        one.program.start_branch()

    def look() -> list[Any]:
        asked.clear()
        budget.due[budget] = None
        budget.share_out(64, lambda owner: asked.append(owner) or 90)
        return asked

    class Members(dict[int, Any]):
        num_asked = 0

        def __getitem__(self, number: int) -> Any:
            self.num_asked += 1
            return super().__getitem__(number)

    budget.members = members = Members(budget.members)
    assert look() == jobs[10:13]
    assert members.num_asked <= 3
    assert budget.budget.held_tokens[10] == pytest.approx(90 + 50)
    assert budget.budget.held_tokens[9] == HOLD * 50
    jobs[11].program.count(0, "1", 40)
    jobs[12].program.fail(0, 40, closes=True)
    assert look() == jobs[10:11]


@pytest.mark.parametrize("name", ["offer", "take", "hold"])
def test_a_look_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An exception in its middle loses nobody: the look stays due, and says so."""
    table = Table(SharedBudget(400, 2))
    table.come(hard(16))
    table.come(hard(16))
    stock, num_raised = getattr(Budget, name), 0

    def raising(*args: Any) -> Any:
        nonlocal num_raised
        if table.num_tokens and not num_raised:
            num_raised += 1
            raise ZeroDivisionError
        return stock(*args)

    monkeypatch.setattr(Budget, name, raising)
    while True:
        try:
            table.run()
            break
        except ZeroDivisionError:
            assert table.budget.is_looked_at
    assert num_raised == 1
    assert all(one.program.reason is not None for one in table.jobs)
    table.budget.leave(0)
    table.budget.leave(1)
    table.run()
    assert not table.budget.is_looked_at


def test_so_many_end_in_one_look() -> None:
    """Hundreds would hold up a step; the others end in the next looks."""
    budget = SharedBudget(100, 100)
    table = Table(budget)
    for _ in range(100):
        table.come(hard(4))
    while any(one.running or not one.program.branches for one in table.jobs):
        table.step()
    ended = []
    while budget.due:
        ended.append(len(budget.share_out(64, lambda owner: 0).ended))
    assert ended[:-1] == [MOST_ENDED] * (100 // MOST_ENDED)
    assert sum(ended) == 100


def test_long_branches_are_seen_to_be_long() -> None:
    """What runs beyond what was held is held too, so that others are not started on it."""
    table = Table(SharedBudget(1200, 4))
    slow = job([("1", 900), ("2", 900)])
    table.come(slow)
    for _ in range(3):
        table.come(hard(16, length=20))
    while slow.program.num_in_flight or not slow.program.branches:
        table.step()
    assert table.num_tokens <= 1200 + 50


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 3000),
    st.integers(1, 16),
    st.integers(0, 10**6),
)
def test_it_is_overdrawn_by_no_more_than_was_in_flight(
    kinds: list[tuple[int, int, int]], tokens: int, rows: int, seed: int
) -> None:
    """Whoever comes, whenever, and whatever it samples: everybody has a branch and ends, nothing is held any more; beyond first
    branches no more is spent than the budget and what the branches in flight took beyond what was held for them."""
    draw = random.Random(seed)
    budget = SharedBudget(tokens, len(kinds))
    table = Table(budget, rows=rows)
    waiting = [
        job([(str(draw.randrange(answers)), draw.randint(1, 2 * length)) for _ in range(cap)])
        for answers, length, cap in kinds
    ]
    jobs = list(waiting)
    while waiting or table.step() or budget.due:
        while waiting and draw.random() < 0.3:
            table.come(waiting.pop(0))
        if waiting:
            table.step()
    assert all(one.program.reason is not None for one in jobs)
    assert all(1 <= len(one.program.branches) <= one.program.spec.branches for one in jobs)
    assert not budget.members
    assert not budget.budget.held_tokens
    assert budget.left_tokens == pytest.approx(tokens - table.num_tokens)
    first = sum(one.program.branches[0].num_tokens for one in jobs)
    longest = sorted((branch.num_tokens for one in jobs for branch in one.program.branches), reverse=True)
    assert table.num_tokens <= max(tokens, first) + sum(longest[: max(1, len(jobs) // 4)])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6, unique=True))
def test_the_greatest_worth_goes_first(votes: list[tuple[int, int]]) -> None:
    """One at a time, each to the program whose next branch is worth most then."""
    budget = SharedBudget(10**6, len(votes))
    jobs = []
    for first, second in votes:
        one = job([("1", 40)] * first + [("2", 40)] * second + [("3", 40)] * 8, stop="never")
        budget.join(one.program, one, MOST_TOKENS)
        for _ in range(max(1, first + second)):
            index = one.program.start_branch()
            one.program.count(index, *one.samples[index])
        one.program.granted = 0
        jobs.append(one)
    for _ in range(8):
        worths = {id(one): branch_worth(one.program.evidence) for one in jobs if one.program.num_allowed}
        granted = budget.share_out(64, lambda owner: 0).granted
        if not granted:
            assert not any(worths.values())
            break
        (one,) = granted
        assert worths[id(one)] == max(worths.values())
        index = one.program.start_branch()
        one.program.count(index, *one.samples[index])


# Those of an engine


@pytest.mark.parametrize("is_held", [False, True])
def test_who_can_be_paid_for_is_found_behind_many_who_cannot(is_held: bool) -> None:
    """Where nothing is in flight, and nothing will come back; else a look is bounded."""
    budget = Budget(5_000.0)
    for program in range(MOST_PASSED + 2):
        budget.offer(program, Evidence((1, 1), 0, 4), 8_000.0)
    budget.offer(99, Evidence((3, 1), 0, 4), 1_000.0)
    if is_held:
        budget.hold(50, 10.0)
    assert budget.take() == (None if is_held else 99)


def test_all_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps it takes to end them; again when more is left, or somebody asks for less."""
    budget, evidence = Budget(5_000.0), Evidence((1, 1), 0, 4)
    for program in range(100):
        budget.offer(program, evidence, 8_000.0)
    looked: list[Any] = []
    real = heapq.heappop
    monkeypatch.setattr("sglang_dynasor.policy.budget.heapq.heappop", lambda heap: looked.append(1) or real(heap))
    assert (budget.take(), len(looked)) == (None, 100)
    assert (budget.take(), len(looked)) == (None, 100 + MOST_PASSED)
    budget.offer(100, Evidence((3, 1), 0, 4), 6_000.0)
    budget.left_tokens += 2_000
    assert budget.take() == 100
    budget.settle(100, 2_000)
    budget.offer(101, Evidence((3, 1), 0, 4), 1_000.0)
    assert budget.take() == 101


def test_budgets_are_known_by_id_while_somebody_needs_them() -> None:
    """Programs with one id share; one without has its own; over and forgotten once all that were announced are gone."""
    budgets = SharedBudgets()
    spec = parse_field({"budget_tokens": 100, "budget": "b", "budget_programs": 2}, 64)
    own = parse_field({"budget_tokens": 100}, 64)
    programs = [Program(str(i), each) for i, each in enumerate([spec, own, spec, own])]
    for program in programs:
        assert program.spec.budget is not None
        budgets.join(program.spec.budget, program, program, MOST_TOKENS)
    assert programs[0].budget is programs[2].budget is not programs[1].budget is not programs[3].budget
    assert list(budgets.by_id) == [("", "b")]
    for program in programs:
        budgets.leave(program)
        budgets.leave(program)
    assert not budgets.by_id
    assert not budgets.due


def test_a_program_without_a_budget_is_left_alone() -> None:
    """It starts what its cap allows."""
    program = Program("p", parse_field({}, 64))
    SharedBudgets().leave(program)
    assert program.granted is None
    assert program.num_unused == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_tokens": "9"}, "dynasor.budget_tokens='9' is a str"),
        ({"budget_tokens": 9.5}, "dynasor.budget_tokens=9.5 is a float"),
        ({"budget_tokens": True}, "dynasor.budget_tokens=True is a bool"),
        ({"budget_tokens": -5}, "dynasor.budget_tokens=-5 is below 1"),
        ({"budget_tokens": 0}, "dynasor.budget_tokens=0 is below 1"),
        ({"budget_tokens": 9, "budget": "b"}, "dynasor.budget='b' without dynasor.budget_programs"),
        ({"budget_tokens": 9, "budget_programs": 2}, "dynasor.budget_programs=2 without dynasor.budget"),
        ({"budget": "b", "budget_programs": 2}, "dynasor.budget='b' without dynasor.budget_tokens"),
        ({"budget_tokens": 9, "budget": "b", "budget_programs": 10}, "dynasor.budget_tokens=9 is below one branch per question: 10"),
        ({"budget_tokens": 9, "budget": "b", "budget_programs": 0}, "dynasor.budget_programs=0 is outside"),
        ({"budget_tokens": 9, "budget": "b b", "budget_programs": 2}, "dynasor.budget='b b' is not an id"),
        ({"budget_tokens": 9, "program": "p"}, "dynasor.budget_tokens=9 with dynasor.program='p'"),
        ({"budget_tokens": 9, "vote": "best", "judge": "model"}, "dynasor.budget_tokens=9 with vote 'best'"),
        ({"budget_tokens": 9, "algorithm": "long_cot"}, "dynasor.budget_tokens=9 with algorithm 'long_cot'"),
    ],
)  # fmt: skip
def test_a_wrong_budget_is_named(options: dict[str, Any], message: str) -> None:
    """In one line."""
    with pytest.raises(FieldError) as error:
        parse_field(options, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_right_budget_is_read() -> None:
    """Alone, or shared by so many."""
    assert parse_field({"budget_tokens": 9}, 64).budget == BudgetSpec(9)
    shared = {"budget_tokens": 9, "budget": "b", "budget_programs": 9}
    assert parse_field(shared, 64).budget == BudgetSpec(9, 9, "b")
    assert parse_field({}, 64).budget is None


def shared(tokens: int = 1000, num: int = 10, **more: Any) -> Any:
    return parse_field({"budget_tokens": tokens, "budget": "b", "budget_programs": num, **more}, 64)


class Held:
    """What SGLang holds of a request."""


UNDER_WAY = Held()


def test_a_server_knows_what_a_branch_takes() -> None:
    """Then less than one branch of each is refused; before, and where branches are cut short, it is not."""
    book = BudgetBook(lambda rid: UNDER_WAY)
    record = {"branch_tokens": [120, 120, 7], "finish_reasons": ["stop", "length", "ended"]}
    for _ in range(FEWEST_BRANCHES // 2 - 1):
        book.learn(record)
    book.check(shared(100), 200)
    book = BudgetBook(lambda rid: UNDER_WAY)
    for _ in range(FEWEST_BRANCHES // 2):
        book.learn(record)
    with pytest.raises(FieldError, match=r"budget_tokens=1199 is below one branch per question.*send 1200 or more"):
        book.check(shared(1199), 200)
    with pytest.raises(FieldError, match="below one branch"):  # it was not declared by having been refused
        book.check(shared(1199), None)
    book.check(shared(1199), 100)
    book.check(shared(1199), 100)


def test_a_budget_is_declared_once() -> None:
    """By its tenant, with one number of tokens."""
    book = BudgetBook(lambda rid: UNDER_WAY)
    book.claim("rid", shared(), 200)
    book.claim("rid", shared(stop="fast"), 200)
    with pytest.raises(FieldError, match="declared with budget_tokens=1000 and budget_programs=10"):
        book.claim("rid", shared(999), 200)
    with pytest.raises(FieldError, match="another tenant's"):
        book.claim("rid", shared(tenant="t"), 200)
    own = parse_field({"budget_tokens": 5}, 64)
    book.claim("rid", own, 200)
    book.claim("rid", parse_field({"budget_tokens": 6, "tenant": "t"}, 64), 200)
