"""What counts as an answer, and which answers are the same."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.answers import (
    EXTRACTORS,
    check_extractor,
    extract_answer,
    is_complete,
    read_answer,
    shown,
)
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.structured import READ_CHARS


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
        ("choice", "Choose B) car.", "B"),
        ("choice", "The correct response will be A) apple.", "A"),
        ("choice", "both A) apple and B) pear are fruit", None),
        ("choice", "it (or f(A)) is no letter", None),
        ("choice", "surely B) is wrong", None),
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
    "extractor",
    [
        "nope",
        "regex",
        "regex:",
        "regex:(",
        "regex:" + "a" * 257,
        "regex:(?=a)",
        "HASH",
        "json:",
        "json:a..b",
        "tool_call:id",
        "tool_call:-",
        "tag:",
        "tag:a b",
        "code:ruby",
        "auto:x",
    ],
)
def test_a_wrong_extractor_is_refused_with_what_is_allowed(extractor: str) -> None:
    """The error names the setting and what to use instead."""
    with pytest.raises(FieldError, match=r"dynasor\.answer"):
        check_extractor(extractor)


PIECES = (
    "Answer", "answer is ", "the ", "####", "\\boxed", "{", "}", "(", ")", "[", "]", "**", "A", "b", "I", "1", ",", ".", " ", "\n", "\n\nQ: ", "-", "```", "json", '"a"', ":", "<answer>",
    "</answer>", "<think>", "</think>", "<|x|>", "\\frac", "/", "yes", "no", "option ", "?", "答案", "<function=f>", "</function>", "Let me know", "\0", "1 000", "%", "\\", "½", "10²", "1'000", "1,00,000",
    "is correct.", "I choose ", "so ", "p.m.", "J. K. ", "- ", "1. ", "**", "10",
)  # fmt: skip
ANY = (*sorted(EXTRACTORS), "json:a.b", "tool_call:-a", "tag:answer", "code:python", "regex:(a+)+$", "regex:.*")


@given(
    st.one_of(st.text(max_size=400), st.lists(st.sampled_from(PIECES), max_size=24).map("".join)), st.sampled_from(ANY)
)
def test_any_text_gives_a_bounded_answer_or_none(text: str, extractor: str) -> None:
    """Whatever a model writes, extraction and keying neither raise nor return something empty."""
    answer = extract_answer(text, extractor)
    if answer is not None:
        assert answer.strip() == answer != ""
        assert 0 < len(answer_key(answer, extractor=extractor)) <= 256
    cut = extract_answer(text, extractor, is_cut=True)
    # Of a text that was cut `number` reads the marked one, which need not be the last.
    assert cut in (None, answer) or extractor == "number"
    read_answer(text, text, extractor)
    is_complete(text, text, extractor)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 100_000,
        "1e999999999",
        "\\boxed{" * 20_000,
        "#" * 100_000,
        "(" * 50_000,
        "\n" * 100_000,
        "1/" * 50_000,
        "answer\n" * 9_000,
        "answer A, B and " * 4_000,
        "A is correct. so A " * 4_000,
        "(A),(B)," * 9_000,
        "The answer is " + "J. K. " * 9_000,
        "Answer:\n" + "- 1. a\n" * 9_000,
        "12,34," * 9_000 + "1'000" * 9_000,
        "1½" * 9_000,
        "2⁻²**10" * 9_000,
    ],
)
def test_work_is_bounded(text: str) -> None:
    """Hostile text costs the scheduler's loop no more than a few milliseconds."""
    started = time.thread_time()
    for extractor in (*EXTRACTORS, "regex:(a+)+$", "regex:(.*)*x"):
        answer_key(extract_answer(text, extractor) or "")
    assert time.thread_time() - started < 0.5


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
        started = time.thread_time()
        for _ in range(10):
            assert extract_answer(text, "boxed") is None
        assert time.thread_time() - started < 0.25  # 1.3 s where each is followed to the end
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
    started = time.thread_time()
    for _ in range(10):
        extract_answer("234," * 1024, "number")
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("auto", "```json\n{\"answer\": [1, 2]}\n```", "[1,2]"),
        ("auto", "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>", '{"arguments":{},"name":"f"}'),
        ("auto", "It is {\"a\": 1} but\nseven", "seven"),  # words follow
        ("auto", "**Final Answer**\n\\[\n42\n\\]", "42"),
        ("auto", "The answer is not obvious.\n42", "42"),
        ("auto", "The answer is obvious.\n\n42", "42"),
        ("auto", "#### Summary\nWe add.\n\n**Answer:** 7 apples.\n\nHope this helps!", "7 apples"),
        ("auto", "- 42", "42"),
        ("auto", "Let me know", None),
        ("auto", "```", None),
        ("auto", "Then\n```python\nx = 1", None),  # cut in a block
        ("auto", "<think>\\boxed{1}</think>2", "2"),
        ("auto", "\\boxed{1}</think>", None),
        ("boxed", "\\framebox{4}", "4"),
        ("boxed", "\\boxed{\\}}", "\\}"),
        ("boxed", "\\boxes{4}", None),
        ("boxed", "\\boxed", None),
        ("hash", "#### 1. Compute the sum\nWe add.", None),
        ("hash", "#### Final Answer: 18", "18"),
        ("hash", "#### Final Answer\n\n18", "18"),
        ("hash", "#### Understanding the question\nWe add.", None),
        ("hash", "#### New York\nbye", "New York"),
        ("choice", "**Answer**\nB", "B"),
        ("choice", "The answer is E = mc^2", None),
        ("choice", "the answer is x", None),
        ("choice", "(A) is wrong, so is (B) wrong? No: (C)", "C"),
        ("choice", "A. red\nB. blue\nC. green", None),
        ("choice", "B. blue", "B"),
        ("choice", "The answer is A? or B?", None),
        ("number", "so x = -5", "-5"),
        ("number", "the range is 10-20", "20"),
        ("number", "x - 5", "5"),
        ("number", "It costs -$5.", "-5"),
        ("number", "log_2 x^3", None),
        ("number", "of 3, 5, 7", "7"),
        ("number", "12 of 1,5 million", "1.5 million"),
        ("number", "50\\%", "50\\%"),
        ("number", "H2O and A4", None),
        ("number", "the virus COVID-19", None),
        ("number", "version 1.2.3", None),
        ("number", "1.234,56 oder 12 000,5", "12000.5"),
        ("number", "5 percent", "5 percent"),
        ("choice", "b", "B"),
        ("choice", "a b", None),
        ("auto", "The answer is Dr. Smith. Indeed.", "Dr. Smith"),
        ("json", "```json\n[1, {\"b\": null, \"a\": 1.5}]\n```\nDone.", '[1,{"a":1.5,"b":null}]'),
        ("json", "[" * 4000, None),
        ("json", "a {b} c", None),
        ("json:a", "{\"a\": null}", None),
        ("json:a", "{\"a\": \"x\"} {\"b\": 1}", "x"),
        ("tool_call", '{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', '{"arguments":{"a":1},"name":"f"}'),
        ("tool_call", "<function=f><parameter=a>\n1\n</parameter></function>", '{"arguments":{"a":"1"},"name":"f"}'),
        ("tool_call", '{"name": "f"}', None),
        ("tag:a", "<a>1</a> <a></a> <ab>2</ab>", "1"),
        ("yes_no", "no", "no"),
        ("yes_no", "nothing", None),
        ("yes_no", "\\boxed{\\text{Yes}}", "yes"),
        ("yes_no", "The answer is yes or no", None),
        ("code", "```\na\n```\n```\n\n```", "a"),
        ("code", "a = 1", None),
        ("code:python", "```py\na\n```\n```js\nb\n```", "a"),
        ("code:python", "```python\ndef f():\n    return 1\n```\nIt is called so:\n```python\nprint(f())\n```", "def f():\n    return 1"),
        ("code", "```python\ndef f():\n    return 1\n```\nIt prints:\n```\n1\n```", "def f():\n    return 1"),
        ("code:python", "```python\ndef f(): ...\n```\nBetter:\n```python\ndef f(): return 1\n```", "def f(): return 1"),
        ("code", "```\na = 1\n```\n```\na = 2\n```", "a = 2"),
    ],
)  # fmt: skip
def test_kinds(extractor: str, text: str, answer: str | None) -> None:
    """Each kind beside the nearest text that is none of it."""
    check_extractor(extractor)
    assert extract_answer(text, extractor) == answer


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("auto", "so \\boxed{4} and then", "4"),
        ("auto", "#### 42\nbecause", "42"),
        ("auto", "#### 42", None),  # 425?
        ("auto", "Wait,", None),
        ("auto", "The answer is 42.\nLet", "42"),
        ("auto", "The answer is 4", None),
        ("auto", "one\ntwo\n", None),
        ("choice", "The answer is B because", "B"),
        ("choice", "The answer is B", None),
        ("number", "it is 12", None),
        ("json", '{"a": 1}', '{"a":1}'),
        ("tag:a", "<a>1</a>", "1"),
        ("regex:is (\\w+)", "it is so, and", "so"),
        ("regex:is (\\w+)", "it is s", None),
    ],
)
def test_a_text_that_was_cut_has_an_answer_where_a_mark_says_that_it_ended(
    extractor: str, text: str, answer: str | None
) -> None:
    """Else what stands last is what it happened to say."""
    assert extract_answer(text, extractor, is_cut=True) == answer
    assert extract_answer(text, extractor) is not None


