"""The price of a branch: it rises with the load, and ends programs whose next branch is worth less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.admission import Admission, Gang
from sglang_dynasor.policy.budget import branch_worth
from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import parse_field

ROWS = 8


class Rows(SimpleNamespace):
    """As much of an engine as a look asks for: rows that branches take and give back."""

    def __init__(self, num_plain: int = 0):
        super().__init__(
            whole=Room(ROWS, 10_000), shares_prompts=False, free_rows=ROWS, free_tokens=10_000, num_branches=0,
            num_plain_waiting=num_plain, waiting=lambda num: iter(()), progress_tokens=lambda gang: 0,
            has_adapter_room=lambda gang: True,
        )  # fmt: skip

    @property
    def is_empty(self) -> bool:
        return self.free_rows == ROWS

    def start(self, gang: Gang, num_branches: int) -> None:
        for _ in range(num_branches):
            gang.program.start_branch()
        self.free_rows -= num_branches
        self.num_branches += num_branches


def admission_of(max_price: float, num_plain: int = 0) -> Admission:
    return Admission(Rows(num_plain), 10**9, {}, 1, max_price)


def come(admission: Admission, num: int, **field: Any) -> list[Gang]:
    """Programs that run one branch at a time, as far as there are rows."""
    gangs = [Gang(Program(str(i), parse_field(field, 64)), 5, Cost(0, 5), None) for i in range(num)]
    for gang in gangs:
        admission.arrive(gang)
        admission.advance(gang)
    admission.look()
    return gangs


def finish(admission: Admission, gang: Gang, answer: str) -> None:
    """Its branch ends, and what follows from that."""
    program, engine = gang.program, admission.engine
    assert isinstance(engine, Rows)
    program.count(len(program.branches) - 1, answer, 10)
    engine.free_rows += 1
    engine.num_branches -= 1
    admission.note_change()
    admission.end_if_dear(gang)
    if program.reason is None:
        admission.advance(gang)
    else:
        admission.leave(gang)


def answers(admission: Admission, gang: Gang, texts: str) -> Program:
    """So many branches of a program end, others being there all the while."""
    for text in texts:
        if gang.program.reason is None:
            finish(admission, gang, text)
            admission.look()
    return gang.program


@pytest.mark.parametrize(
    ("num", "num_plain", "load"),
    [(1, 0, 0.0), (ROWS, 0, 0.0), (ROWS + 1, 0, 1 / 9), (3 * ROWS, 0, 16 / 24), (1, 3, 3 / 4), (3 * ROWS, 16, 32 / 40)],
)
def test_load_is_what_waits(num: int, num_plain: int, load: float) -> None:
    """Programs and plain requests that wait, of all; nobody waits for room while there is some."""
    admission = admission_of(0.1, num_plain)
    first, *_ = come(admission, num, stop="never")
    assert admission.load_frac(first) == pytest.approx(load)


def test_who_begins_to_wait_hides_nobody() -> None:
    """Another waits since the last look: so he does, now that this one has a branch less in flight and waits too."""
    admission = admission_of(0.1)
    first, *_ = come(admission, ROWS + 1, stop="never")
    admission.wait(first)
    assert admission.load_frac(first) == pytest.approx(1 / 9)


@pytest.mark.parametrize("num_plain", [0, 100])
def test_plain_requests_that_wait_narrow_a_program(num_plain: int) -> None:
    """Each row that it takes keeps them waiting, as it keeps programs."""
    admission = Admission(Rows(num_plain), 10**9, {}, 0, 0.0)
    gang = Gang(Program("p", parse_field({"branches": 8}, 64)), 5, Cost(0, 5), None)
    admission.arrive(gang)
    alone = Admission(Rows(), 10**9, {}, 0, 0.0)
    alone.arrive(gang)
    assert (admission._width(gang) < alone._width(gang)) is (num_plain > 0)


def test_it_does_not_fire_where_nobody_waits() -> None:
    """However high the price: what votes still cost nobody else."""
    admission = admission_of(1.0)
    gangs = come(admission, ROWS, stop="never", branches=4)
    assert answers(admission, gangs[0], "777").reason is None
    assert gangs[0].program.price == 0.0
    assert gangs[0].program.record()["price"] == 0.0


def test_it_fires_under_load() -> None:
    """As soon as the next branch is worth less than the operator's price times the load; the record says at which price."""
    admission = admission_of(0.05)
    gangs = come(admission, 4 * ROWS, stop="never")
    program = answers(admission, gangs[0], "7")
    assert program.reason is None  # one vote: 0.08 is worth more
    program = answers(admission, gangs[0], "7777777")
    assert program.reason is StopReason.PRICE
    record = program.record()
    assert record["stop_reason"] == "price"
    assert record["answer"] == "7"
    assert 0 < branch_worth(program.evidence) < record["price"] < 0.05
    assert len(program.branches) == 2


def test_the_uncertain_pay_it() -> None:
    """Under the same load a program whose answers differ goes on where one that agrees ends."""
    admission = admission_of(0.05)
    sure, unsure = come(admission, 4 * ROWS, stop="never")[:2]
    assert answers(admission, sure, "777").reason is StopReason.PRICE
    assert answers(admission, unsure, "789").reason is None


def test_it_does_not_fire_before_a_vote() -> None:
    """Somebody has to answer."""
    admission = admission_of(1.0)
    gang, *_ = come(admission, 4 * ROWS, stop="never", answer="hash")
    program = gang.program
    program.count(0, None, 10)
    admission.end_if_dear(gang)
    assert program.reason is None
    assert program.price is None
    assert "price" not in program.record()


@pytest.mark.parametrize("field", [{"algorithm": "long_cot", "branches": 2}, {"vote": "best", "judge": "model"}])
def test_it_does_not_fire_where_votes_do_not_decide(field: dict[str, Any]) -> None:
    """Of thoughts, and where the best reward decides, the risk of the votes says nothing."""
    admission = admission_of(1.0)
    gang, *_ = come(admission, 4 * ROWS, **field)
    assert not answers(admission, gang, "7").has_price
    assert gang.program.reason is None


def test_no_price_is_no_price() -> None:
    """The default: the record has no such key."""
    admission = admission_of(0.0)
    gang, *_ = come(admission, 4 * ROWS, stop="never")
    assert answers(admission, gang, "777").reason is None
    assert "price" not in gang.program.record()


@given(st.lists(st.sampled_from("78"), min_size=1, max_size=8), st.floats(0, 1))
def test_a_program_ends_at_the_first_branch_that_is_not_worth_it(texts: list[str], price: float) -> None:
    """And nowhere before."""
    program = Program("p", parse_field({"stop": "never"}, 64))
    for text in texts:
        program.count(program.start_branch(), text, 10)
        is_worth = branch_worth(program.evidence) >= price
        program.end_if_dear(price)
        assert (program.reason is None) == is_worth
        if not is_worth:
            break
