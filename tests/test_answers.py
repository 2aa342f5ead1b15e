"""What counts as an answer, and which answers are the same."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.answers import (
    EXTRACTORS,
    check_extractor,
    extract_answer,
    read_answer,
)
from sglang_dynasor.policy.equal import answer_key, as_number


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("hash", "12 + 7 = 19\n#### 19", "19"),
        ("hash", "#### 1\n#### 2 \nthanks", "2"),
        ("hash", "no mark", None),
        ("hash", "####   ", None),
        ("boxed", r"so \boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{2}", "2"),
        ("boxed", r"\boxed{1} then \boxed{2 unfinished", "1"),
        ("boxed", r"\boxed{never closed", None),
        ("choice", "The answer is (B).", "B"),
        ("choice", "The correct choice: **c**", "C"),
        ("choice", "A is wrong.\nD", "D"),
        ("choice", "A banana and an apple", None),
        ("choice", "the answer is a prime, the answer I choose", None),
        ("choice", "Option B", "B"),
        ("number", "from 3 to 1,234.50 in all", "1,234.50"),
        ("number", "none", None),
        ("last_line", "one\ntwo\n\n", "two"),
        ("last_line", "  \n ", None),
        ("auto", "#### 3\nbut \\boxed{4}", "4"),
        ("auto", "#### 3\nbye", "3"),
        ("auto", "plain\nwords", "words"),
        ("regex:ANSWER=(\\w+)", "ANSWER=a ANSWER=b", "b"),
        ("regex:[0-9]+", "1 22", "22"),
        ("regex:x(y)?", "x", None),
    ],
)
def test_extraction(extractor: str, text: str, answer: str | None) -> None:
    """Each extractor finds the last complete answer of its form, and nothing where there is none."""
    check_extractor(extractor)
    assert extract_answer(text, extractor) == answer


@pytest.mark.parametrize(
    "extractor", ["nope", "regex", "regex:", "regex:(", "regex:" + "a" * 257, "regex:(?=a)", "HASH"]
)
def test_a_wrong_extractor_is_refused_with_what_is_allowed(extractor: str) -> None:
    """The error names the setting and what to use instead."""
    with pytest.raises(FieldError, match=r"dynasor\.answer"):
        check_extractor(extractor)


@pytest.mark.parametrize(
    "same",
    [
        ["1/2", "0.5", ".50", r"\frac{1}{2}", r"\dfrac{1}{2}", "$0.50", " 0.5. "],
        ["1234", "1,234", "$1,234.00", "1.234e3"],
        ["-3", "−3", "-3.0"],
        ["Paris", "paris", " PARIS.", r"\text{Paris}", '"Paris"'],
        ["50%", "50 %", r"50\%"],
        ["x + 1", "x+1"],
    ],
)
def test_equal_answers_have_one_key(same: list[str]) -> None:
    """Different writings of one answer are one vote."""
    assert len({answer_key(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("0.5", "0.50001"), ("50", "50%"), ("1/3", "0.333"), ("-3", "3"), ("a", "b"), ("12", "1 2 x")]
)
def test_different_answers_have_different_keys(one: str, other: str) -> None:
    """Exact: nearly equal numbers are different answers."""
    assert answer_key(one) != answer_key(other)


@given(st.text(max_size=400), st.sampled_from(sorted(EXTRACTORS)))
def test_any_text_gives_a_bounded_answer_or_none(text: str, extractor: str) -> None:
    """Whatever a model writes, extraction and keying neither raise nor return something empty."""
    answer = extract_answer(text, extractor)
    if answer is not None:
        assert 0 < len(answer) <= 256
        assert answer_key(answer)


@pytest.mark.parametrize(
    "text",
    ["9" * 100_000, "1e999999999", "\\boxed{" * 20_000, "#" * 100_000, "(" * 50_000, "\n" * 100_000, "1/" * 50_000],
)
def test_work_is_bounded(text: str) -> None:
    """Hostile text costs the scheduler's loop no more than a few milliseconds."""
    started = time.perf_counter()
    for extractor in (*EXTRACTORS, "regex:(a+)+$", "regex:(.*)*x"):
        answer_key(extract_answer(text, extractor) or "")
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("text", [r"3\frac{1}{2}", "3 1/2", "7/2", "3.5", "+3.5", "35e-1", r"$\tfrac{7}{2}$"])
def test_mixed_numbers_are_numbers(text: str) -> None:
    """Three and a half, however it is written; not thirty-one halves."""
    assert answer_key(text) == "7/2"
    assert answer_key("-" + text.lstrip("$+")) == "-7/2"


@pytest.mark.parametrize("text", ["1,2", "1, 2", "1 2", "(1, 2)", "(1,2)", "1 ,2"])
def test_two_numbers_are_not_one(text: str) -> None:
    """A pair keeps its comma, whatever stands around it; commas between thousands are no pair's."""
    assert as_number(text) is None
    assert answer_key(text) == "1,2"
    assert answer_key("1,200") == answer_key("1 200") == answer_key("1200") == "1200"


@pytest.mark.parametrize(
    ("lead", "text", "extractor", "answer"),
    [
        ("Q\nThe answer is \\boxed{", "19}.", "boxed", "19"),
        ("Q ####", " 19\n", "hash", "19"),
        ("Q ####", " so #### 20", "hash", "20"),  # its own answer comes first
        ("Q \\boxed{5} is", " wrong", "boxed", None),  # what stood there before is not its own
        ("Q \\boxed{5}\n", "19}", "boxed", None),  # nor what stood on a line before
        ("", "19}", "boxed", None),
        ("Q\n", "no answer", "number", None),
        ("Q \\boxed{", "42}\nSo it holds.", "auto", "42"),
        ("Q ####", " 42\nbecause", "auto", "42"),
        ("Q\n", "so it is\n42", "auto", "42"),
    ],
)
def test_an_answer_may_begin_before_the_text(lead: str, text: str, extractor: str, answer: str | None) -> None:
    """A prompt, or an author, may write the mark."""
    assert read_answer(lead, text, extractor) == answer


def test_boxes_that_never_close_cost_little() -> None:
    """A branch that repeats itself must not hold up the scheduler's loop."""
    for text in ("\\boxed{" * 600, "\\boxed{{" * 450, "}" * 4096):
        started = time.perf_counter()
        for _ in range(10):
            assert extract_answer(text, "boxed") is None
        assert time.perf_counter() - started < 0.25  # 1.3 s where each is followed to the end
    assert extract_answer("\\boxed{1} \\boxed{\\frac{1}{2}} \\boxed{", "boxed") == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is 1,234, as shown.", "1,234"),
        ("It costs $1,250,000, which is right", "1,250,000"),
        ("1,234,\n", "1,234"),
        ("of 3, 5, 7", "7"),
        ("(1,2)", "2"),
        ("12 or 1,234.5", "1,234.5"),
    ],
)
def test_a_comma_after_a_number_is_no_part_of_it(text: str, number: str) -> None:
    """Nor does it cut the number."""
    assert extract_answer(text, "number") == number


def test_many_commas_cost_little() -> None:
    """Quadratic, they would take 20 ms of the scheduler's loop."""
    started = time.perf_counter()
    for _ in range(10):
        extract_answer("234," * 1024, "number")
    assert time.perf_counter() - started < 0.1
