"""Which answers are one vote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.equal import MAX_KEY_CHARS, answer_key, canonical
from sglang_dynasor.policy.quantity import as_number


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


@pytest.mark.parametrize("text", [r"3\frac{1}{2}", "3 1/2", "7/2", "3.5", "+3.5", "35e-1", r"$\tfrac{7}{2}$"])
def test_mixed_numbers_are_numbers(text: str) -> None:
    """Three and a half, however it is written; not thirty-one halves."""
    assert answer_key(text) == "7/2"
    assert answer_key("-" + text.lstrip("$+")) == "-7/2"


@pytest.mark.parametrize("text", ["1,2", "1, 2", "1 2", "(1, 2)", "(1,2)", "1 ,2", "1;2", "007", "1/0", "", "x"])
def test_several_numbers_are_none(text: str) -> None:
    """A pair is no number, nor are digits that begin with a zero; thousands may have commas."""
    assert as_number(text) is None
    assert answer_key("1,200") == answer_key("1 200") == answer_key("1200") == answer_key("1{,}200") == "1200"
    assert answer_key("1, 200") != "1200"


SAME = [
    ["\\tfrac{\\pi}{6}", "\\frac{\\pi}{6}", "\\pi/6", "π/6"],
    ["\\frac{a+b}{2c}", "(a+b)/(2c)"],
    ["\\frac{1}{-3}", "-\\frac13", "-1/3", "{-1}/{3}"],
    ["2\\sqrt{3}", "2\\sqrt3", "2√3"],
    ["e^{-x}", "e^{ -x }"],
    ["\\log_2 3", "\\log_{2}3"],
    ["(2, +\\infty)", "(2,\\infty)", "(2,∞)"],
    ["18 hours", "18", "18\\text{ hours}", "18~\\mathrm{hours}"],
    ["5\\,\\text{cm}^2", "5 cm²", "5"],
    ["1.5 million", "1500000", "1,500,000"],
    ["1_000_000", "10^6", "1e6"],
    ["x=1 or x=2", "x = 1 or x = 2", "x = 1 \\text{ or } x = 2", "x = 1, x = 2", "1 and 2", "1; 2"],
    ["n = -3 and n = 5", "n=-3 or n=5", "-3, 5"],
    ["12 \\text{ apples}", "12\\text{ months}", "12"],
    ["5\\text{ million}", "5000000"],
    ["-12;-11", "-12, -11"],
    ["x \\ne 3", "x ≠ 3", "x != 3"],
    ["\\mathrm{e}", "e"],
    ["Yes", "yes!", "**yes**", "“yes”", "YES"],
    ["naïve", "nai\u0308ve"],
    ["ﬁve", "five"],
    ["٣٫٥", "3.5", "３．５"],
    ["\\boxed{5}", "\\underline{5}", "5", "\\x0coo"[:0] + "5"],
    ["\x0crac{1}{2}", "1/2"],  # JSON read once too often
    ["Option B", "(B)", "B.", "\\textbf{B}"],
    ['{"a": 1}', '{"a":1}'],
]


@pytest.mark.parametrize("same", SAME)
def test_writings_of_one_answer_are_one_vote(same: list[str]) -> None:
    """By kind: fractions, roots, units, lists, signs, words."""
    assert len({answer_key(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    "different",
    [
        ["(0,1)", "[0,1]", "(0,1]", "[0,1)", "{0,1}", "0,1"],
        ["7", "7!", "7'", "7+", "<7", ">7", "~7", "±7", "|7|!", "[7]"],
        ["f", "f'", "f''", "F", "|f|", "\\bar{f}", "f^*", "f_1", "f1", "f^1"],
        ["\\frac{a}{b}c", "\\frac{a}{bc}", "\\frac{ac}{b}"],
        ["\\frac{1}{2}!", "\\frac{1}{2!}"],
        ["\\frac{a}{b/c}", "\\frac{a/b}{c}"],
        ["\\sqrt{2}x", "\\sqrt{2x}", "\\sqrt[3]{2x}"],
        ["x=1,y=2", "y=1,x=2", "1,2", "x=1 or y=2", "y=1 or x=2"],
        [
            "x = 1 or y = 2",
            "y = 1 or x = 2",
            "1, 2",
            "x < 1 or x > 2",
            "x >= 1 or x = 2",
            "x \\ne 1 and x \\ne 2",
            "x - 1 or x - 2",
        ],
        [
            "5",
            "5\\text{ millions}",
            "5\\text{ hundreds}",
            "5\\text{ dozens}",
            "5\\text{ halves}",
            "5\\text{ thirds}",
            "5\\text{ tenths}",
            "5\\text{ percents}",
        ],
        ["½x", "1/2x", "1/(2x)"],
        ["3 . 5", "3.5", "3 5"],
        ["x^2", "x2", "x_2", "2x"],
        ["x₂", "x2", "x²"],
        ["x^{-1}", "x-1", "x^1"],
        ["0.3", "0.\\overline{3}", "0.33", "0.333...", "1/3"],
        ["1/2", "21/2", "2 1/2", "2 (1/3)"],
        ["007", "7", "07"],
        ["12", "1 2", "1,2", "1.2", "1:2", "1-2"],
        ["1e3", "1e4", "10^{-3}"],
        ["p and q", "p or q", "p, q"],
        ["CO", "Co", "co"],
        ["a b", "ab", "a", "b"],
        ["not", "is not", "isnot"],
        ["50", "50%", "5%"],
        ["5", "5m", "5x", "x5"],
        ["a)b", "(a)b", "ab"],
        ["x=5", "x>5", "x\\le 5", "x\\ne 5"],
        ["y=x", "x", "x=y"],
        ["\\{5\\}", "5", "[5]"],
        ['{"a":1}', '{"a":"1"}', '{"a":[1]}'],
        ["2^{10}", "2^1 0", "1024", "210"],
    ],
)
def test_different_answers_never_share_a_vote(different: list[str]) -> None:
    """A wrong merge costs the answer."""
    assert len({answer_key(answer) for answer in different}) == len(different)


def test_all_of_a_long_answer_counts() -> None:
    """By its digest, so that a key stays short."""
    long = "a b c " * 600
    assert answer_key(long + "x") != answer_key(long + "y")
    assert answer_key(long + "x") == answer_key(f" {long}  x")
    assert len(answer_key(long)) <= MAX_KEY_CHARS


def test_text_takes_white_space_away_only() -> None:
    """Case, signs and fractions are told apart there."""
    assert answer_key(" a\n b", "text") == answer_key("a b", "text") == "a b"
    for one, other in [("A", "a"), ("1/2", "0.5"), ("5.", "5"), ("a b", "ab"), ("x=5", "5")]:
        assert answer_key(one, "text") != answer_key(other, "text")


def test_what_has_a_form_already_is_compared_as_it_is() -> None:
    """JSON's strings and numbers differ; a value at a path is an answer as any."""
    assert answer_key('{"a":"Paris"}', extractor="json") != answer_key('{"a":"paris"}', extractor="json")
    assert answer_key("Paris", extractor="json:a") == answer_key("paris", extractor="json:a")


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ("a = 1  # one\n\nb = (2)", "a=1\nb = 2", True),
        ('def f(x):\n    """Doc."""\n    return x', "def f(x): return x", True),
        ("x in {'a', 'b', 'c'}", "x in {'c', 'b', 'a'}", True),
        ("def f(x): return x", "def f(y): return y", False),
        ("a = 1", "a = 1.0", False),
        ("f()\ntry:\n    g()\nexcept E:\n    h()", "try:\n    f()\n    g()\nexcept E:\n    h()", False),
        ("assert a", "assert b", False),
        ("assert a", "pass", False),
        ("if a:\n    b", "if a:\n  b", True),
        ("this is no Python", "this is  no Python", False),
        ("-" * 3000 + "1", "1", False),
        ("(" * 400, "(" * 401, False),
        ("a = 1\n" * 300, "a=1\n" * 300, False),  # too long: as text
    ],
)
def test_code_is_equal_where_it_compiles_to_the_same(one: str, other: str, is_equal: bool) -> None:
    """Only for `code:python`; other code is compared line by line."""
    assert (answer_key(one, extractor="code:python") == answer_key(other, extractor="code:python")) is is_equal
    assert answer_key(one, extractor="code") != answer_key(other, extractor="code")


PIECES = (
    "\\frac", "\\sqrt", "\\text", "\\left", "\\right", "\\{", "\\}", "\\pi", "\\,", "{", "}", "(", ")", "[", "]", "1", "2", "3.5", ",", ";", " ", "-", "+", "x", "=",
    "or", "and", "the ", "$", "^", "_", "%", '"', "'", "*", ".", "!", "Paris", "NO", "π", "²", "½", "√", "°", "×", "10^", "e3", " km", "/", ":", "~", "١", "Option B", "007", "\0", "\f",
)  # fmt: skip


@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=14).map("".join)))
def test_a_form_is_its_own_form(text: str) -> None:
    """So that nothing is the same as a form and yet has another key; and nothing raises."""
    form = canonical(text)
    assert canonical(form) == form
    assert form or not text
    assert answer_key(text, "text") or not text
    for extractor in ("auto", "code", "code:python", "json"):
        assert len(answer_key(text, extractor=extractor)) <= MAX_KEY_CHARS
