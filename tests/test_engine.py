"""Programs in the real engine."""

from __future__ import annotations

import re
from typing import Any

import pytest
from engines import assert_nothing_left, settled, status_of
from questions import Question, held_out, prompt

from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key

pytestmark = pytest.mark.engine
QUESTIONS = held_out(40)


@pytest.fixture
def engine(shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True)


def params(seed: int | None = None, **field: Any) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "max_new_tokens": 200,
        "sampling_seed": seed,
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }


def solve(engine: Any, questions: list[Question], seed: int | None = 1, **field: Any) -> list[dict[str, Any]]:
    return engine.generate([prompt(q.text) for q in questions], [params(seed, **field)] * len(questions))


def test_one_request_in_one_answer_out(engine: Any) -> None:
    """The response is a normal one: the text of a branch that gave the winning answer, and the program's record."""
    for out in solve(engine, QUESTIONS[:10]):
        record = out["meta_info"]["dynasor"]
        found = extract_answer(out["text"], "hash")
        assert found is not None
        assert answer_key(found) == answer_key(record["answer"])
        assert record["votes"][0]["answer"] == record["answer"]
        assert record["program"] == out["meta_info"]["id"]
        assert out["meta_info"]["finish_reason"]["type"] in ("stop", "length")
        assert record["num_branches"] <= record["cap"] == 16
        assert sum(record["branch_tokens"]) == record["num_tokens"] == out["meta_info"]["completion_tokens"]
        assert len(record["branch_tokens"]) == record["num_branches"]
        if record["stop_reason"] == "certain":
            assert record["risk"] <= 0.05 / 0.5  # of long branches twice the level is enough
        else:
            assert record["num_branches"] == 16


def test_certain_programs_stop_early_and_never_uses_the_cap(engine: Any) -> None:
    """The gate fires on easy questions, and with `never` on none."""
    easy = [q for q in QUESTIONS if q.num_steps <= 2]
    early = [out["meta_info"]["dynasor"] for out in solve(engine, easy)]
    whole = [out["meta_info"]["dynasor"] for out in solve(engine, easy, stop="never")]
    assert any(r["stop_reason"] == "certain" and r["num_branches"] < 16 for r in early)
    assert all(r["stop_reason"] == "cap" and r["num_branches"] == 16 for r in whole)
    assert all(min(r["branch_tokens"]) > 0 for r in whole)
    assert sum(r["num_tokens"] for r in early) < sum(r["num_tokens"] for r in whole)


def test_branches_differ_and_a_seed_reproduces_them(engine: Any) -> None:
    """Siblings sample under seeds of their own; the same request seed gives the same record."""

    def sampled(seed: int) -> list[dict[str, Any]]:
        outs: list[dict[str, Any]] = []
        for question in QUESTIONS[4:8]:
            assert_nothing_left(engine)  # alone, from an empty cache: in the same batches, to the last bit of a logit
            outs += solve(engine, [question], seed=seed, stop="never")
        return outs

    one, two, other = sampled(5), sampled(5), sampled(6)
    for a, b in zip(one, two, strict=True):
        assert a["text"] == b["text"]
        assert a["meta_info"]["dynasor"]["votes"] == b["meta_info"]["dynasor"]["votes"]
        assert sorted(a["meta_info"]["dynasor"]["branch_tokens"]) == sorted(b["meta_info"]["dynasor"]["branch_tokens"])
    assert [a["meta_info"]["dynasor"]["votes"] for a in one] != [c["meta_info"]["dynasor"]["votes"] for c in other]
    assert any(len(a["meta_info"]["dynasor"]["votes"]) > 1 for a in one)


def test_siblings_share_the_prompt(engine: Any) -> None:
    """The first branch computes the prompt, every other finds all of it but its last token in the radix cache."""
    assert_nothing_left(engine)  # and the cache is empty
    (out,) = solve(engine, [QUESTIONS[9]], stop="never")
    record, prompt_tokens = out["meta_info"]["dynasor"], out["meta_info"]["prompt_tokens"] // 16  # of all branches
    assert record["num_cached_tokens"] == out["meta_info"]["cached_tokens"] == 15 * (prompt_tokens - 1)


