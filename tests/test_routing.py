"""Which replica a client's branches go to, which are retracted first, which a promise holds back: on stand-ins."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from sglang_dynasor.engine.live import BranchTag, LiveProgram, SentTag, set_tag
from sglang_dynasor.engine.retraction import youngest_last
from sglang_dynasor.engine.room import adder_class
from sglang_dynasor.engine.routing import route_program
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.retraction import siblings
from sglang_dynasor.policy.spec import parse_field


def routed(field: Any, ranks: list[int], routed_dp_rank: int | None = None) -> int | None:
    params = SimpleNamespace(custom_params=field)
    req = SimpleNamespace(sampling_params=params, routed_dp_rank=routed_dp_rank)
    route_program(SimpleNamespace(_active_workers=ranks), req)
    return req.routed_dp_rank


def test_a_program_goes_to_one_replica() -> None:
    """By its id alone, in whatever order the workers are listed; many programs use them all."""
    names = [f"program-{i}" for i in range(200)]
    ranks = [routed({"dynasor": {"program": name}}, [0, 1, 2]) for name in names]
    assert ranks == [routed({"dynasor": {"program": name}}, [2, 0, 1]) for name in names]
    assert all(40 <= ranks.count(rank) <= 95 for rank in (0, 1, 2))


@pytest.mark.parametrize(
    "field", [None, {}, {"dynasor": "self_consistency"}, {"dynasor": {"program": 5}}, {"other": 1}]
)
def test_other_requests_go_where_sglang_sends_them(field: Any) -> None:
    """No program id, no choice of ours."""
    assert routed(field, [0, 1]) is None


def test_a_choice_of_the_client_stands() -> None:
    """A replica asked for explicitly is kept."""
    assert routed({"dynasor": {"program": "p"}}, [0, 1], routed_dp_rank=1) == 1


def branch(number: int | None, *, kind: type[BranchTag] = BranchTag) -> Any:
    req: Any = SimpleNamespace()
    if number is not None:
        program = Program("p", parse_field({}, 64))
        program.start_branch()
        live = LiveProgram(program, parent=None, number=number)
        set_tag(req, kind(live, 0, SimpleNamespace()))  # type: ignore[arg-type]
    return req


def test_the_youngest_program_is_retracted_first() -> None:
    """SGLang pops from the end: plain requests and what clients sent are kept longest, then programs by age."""
    reqs = [branch(2), branch(None), branch(1), branch(2), branch(9, kind=SentTag), branch(1)]
    assert youngest_last([5, 4, 3, 2, 1, 0], reqs) == [4, 1, 5, 2, 3, 0]


def test_without_programs_the_order_is_sglang_s() -> None:
    """The very list."""
    order = [2, 0, 1]
    assert youngest_last(order, [branch(None), branch(None), branch(3, kind=SentTag)]) is order


@pytest.mark.parametrize(
    ("left", "retracted", "expected"),
    [
        (["a", None, "b", "a"], {"a"}, [0, 3]),
        (["a", "a"], {"a"}, []),  # nothing else would run
        ([None, "b"], {"a"}, []),
        ([None], set[str](), []),
    ],
)
def test_siblings_follow_unless_nothing_else_would_run(
    left: list[str | None], retracted: set[str], expected: list[int]
) -> None:
    """Programs are retracted whole; plain requests never follow."""
    assert siblings(left, retracted) == expected


@pytest.mark.parametrize(("num_running", "num_admitted", "seen"), [(0, 0, 10), (1, 0, 110), (0, 1, 110)])
def test_a_promise_holds_no_branch_back_where_nothing_runs(num_running: int, num_admitted: int, seen: int) -> None:
    """Nothing would ever leave. Where something runs, or has just been let in, promised tokens are not there for others."""

    class Adder:
        def __init__(self) -> None:
            self.memory_budget = SimpleNamespace(total_offset=10)
            self.running_batch = SimpleNamespace(reqs=[None] * num_running)
            self.can_run_list = [None] * num_admitted

        def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> int:
            return self.memory_budget.total_offset

    admission = Mock(plain_rows=None, last_rank=inf, latest_plain=9, promised_tokens=100)
    room = Mock(kept_out_rank=inf, rank=lambda req: 0)
    kind: Any = Adder
    adder: Any = adder_class(kind, room, admission)()  # type: ignore[arg-type]
    assert adder.add_one_req(branch(1), False, None) == seen
    assert adder.memory_budget.total_offset == 110
    assert adder.add_one_req(branch(None), False, None) == 110


@pytest.mark.parametrize(
    ("rank", "arrival", "is_let_in"), [(0, 9, True), (0, 10, False), (1, 3, False), (-1, 10, True), (1, 0, False)]
)
def test_plain_requests_that_came_since_the_look_keep_to_it(rank: int, arrival: int, is_let_in: bool) -> None:
    """A program of rank 0 waits, and is not to be overtaken by who came after the ninth, nor by anybody less urgent."""

    class Adder:
        def __init__(self) -> None:
            self.memory_budget = SimpleNamespace(total_offset=0)
            self.running_batch = SimpleNamespace(reqs=[])
            self.can_run_list: list[Any] = []

        def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> str:
            return "let in"

    admission = Mock(plain_rows=None, last_rank=0, latest_plain=9, promised_tokens=0)
    req = branch(None)
    req.rank, req.dynasor_arrival = rank, arrival
    # Where one of rank 0 waits for an adapter's place, only the more urgent start.
    for kept_out_rank, expected in ((inf, is_let_in), (0, rank < 0)):
        room = Mock(kept_out_rank=kept_out_rank, rank=lambda req: req.rank)
        kind: Any = Adder
        adder: Any = adder_class(kind, room, admission)()  # type: ignore[arg-type]
        assert (adder.add_one_req(req, False, None) == "let in") is expected