def test_an_answer_is_read_whole() -> None:
    """Answers that differ after 256 characters are two; a record has what fits in a line."""
    one, other = (extract_answer(f"\\boxed{{{'a b ' * 100}{end}}}", "boxed") for end in "xy")
    assert one is not None
    assert other is not None
    assert answer_key(one) != answer_key(other)
    short = shown(one)
    assert short is not None
    assert len(short) == 256
    assert shown("19") == "19"
    assert shown(None) is None


@pytest.mark.parametrize(
    "pattern", ["(?s)(?:.{0,100}){0,9}ж|.", "(?s)(?:.*a.{40}b.{40}ж)|.", r"\p{L}{0,20}ж|.", "(?:.{0,200}){0,4}"]
)
def test_a_pattern_of_unbounded_work_is_refused(pattern: str) -> None:
    """One that took eight seconds on 2,048 characters is said to be too large."""
    with pytest.raises(FieldError, match="instructions"):
        check_extractor(f"regex:{pattern}")


@pytest.mark.parametrize(
    "pattern",
    ["(?s).*ж|.", "(?s)(.*)(.*)(.*)ж|(.)", "(?s)(?:a|b)*a(?:a|b){60}ж|.", "(a|b)*(a|b)*(a|b)*ж|b", "(?s).{0,9}.*ж|."],
)
def test_relatives_of_it_cost_little(pattern: str) -> None:
    """Each match may look to the end of the text; all together may not."""
    text = "".join("ab"[i * i * 7 // 5 % 2] for i in range(4096))
    check_extractor(f"regex:{pattern}")
    least = float("inf")
    for _ in range(5):
        started = time.thread_time()
        extract_answer(text, f"regex:{pattern}")
        least = min(least, time.thread_time() - started)
    assert least < 0.002


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"\d+(?:\.\d+)?", "1.5 and 22.75", "22.75"),
        (r"(?s)<a>(.*?)</a>", "<a>1\n2</a> b\nc", "1\n2"),
        (r"[A-Z]+", "AB " * 400 + "XYZ", "XYZ"),
        (r"x*", "xxx", None),  # the last match is the empty one at the end
        (r"(?i)final: (\w+)$", "Final: a\nFINAL: b", "b"),
        (r"^(\w+)", "one two", "one"),
    ],
)
def test_the_last_match_counts(pattern: str, text: str, answer: str | None) -> None:
    """And not the last place where one could begin, which is inside it."""
    assert extract_answer(text, f"regex:{pattern}") == answer