def test_width_bounds_what_runs(engine: Any) -> None:
    """Width 1 is one branch after the other: never more tokens; the cap is the same."""
    narrow = solve(engine, QUESTIONS[:6], width=1, stop="margin")
    wide = solve(engine, QUESTIONS[:6], width=16, stop="margin")
    spent = [sum(o["meta_info"]["dynasor"]["num_tokens"] for o in outs) for outs in (narrow, wide)]
    assert spent[0] <= spent[1]
    assert all(o["meta_info"]["dynasor"]["width"] == 1 for o in narrow)
    # One at a time nothing is ever cut off: every branch counted has finished and voted.
    for out in narrow:
        record = out["meta_info"]["dynasor"]
        assert sum(v["votes"] for v in record["votes"]) + record["num_abstentions"] == record["num_branches"]


def test_a_program_of_one_branch_is_the_plain_request(engine: Any) -> None:
    """One branch, greedy: the same text as without the field."""
    text = prompt(QUESTIONS[3].text)
    plain = engine.generate(text, {"temperature": 0, "max_new_tokens": 200})
    mine = engine.generate(text, {**params(branches=1), "temperature": 0})
    assert mine["text"] == plain["text"]
    assert mine["meta_info"]["dynasor"]["num_branches"] == 1
    assert "dynasor" not in plain["meta_info"]


def test_logprobs_are_the_winner_s(engine: Any) -> None:
    """What a client asked for besides comes from the branch that speaks."""
    out = engine.generate(prompt(QUESTIONS[1].text), params(1), return_logprob=True, top_logprobs_num=2)
    meta = out["meta_info"]
    record = meta["dynasor"]
    assert len(meta["output_token_logprobs"]) == record["branch_tokens"][record["branch"]]
    assert [i for _, i, _ in meta["output_token_logprobs"]] == out["output_ids"]


def test_a_stop_string_and_a_length_limit_hold_per_branch(engine: Any) -> None:
    """Branches end by the request's own limits; a program whose branches say nothing abstains and says so."""
    limited = engine.generate(prompt(QUESTIONS[9].text), {**params(1), "max_new_tokens": 1})
    record = limited["meta_info"]["dynasor"]
    assert record["answer"] is None
    assert record["num_abstentions"] == 16
    assert limited["meta_info"]["finish_reason"]["type"] == "length"
    stopped = engine.generate(prompt(QUESTIONS[9].text), {**params(1, branches=2), "stop": ["gets"]})
    assert "gets" not in stopped["text"]


def test_a_grammar_binds_every_branch(engine: Any) -> None:
    """Constrained programs: each branch has its own copy of the grammar's state."""
    out = engine.generate("x", {**params(1, branches=6, answer="last_line"), "regex": "(yes|no)", "max_new_tokens": 8})
    record = out["meta_info"]["dynasor"]
    assert re.fullmatch("yes|no", out["text"])
    assert all(v["answer"] in ("yes", "no") for v in record["votes"])


def test_streaming_sends_the_answer_once(engine: Any) -> None:
    """Nothing partial leaks: one chunk with the whole text."""
    chunks = list(engine.generate(prompt(QUESTIONS[0].text), params(1), stream=True))
    assert len(chunks) == 1
    assert "####" in chunks[0]["text"]
    assert chunks[0]["meta_info"]["dynasor"]["answer"]


