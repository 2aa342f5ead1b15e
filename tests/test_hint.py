"""What a record says of ends: truncated branches, thoughts, grammars, and why nobody voted."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_dynasor.policy.answers import is_thinking, read_answer, thinks_on
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import check_greedy, is_greedy, parse_field
from sglang_dynasor.policy.thought import Trial

CUT = Ending(is_cut=True)


def program(num: int = 2, constraint: str = "", **field: Any) -> Program:
    made = Program("p", parse_field({"branches": num, "stop": "never", **field}, 64), constraint=constraint)
    for _ in range(num):
        made.start_branch()
    return made


def hint_of(made: Program) -> str:
    return made.record().get("hint", "")


# Cut branches


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So we get 12 +", None),
        ("Wait, let me check", None),
        ("x = 4\nThe total is", None),
        ("It is \\boxed{7}. Let me double", "7"),
        ("#### 19\nNow", "19"),
        ("#### 19", None),  # the number may go on
        ("<answer>B</answer> because", "B"),
    ],
)
def test_a_cut_branch_votes_only_for_what_a_mark_has_closed(text: str, answer: str | None) -> None:
    made = program(2)
    made.finish(0, text, 60, ending=CUT)
    assert made.branches[0].answer == answer
    record = made.record()
    assert record["num_truncated"] == 1
    assert record["finish_reasons"] == ["length", None]
    assert record["num_abstentions"] == (answer is None)


@pytest.mark.parametrize(
    ("extractor", "text", "answer"),
    [
        ("number", "Tom has 3 + 4 = 7 apples.\nTom has", None),
        ("number", "The answer is 7. Tom has 12 apples if", "7"),
        ("number", "#### 7\nTom", "7"),
        ("choice", "A) car is wrong, since a car", None),
        ("choice", "B", None),
        ("choice", "The answer is B. A car is", "B"),
        ("choice", "\\boxed{C} and", "C"),
        ("yes_no", "Yes, because the", None),
        ("yes_no", "<answer>no</answer> be", "no"),
        ("last_line", "one\ntwo\nthree", None),
        ("json", '{"a": 1} and then {"b"', '{"a":1}'),
        ("code", "```\na\n```\nIt", "a"),
    ],
)
def test_what_a_mark_is_to_each_extractor(extractor: str, text: str, answer: str | None) -> None:
    assert read_answer("", text, extractor, is_cut=True) == answer
    assert read_answer("", text, extractor) is not None


def test_the_hint_says_how_many_were_cut_and_where() -> None:
    made = program(3)
    for index, num_tokens in enumerate((60, 58, 60)):
        made.finish(index, "so", num_tokens, ending=CUT)
    assert hint_of(made) == (
        "all 3 branches that ended were cut before an answer was complete, at 60 tokens; send a larger max_new_tokens (max_tokens)"
    )
    some = program(2)
    some.finish(0, "so", 60, ending=CUT)
    some.finish(1, "?!", 3)
    assert hint_of(some).startswith("1 of 2 branches that ended were cut")


def test_no_hint_where_somebody_answered_or_nobody_has_ended() -> None:
    made = program(2)
    assert hint_of(made) == ""
    made.finish(0, "so", 60, ending=CUT)
    made.finish(1, "#### 3", 9)
    assert hint_of(made) == ""


# Thoughts


def test_an_open_thought_has_no_answer_wherever_it_was_opened() -> None:
    inside, after = "It is \\boxed{4}.", "hm</think>\n\\boxed{5}"
    assert read_answer("<think>\n", inside, "auto") is None
    assert read_answer("<|assistant|><think>", inside, "auto") is None
    assert read_answer("", f"<think>{inside}", "boxed") is None
    assert read_answer("<think>\n", after, "auto") == "5"
    assert read_answer("User: what does <think> mean?\n", inside, "auto") == "4"
    assert read_answer("<think>\n\n</think>\n\n", inside, "auto") == "4"
    assert is_thinking("<think>\n", inside)
    assert not is_thinking("<think>\n", after)
    assert not is_thinking("", inside)


def test_the_end_of_a_chat_template_is_no_lead() -> None:
    """What the user wrote before the template's mark begins no answer; what the template's assistant begins with does."""
    assert read_answer("The answer is:<｜Assistant｜>", "x = 1\nforty two", "auto") == "forty two"
    assert read_answer("[INST] Write #### and the number [/INST]", " 12\n#### 13", "hash") == "13"
    assert read_answer("<|im_start|>assistant\n####", " 13\n", "hash") == "13"


def test_all_in_a_thought() -> None:
    made = program(2)
    for index in range(2):
        made.finish(index, "\\boxed{3}", 60, lead="<think>\n", ending=CUT)
    assert "cut in the middle of a thought, at 60 tokens" in hint_of(made)
    ended = program(1)
    ended.finish(0, "<think>3", 5)
    assert hint_of(ended) == "all 1 branches ended inside a thought: no answer was written"


def test_a_stop_string_inside_the_thought_is_said() -> None:
    made = program(1, algorithm="long_cot")
    made.finish(0, "<think>First,", 5, ending=Ending(stop="\n\n"))
    assert "1 of 1 branches were ended inside their thought by the stop string '\\n\\n'" in hint_of(made)
    named = program(1, algorithm="long_cot", think_end="[done]", answer="boxed")
    named.finish(0, "First,", 5, ending=Ending(stop="\n\n"))
    assert "inside their thought by the stop string" in hint_of(named)
    fine = program(1, algorithm="long_cot")
    fine.finish(0, "<think>First,</think> \\boxed{3}", 5, ending=Ending(stop="\n\n"))
    assert hint_of(fine) == ""


def test_a_thought_that_goes_on_after_it_was_closed_is_said() -> None:
    assert thinks_on("hm</think>Wait, no</think> 3")
    assert thinks_on("hm</think> <think>again")
    assert not thinks_on("hm</think> 3")
    assert not thinks_on("<think>hm")
    assert thinks_on("hm[done]Wait[done]4", "[done]")
    assert not thinks_on("hm[done]4", "[done]")
    made = program(1, algorithm="long_cot", agree=1, min_tokens=0)
    assert made.see_trial(0, Trial("3", "3", 1.0, 4)) == 0
    made.finish(0, "hm</think>Wait, no</think> \\boxed{3}", 9)
    assert "1 of 1 branches went on thinking after their thought was closed" in hint_of(made)
    never_closed = program(1, algorithm="long_cot")
    never_closed.finish(0, "hm</think>Wait, no</think> \\boxed{3}", 9)
    assert hint_of(never_closed) == ""


def test_the_end_of_a_thought_that_the_client_names() -> None:
    """Where it stands, what follows it answers, whatever began the thought."""
    made = program(2, algorithm="long_cot", think_end="[done]", answer="hash")
    made.finish(0, "hm #### 3 [done]\n#### 4\n", 9, lead="<think>\n")
    made.finish(1, "hm #### 3\n", 9, lead="<think>\n")
    assert [branch.answer for branch in made.branches] == ["4", None]
    begun = program(1, algorithm="long_cot", think_end="</think>\n####", answer="hash")
    begun.finish(0, "hm #### 3 </think>\n#### 4\n", 9, lead="<think>\n")
    assert begun.branches[0].answer == "4"


# Grammars


@pytest.mark.parametrize(
    ("constraint", "answer", "is_said"),
    [("json_schema", "boxed", True), ("structural_tag", "last_line", True), ("json_schema", "tag:a", True),
     ("json_schema", "auto", False), ("json_schema", "json:a", False), ("regex", "boxed", False), ("", "boxed", False)],
)  # fmt: skip
def test_json_with_an_extractor_that_reads_none(constraint: str, answer: str, is_said: bool) -> None:
    made = program(2, constraint, answer=answer)
    assert ("makes JSON" in hint_of(made)) is is_said


def test_nothing_found_names_the_grammar() -> None:
    made = program(1, "regex", answer="boxed")
    made.finish(0, "yes", 3)
    assert hint_of(made).startswith("none of 1 texts has an answer that dynasor.answer='boxed' reads, under regex")


# Ends told truly


def test_a_program_whose_every_branch_was_used_is_not_certain() -> None:
    """2-1-1 of four: nothing was saved, half agree; four of four: cap as well, and as sure as four are."""
    made = program(4, stop="margin")
    for index, answer in enumerate("1123"):
        made.finish(index, f"#### {answer}", 5)
    record = made.record()
    assert (made.reason, record["leader_share"]) == (StopReason.CAP, 0.5)
    assert record["certaindex"] < 0.8
    alike = program(4, stop="never")
    for index in range(4):
        alike.finish(index, "#### 1", 5)
    assert (alike.reason, alike.record()["leader_share"]) == (StopReason.CAP, 1.0)
    assert record["certaindex"] < alike.record()["certaindex"] < 1


def test_a_program_that_could_have_used_more_is_certain() -> None:
    made = program(4, stop="margin")
    for index in range(3):
        made.finish(index, "#### 1", 5)
    assert made.reason is StopReason.CERTAIN
    assert made.num_in_flight == 1


def test_greedy() -> None:
    for sampling in ({"temperature": 0}, {"temperature": 0.0}, {"top_k": 1, "temperature": 1.0}, {"temperature": 1e-7}):
        assert is_greedy(sampling)
        check_greedy(1, sampling)
        with pytest.raises(ValueError, match="greedy branches would all be the same"):
            check_greedy(2, sampling)
    for sampling in ({}, {"temperature": 0.7}, {"temperature": None}, {"top_k": -1}, {"top_k": 2}):
        check_greedy(16, sampling)
