"""Every example in docs/answers.md is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_dynasor.policy.answers import check_extractor, extract_answer
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.symbolic import is_same

PAGE = (Path(__file__).parents[1] / "docs" / "answers.md").read_text()


def tables(section: str) -> list[list[list[str]]]:
    """The tables of a section, as rows of cells; the header is the first."""
    text = re.split(rf"^#+ {re.escape(section)}$", PAGE, flags=re.M)[1]
    text = re.split(r"^#+ ", text, flags=re.M)[0]
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r" \| ", line.strip("| ").replace("<|eot_id|>", "<\x00eot_id\x00>") + " ")
            if not set(line) <= set("|- "):
                found[-1].append([cell.strip().replace("\x00", "|") for cell in cells])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def code(cell: str) -> str | None:
    """What a cell has between backticks, new lines put in; None for a dash."""
    if cell == "—":
        return None
    fence = re.match("`+", cell)
    assert fence, cell
    assert cell.endswith(fence[0]), cell
    return cell.removeprefix(fence[0]).removesuffix(fence[0]).strip(" ").replace("⏎", "\n")


ORDER, LINES = tables("What `auto` reads")
AUTO = [*(("auto", row[-3], row[-2]) for row in ORDER[1:]), *(("auto", row[0], row[1]) for row in LINES[1:])]
OTHERS = [(code(row[0]), row[1], row[2]) for row in tables("What the others read")[0][1:]]
EQUAL, DIFFERENT = tables("What counts as equal")
CONTESTED = tables("Contested")[0][1:]
PAIRS = [
    *((row[0], row[1], True) for row in EQUAL[1:]),
    *((row[0], row[1], False) for row in DIFFERENT[1:]),
    *((row[0], row[1], {"equal": True, "different": False}[row[2]]) for row in CONTESTED),
]


@pytest.mark.parametrize(("extractor", "text", "answer"), [*AUTO, *OTHERS])
def test_what_is_read(extractor: str, text: str, answer: str) -> None:
    """The page says what a reader of it will find."""
    check_extractor(extractor)
    assert extract_answer(code(text) or "", extractor) == code(answer)


@pytest.mark.parametrize(("one", "other", "is_equal"), PAIRS)
def test_what_is_equal(one: str, other: str, is_equal: bool) -> None:
    """And what its votes will be."""
    assert (answer_key(code(one) or "") == answer_key(code(other) or "")) is is_equal


def test_the_page_has_examples_of_each_kind() -> None:
    """Were the tables not found, nothing above would fail."""
    assert len(AUTO) >= 16
    assert len(OTHERS) >= 40
    assert len(PAIRS) >= 60


@pytest.mark.parametrize(
    ("one", "other", "is_equal"), [(row[0], row[1], row[2] == "equal") for row in tables("Symbolic")[0][1:]]
)
def test_what_is_symbolically_equal(one: str, other: str, is_equal: bool) -> None:
    """By the code that the process runs; to `math` each is two answers."""
    forms = [answer_key(code(cell) or "") for cell in (one, other)]
    assert forms[0] != forms[1]
    assert is_same(*forms) is is_equal