def test_branches_sent_by_the_client_end_together(engine: Any) -> None:
    """Explicit programs: every request has its own text; once decided the others end as a normal stop."""
    short, long = QUESTIONS[8], QUESTIONS[7]  # thoughts about the long one are still running when the short ones agree
    field = {"program": "mine", "branches": 16, "stop": "beta"}
    prompts = [prompt(short.text)] * 12 + [prompt(long.text, think=True)] * 4
    outs = engine.generate(prompts, [params(seed, **field) for seed in range(16)])
    records = [out["meta_info"]["dynasor"] for out in outs]
    assert all(out["meta_info"]["finish_reason"]["type"] in ("stop", "length") for out in outs)
    last = max(records, key=lambda r: sum(v["votes"] for v in r["votes"]))
    assert last["stop_reason"] == "certain"
    assert any(extract_answer(out["text"], "hash") is None for out in outs[12:])
    assert all(out["meta_info"]["finish_reason"]["type"] == "stop" for out in outs[12:])
    texts = {out["meta_info"]["dynasor"]["index"]: out["text"] for out in outs}
    assert sorted(texts) == list(range(16))
    assert extract_answer(texts[last["branch"]], "hash") == last["answer"]
    late = engine.generate(prompt(short.text), params(99, **field))
    assert late["text"] == ""
    assert late["meta_info"]["dynasor"]["answer"] == last["answer"]


def test_branches_that_end_in_one_step_all_vote(engine: Any) -> None:
    """They are read over several steps, and none is lost; a client's own are each answered once, with the votes so far."""
    together = {"max_new_tokens": 60, "ignore_eos": True}
    field = {"branches": 48, "stop": "never"}
    record = engine.generate(prompt(QUESTIONS[0].text), {**params(**field), **together})["meta_info"]["dynasor"]
    assert sum(v["votes"] for v in record["votes"]) + record["num_abstentions"] == record["num_branches"] == 48
    assert record["stop_reason"] == "cap"
    sent = [{**params(seed, program="together", **field), **together} for seed in range(48)]
    outs = engine.generate([prompt(QUESTIONS[0].text)] * 48, sent)
    records = [out["meta_info"]["dynasor"] for out in outs]
    assert sorted(r["index"] for r in records) == list(range(48))
    assert all(out["meta_info"]["completion_tokens"] == 60 for out in outs)
    counted = sorted(sum(v["votes"] for v in r["votes"]) + r["num_abstentions"] for r in records)
    assert counted == list(range(1, 49))


def test_a_wrong_field_disturbs_nobody(engine: Any) -> None:
    """A bad field is an error to its sender, and the engine goes on."""
    before = status_of(engine)
    for field, message in (({"branches": 65}, "65"), ({"stop": "soon"}, "stop"), ({"colour": 1}, "colour")):
        with pytest.raises(ValueError, match=message):
            engine.generate("Q", params(**field))
    with pytest.raises(ValueError, match="greedy"):
        engine.generate("Q", {**params(), "temperature": 0})
    with pytest.raises(ValueError, match="n=2 with dynasor on a server with deterministic inference"):
        engine.generate("Q", {**params(), "n": 2})
    assert status_of(engine) == before


def test_a_program_of_one_s_own_is_one_s_own(engine: Any) -> None:
    """Whoever sends the first branch declares it; another tenant, or other settings under the same id, are refused."""
    engine.generate("Q", params(branches=3, program="own", tenant="a"))
    with pytest.raises(ValueError, match=r"dynasor\.program='own' is another tenant's"):
        engine.generate("Q", params(branches=3, program="own", tenant="b"))
    with pytest.raises(ValueError, match=r"dynasor\.program='own' was declared with other settings"):
        engine.generate("Q", params(branches=4, program="own", tenant="a"))
    assert engine.generate("Q", params(branches=3, program="own", tenant="a"))["meta_info"]["dynasor"]["cap"] == 3


def test_everything_is_given_back(engine: Any) -> None:
    """After all this no program, branch or error is left. One more first: the others may have run in another process."""
    engine.generate(prompt(QUESTIONS[0].text), params(branches=4))
    status = settled(engine)
    assert status["num_held_programs"] == 0
    assert status["num_branches_inside"] == 0
    assert status["num_policy_errors"] == 0
    assert status["num_programs"] > 0
