"""What is admitted together, and that nothing waits for room that never comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.gang import Cost, Room, gang_size

ENGINE = Room(rows=8, tokens=1000)
COST = Cost(prompt_tokens=100, branch_tokens=50)

ROOMS = st.builds(Room, rows=st.integers(-2, 20), tokens=st.integers(-100, 2000))
ENGINES = st.builds(Room, rows=st.integers(1, 20), tokens=st.integers(1, 2000))
COSTS = st.builds(Cost, prompt_tokens=st.integers(0, 600), branch_tokens=st.integers(1, 600))


@pytest.mark.parametrize(
    ("wanted", "least", "room", "expected"),
    [
        (4, 4, Room(8, 1000), 4),
        (4, 4, Room(4, 300), 4),  # to the last row and token
        (4, 4, Room(3, 1000), 0),  # a row short
        (4, 4, Room(8, 299), 0),  # a token short: the prompt is counted, and only once
        (4, 2, Room(8, 299), 3),  # fewer, but still enough
        (4, 2, Room(2, 1000), 2),
        (4, 2, Room(1, 1000), 0),
        (4, 1, Room(1, 150), 1),
        (4, 1, Room(1, 149), 0),
        (4, 4, Room(0, 1000), 0),
        (4, 4, Room(-1, -50), 0),
        (0, 0, Room(8, 1000), 0),  # nothing wanted
    ],
)
def test_all_or_nothing_down_to_least(wanted: int, least: int, room: Room, expected: int) -> None:
    """As many as fit, unless that is fewer than make sense together."""
    assert gang_size(wanted, least, room, ENGINE, COST) == expected


@pytest.mark.parametrize(
    ("least", "engine", "expected"),
    [
        (20, Room(8, 10_000), 8),  # more than the engine's rows
        (20, Room(20, 500), 8),  # more than its KV pool
        (20, Room(20, 149), 0),  # not even one by this estimate: the caller starts one on an empty engine
        (20, Room(20, 150), 1),
    ],
)
def test_a_gang_too_large_for_the_engine_shrinks(least: int, engine: Room, expected: int) -> None:
    """To what an empty engine holds; and it waits for all of that."""
    assert gang_size(20, least, engine, engine, COST) == expected
    assert gang_size(20, least, Room(expected - 1, 10_000), engine, COST) == 0


def test_the_prompt_is_counted_once() -> None:
    """However many branches share it; none costs nothing."""
    assert COST.tokens(0) == 0
    assert COST.tokens(1) == 150
    assert COST.tokens(4) == 300
    assert Cost(0, 50).tokens(4) == 200


def test_a_promise_leaves_less() -> None:
    """Rows and tokens of the gang are gone for the next one."""
    room = Room(8, 1000)
    room.take(COST, 4)
    assert room == Room(4, 700)
    assert room.most(COST) == 4
    room.take(COST, 4)
    assert room.most(COST) == 0


@given(ROOMS, COSTS)
def test_most_is_exact(room: Room, cost: Cost) -> None:
    """So many fit, one more does not."""
    num = room.most(cost)
    assert num >= 0
    assert num == 0 or (num <= room.rows and cost.tokens(num) <= room.tokens)
    assert num + 1 > room.rows or cost.tokens(num + 1) > room.tokens


@given(st.integers(0, 30), st.integers(0, 30), ROOMS, ENGINES, COSTS)
def test_what_is_admitted_fits(wanted: int, least: int, room: Room, engine: Room, cost: Cost) -> None:
    """Never more than wanted or than fits; never fewer than least, or than the empty engine would hold."""
    least = min(wanted, least)
    num = gang_size(wanted, least, room, engine, cost)
    assert 0 <= num <= wanted
    if num:
        assert min(least, engine.most(cost)) <= num <= room.most(cost)
        room.take(cost, num)
        assert room.rows >= 0
        assert room.tokens >= 0


@given(st.integers(1, 300), st.integers(0, 300), ENGINES, COSTS)
def test_no_gang_waits_for_ever(wanted: int, least: int, engine: Room, cost: Cost) -> None:
    """An empty engine takes the largest part of any gang that it could ever hold."""
    assert gang_size(wanted, min(wanted, least), engine, engine, cost) == min(wanted, engine.most(cost))


@given(st.integers(1, 30), st.integers(1, 30), ROOMS, ENGINES, COSTS, st.integers(0, 5), st.integers(0, 300))
def test_more_room_never_admits_fewer(
    wanted: int, least: int, room: Room, engine: Room, cost: Cost, rows: int, tokens: int
) -> None:
    """So saving room for a gang brings it in."""
    least = min(wanted, least)
    larger = Room(room.rows + rows, room.tokens + tokens)
    assert gang_size(wanted, least, larger, engine, cost) >= gang_size(wanted, least, room, engine, cost)