def test_json_of_many_brackets_is_read_in_bounded_time() -> None:
    """As much as JSON of the characters read may have; of brackets alone only the last ones are looked at."""
    dense = "so: " + json.dumps({f"k{i}": i for i in range(1200)})
    assert 15_000 < len(dense) < READ_CHARS
    assert extract_answer(dense, "json:k1199") == "1199"
    brackets = "[]" * 8000
    assert extract_answer(brackets + '{"a": 1}', "json:a") == "1"
    assert extract_answer('so {"a": 1}' + brackets, "json:a") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # A line that only says what comes: the working follows, and the last line counts.
        ("To find the answer:\n1. Add 3 and 4 to get 7.\n2. Multiply by 2 to get 14.\n\nSo 14 apples remain.", "So 14 apples remain."),
        ("Here is how I get the answer:\n\n- 3 + 4 = 7\n- 7 * 2 = 14\n\nTotal: 14", "Total: 14"),
        ("Let's find the answer\n3 + 4 = 7, then 7 + 1 = 8.\nSo it is 8", "So it is 8"),
        ("Let us check the answer:\n4 = 4\nso 4", "so 4"),
        ("**Answer:**\nStep 1: 3 + 4 = 7\nStep 2: 7 * 2 = 14\n\nTotal: 14", "Total: 14"),
        # A mark that has its line for itself: the value is below.
        ("Here is the final answer:\n\n**42**\n\nThis is because.", "42"),
        ("3. **Final Answer**:\n   42\nbye", "42"),
        ("**Answer**\n**42**\nbye", "42"),
        ("最终答案：\n42\nbye", "42"),
        ("**Step 4: Final Answer:**\n42\nbye", "42"),
        ("✅ **Final Answer:**\n42\nbye", "42"),
        ("We have added all of the numbers that there are on this long line of text. The final answer:\n42\nbye", "42"),
        ("We have added all of the numbers that there are on this long line of text to get the answer:\n42\nbye", "bye"),
        ("So what we get as the answer is\n42\nbye", "42"),
        ("To find the answer: 42\nbye", "42"),  # on its own line it counts as ever
        ("Answer:\n42. I hope it is correct.", "42"),
        # A list is the answer where the text ends in it.
        ("Answer:\n1. Paris\n2. Rome", "Paris, Rome"),
        ("Answer: 1. Paris\n2. Rome", "Paris, Rome"),
        ("**Answer:**\n- x = 3\n- y = 4\n", "x = 3, y = 4"),
        ("Answer:\n- 5", "5"),
        ("Answer: 1. Paris", "1. Paris"),
        ("Answer: 42. Hope this helps", "42"),
        ("Answer: 42. QED", "42"),
        ("Answer: 7. Cheers", "7"),
        ("Answer: 12. Twelve", "12"),
        ("Answer: 42. I hope it is correct.", "42"),
        # A sign and a command below a mark are part of the value.
        ("Answer:\n-5", "-5"),
        ("### Answer\n-\\frac12", "-\\frac12"),
        ("The answer is:\n\\[\n\\frac{1}{2}\n\\]", "\\frac{1}{2}"),
        ("Answer:\n[0,1)", "[0,1)"),
        ("Answer:\n$$\n5\n$$", "5"),
    ],
)  # fmt: skip
def test_the_working_is_no_answer(text: str, answer: str) -> None:
    """What a mark announces on the lines below it, beside the nearest text where it announces the working."""
    assert extract_answer(text, "auto") == answer


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("J. K. Rowling", "J. K. Rowling"),
        ("J.K. Rowling, who wrote it.", "J.K. Rowling, who wrote it"),
        ("George W. Bush.", "George W. Bush"),
        ("S. Ramanujan.", "S. Ramanujan"),
        ("Martin Luther King Jr. Day.", "Martin Luther King Jr. Day"),
        ("the U.S. Congress.", "the U.S. Congress"),
        ("approx. 42", "approx. 42"),
        ("No. 5.", "No. 5"),
        ("Fig. 3.", "Fig. 3"),
        ("Prof. Smith.", "Prof. Smith"),
        ("5 p.m. on Monday.", "5 p.m. on Monday"),
        ("5 p.m. Monday.", "5 p.m. Monday"),
        # A sentence of its own follows.
        ("B. Paris is the capital.", "B"),
        ("B. Paris", "B"),
        ("Option B. Paris.", "Option B"),
        ("Vitamin C. It is found in fruit.", "Vitamin C"),
        ("X. Therefore, it holds.", "X"),
        ("the U.S. It has 50 states.", "the U.S"),
        ("5 p.m. The train leaves.", "5 p.m"),
        ("No. It is odd.", "No"),
        ("No. 7 is prime.", "No"),
        ("42. I hope it is correct.", "42"),
        ("3.5. Then", "3.5"),
    ],
)
def test_an_abbreviation_ends_no_sentence(said: str, answer: str) -> None:
    """Nor do initials; two answers that differ after one are two."""
    assert extract_answer(f"The answer is {said}", "auto") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # An option that is only named is not the answer, the less where it is ruled out.
        ("The correct answer is C. Answer A is wrong.", "C"),
        ("**Answer: C**\n\nAnswer choice D is incorrect since it is late.", "C"),
        ("**Answer: C**\n\nAnswers A and B are wrong.", "C"),
        ("The answer is C.\n\nWhy not the others?\n- Answer B is incorrect.\n- Answer D is incorrect.", "C"),
        ("The answer is C. Some may answer B.", "C"),
        ("The answer is (C), which was answer (B) before", "C"),
        ("Answer A is wrong.", None),
        ("Answer A is wrong. Answer B is right.", "B"),
        ("Answer B since option A is too small", "B"),
        ("**Answer** B\n\nbecause option A fails", "B"),
        ("### Answer\n\n**B. Paris**\n\nOption A is in Italy", "B"),
        ("Answer: C is not a mammal", "C"),  # what was asked
        ("The answer is C not A", "C"),
        # Several, with commas.
        ("\\boxed{A, C}", None),
        ("\\boxed{\\text{A}, \\text{C}}", None),
        ("$\\boxed{A}, \\boxed{C}$", None),
        ("The answer is A, C", None),
        ("Answer: (A), (C)", None),
        ("Answer: A, B, and D.", None),
        ("Answer: a, c", None),
        ("<answer>A; C</answer>", None),
        ("The answer is B, A being too small.", "B"),
        ("The answer is B, C and D are wrong.", "B"),
        ("The answer is B, and C is wrong.", "B"),
        ("The answer is C, I think.", "C"),
        ("**(A)**, and (B) is wrong.", "A"),
        # What closes a text without "answer".
        ("C is correct.", "C"),
        ("Therefore, C is correct.", "C"),
        ("**C** is correct.", "C"),
        ("C is the best choice.", "C"),
        ("Hence C is the answer.", "C"),
        ("I choose C.", "C"),
        ("I'd go with C.", "C"),
        ("The correct one is C.", "C"),
        ("So, C.", "C"),
        ("So it is C.", "C"),
        ("(I) is correct.", "I"),
        ("Option A is too small. Therefore, C is correct.", "C"),
        ("I is correct.", None),
        ("So I.", None),
        ("I choose to go.", None),
        ("Statement B is correct.", None),
        ("Vitamin C is the best choice.", None),
        ("If C is correct, then it fails.", None),
        ("C is correct. B is correct.", None),
        ("B is the right angle.", None),
        ("C is the best known one.", None),
        ("Then B is right of A.", None),
        ("so C is the speed of light", None),
        ("so x goes to C", None),
    ],
)
def test_the_option_that_is_settled_on(text: str, answer: str | None) -> None:
    """And not one that is ruled out, nor one of several, nor a letter that names something else."""
    assert extract_answer(text, "choice") == answer


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("6.02 × 10²³", "6.02e23"),
        ("1.2 × 10⁻⁵", "1.2e-5"),
        ("1.2 · 10^-5", "1.2e-5"),
        ("1.2 \\times {10}^{5}", "120000"),
        ("1.2 * 10**5", "120000"),
        ("2**10", "2^10"),
        ("5²", "5^2"),
        ("3½", "7/2"),
        ("3 ¾ cups", "15/4"),
        ("½", "1/2"),
        ("3⁄4", "3/4"),
        ("12,34,567", "1234567"),
        ("1'000", "1000"),
        ("1_000", "1000"),
        ("x is - 3", "-3"),
        # Near them: lists, feet, emphasis, a power of something else, an operator, a dash.
        ("of 12, 34, 567", "567"),
        ("(12,34,567)", "567"),
        ("5'10", "10"),
        ("the answer is **10**", "10"),
        ("3 x 10 boxes", "10"),
        ("x² is 4", "4"),
        ("12 m²", "12"),
        ("x - 3", "3"),
        ("five apples - 3", "3"),
        ("it is – 3 that", "3"),
    ],
)
def test_powers_fractions_and_thousands_in_plain_text(text: str, same: str) -> None:
    """Read whole, or two numbers with powers of ten would both be 10."""
    number = extract_answer(text, "number")
    assert number is not None
    assert answer_key(number, extractor="number") == answer_key(same)


def test_a_number_with_a_part_that_is_not_read_is_none() -> None:
    """Rather than a part of it."""
    assert extract_answer("7.5½", "number") is None
    assert extract_answer("a½", "number") is None


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("boxed", "so \\boxed 1", None),  # 12?
        ("auto", "so \\boxed 1", None),
        ("choice", "so \\boxed B", None),
        ("boxed", "so \\boxed 1 and", "1"),
        ("boxed", "so \\boxed{1}", "1"),
        ("boxed", "so \\boxed \\frac{1}{2}", None),  # the braces close, but of what
        ("json", "12", None),
        ("json", "12\n", "12"),
        ("json", '"12"', "12"),
        ("json", "true", "true"),
        ("json", "[12]", "[12]"),
    ],
)
def test_what_has_no_end_of_its_own_is_not_whole_where_a_text_was_cut(
    extractor: str, text: str, answer: str | None
) -> None:
    """Digits may follow digits."""
    assert extract_answer(text, extractor, is_cut=True) == answer
    assert extract_answer(text, extractor) is not None
