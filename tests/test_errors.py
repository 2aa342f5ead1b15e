"""What a client sent comes back in messages on one line and cut: those messages are also lines of the server's log."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_dynasor.engine.place import _misplaced
from sglang_dynasor.errors import MOST_QUOTED_CHARS, FieldError, quoted, spelled
from sglang_dynasor.policy.spec import FIELD_HELP, check_greedy, parse_field

FORGED = "x\n[2026-01-01 00:00:00] ERROR the disk is full\x1b[31m\u2028"
MEGABYTE = "y" * 1_000_000
MOST_MESSAGE_CHARS = 1_600  # the longest lists all keys of the field


@pytest.mark.parametrize(
    "value", ["", "later", "it's", 'a"b', "é", 3, -1, 2.5, None, True, [1, 2], {"a": 1}, ["x", {"b": None}]]
)
def test_what_is_short_and_plain_stands_as_it_is(value: Any) -> None:
    """As Python writes it."""
    assert quoted(value) == repr(value)


HOSTILE = [
    FORGED,
    MEGABYTE,
    FORGED * 1000,
    "\0" * 500,
    [MEGABYTE],
    {FORGED: MEGABYTE},
    [[[[[1]]]]] * 1000,
    10**100,
    10**9000,
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_anything_is_one_line_of_bounded_length(value: Any) -> None:
    """Nothing that a terminal or a log would take for its own, and no more than is needed to know it by."""
    for text in (quoted(value), spelled(quoted(value))):
        assert text.isprintable()
        assert len(text) <= MOST_QUOTED_CHARS + 4
    assert spelled(FORGED).isprintable()


def test_the_longest_that_is_not_cut() -> None:
    """And the shortest that is."""
    assert quoted("z" * MOST_QUOTED_CHARS) == repr("z" * MOST_QUOTED_CHARS)
    assert quoted("z" * (MOST_QUOTED_CHARS + 1)) == "'" + "z" * MOST_QUOTED_CHARS + "..."


FIELDS = [
    FORGED, MEGABYTE, {FORGED: 1}, {MEGABYTE: 1}, [FORGED], 10**9000,
    *({key: value} for key in FIELD_HELP for value in (FORGED, MEGABYTE, [FORGED], {FORGED: MEGABYTE}, 10**9000, f"regex:({FORGED}", f"regex:{FORGED}{{1000}}",
                                                       f"model:{FORGED}", f"window:{FORGED}", f"trial:{FORGED}", f"code:{FORGED}")),
    *({"algorithm": algorithm, key: FORGED} for algorithm in ("long_cot", "best_of_n") for key in FIELD_HELP if key != "algorithm"),
    {"budget_tokens": 10**9000, "program": "p"}, {"judge": "self", "judge_suffix": FORGED, "judge_good": FORGED, "judge_bad": FORGED},
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS, ids=range(len(FIELDS)))
def test_no_field_forges_a_line_of_the_log(field: Any) -> None:
    """Whatever the message says of it. A field that is taken says nothing."""
    message = ""
    try:
        parse_field(field, 64)
    except FieldError as error:
        message = str(error)
    assert message.isprintable(), message
    assert len(message) <= MOST_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("body", "route"),
    [
        ({"dyna\nsor": {}}, "/generate"),
        ({"\x1b[2Jdynasor": {}}, "/v1/messages"),
        ({"extra\n_body": {"dynasor\n": {}}}, "/v1/completions"),
    ],
)
def test_no_key_beside_it_does(body: dict[str, Any], route: str) -> None:
    """A key at the wrong place is named as it is spelt, on one line."""
    message = _misplaced(body, route)
    assert message is not None
    assert message.isprintable()


def test_nor_a_sampling_parameter() -> None:
    """SGLang takes any value there until it reads it."""
    with pytest.raises(FieldError) as raised:
        check_greedy(2, {"top_k": 1, "temperature": FORGED * 1000})
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500
