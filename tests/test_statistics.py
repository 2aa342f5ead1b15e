"""Statistics next to the logits, in the real engine: equal to what SGLang's own logprobs give, and absent where nobody asks."""

from __future__ import annotations

import asyncio
import json
import shutil
from math import exp
from pathlib import Path
from statistics import mean, pvariance
from typing import Any

import pytest
import torch
from engines import CHECKPOINT, assert_nothing_left, settled, status_of
from questions import held_out, prompt
from safetensors.torch import load_file, save_file
from sglang.srt.managers import scheduler
from transformers import AutoTokenizer
from warm import WarmServer

from sglang_dynasor.engine import controller
from sglang_dynasor.engine.slots import Memory, Slots
from sglang_dynasor.engine.watch import Watch

pytestmark = pytest.mark.engine
QUESTIONS = held_out(40)
VOCAB_SIZE = 552  # of the tiny reasoner
WORKED_OUT = [
    q for q in held_out(100) if q.text.startswith(("Coins", "Pens", "Apples"))
]  # topics of which few answers are guesses
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}


@pytest.fixture(params=[{}, {"disable_overlap_schedule": True}], ids=["overlap", "no overlap"])
def engine(request: pytest.FixtureRequest, shared_engine: Any) -> Any:
    return shared_engine(scheduler="dynasor", dynasor_strict=True, **request.param)


def params(temperature: float = 1.0, **field: Any) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "max_new_tokens": 200,
        "custom_params": {"dynasor": {"answer": "hash", **field}},
    }


def token_confidences(out: dict[str, Any]) -> list[float]:
    """DeepConf's, from SGLang's own top logprobs."""
    return [-mean(logprob for logprob, _, _ in top) for top in out["meta_info"]["output_top_logprobs"]]


@pytest.mark.parametrize("group_tokens", [1, 8, 8192])
def test_confidence_is_that_of_sglang_s_logprobs(engine: Any, group_tokens: int) -> None:
    """At temperature 1 SGLang's logprobs are of the same distribution: the lowest group of the branch is theirs."""
    for question in QUESTIONS[:4]:
        field = params(1.0, branches=1, statistics=True, group_tokens=group_tokens)
        out = engine.generate(prompt(question.text), field, return_logprob=True, top_logprobs_num=20)
        confidences = token_confidences(out)
        size = min(group_tokens, len(confidences))
        groups = [mean(confidences[i : i + size]) for i in range(len(confidences) - size + 1)]
        assert out["meta_info"]["dynasor"]["confidences"] == [pytest.approx(min(groups), rel=1e-4)]


def test_nothing_is_computed_where_nobody_asks(engine: Any) -> None:
    """Plain requests and programs without statistics leave the observer alone; one program that asks does not."""
    text = prompt(QUESTIONS[3].text)
    before = status_of(engine)["num_steps_watched"]
    alone = engine.generate(text, {"temperature": 0, "max_new_tokens": 100})
    engine.generate(text, params(branches=4))
    assert status_of(engine)["num_steps_watched"] == before
    # Beside a watched program a plain request still says the same.
    beside, watched = engine.generate(
        [text, text], [{"temperature": 0, "max_new_tokens": 100}, params(statistics=True)]
    )
    assert status_of(engine)["num_steps_watched"] > before
    assert beside["text"] == alone["text"]
    assert len(watched["meta_info"]["dynasor"]["confidences"]) == watched["meta_info"]["dynasor"]["num_branches"]
    assert settled(engine)["num_branches_watched"] == 0


def test_the_judge_says_what_the_model_says(engine: Any) -> None:
    """The reward equals good / (good + bad) of the model's next token after the judge's suffix, and costs two tokens."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    labels = [tokenizer.encode(JUDGE[f"judge_{key}"], add_special_tokens=False)[0] for key in ("good", "bad")]
    for question in QUESTIONS[:6]:
        text = prompt(question.text)
        out = engine.generate(text, params(1.0, branches=1, **JUDGE))
        record = out["meta_info"]["dynasor"]
        assert record["num_judge_tokens"] == 2
        judged = engine.generate(
            text + out["text"] + "<judge>",
            {"temperature": 1.0, "max_new_tokens": 1},
            return_logprob=True,
            token_ids_logprob=labels,
        )
        good, bad = (exp(logprob) for logprob, _, _ in judged["meta_info"]["output_token_ids_logprobs"][0])
        assert record["rewards"] == [pytest.approx(good / (good + bad), abs=1e-5)]


def test_every_voter_is_judged_before_it_votes(engine: Any) -> None:
    """Votes weigh by reward: the winner is the answer with the most of it, not with the most branches."""
    outs = engine.generate(
        [prompt(q.text) for q in QUESTIONS[:16]],
        [params(branches=8, stop="never", vote="reward", **JUDGE)] * 16,
    )
    for out in outs:
        record = out["meta_info"]["dynasor"]
        assert record["stop_reason"] == "cap"
        assert len(record["rewards"]) == 8
        assert all(reward is not None and 0 <= reward <= 1 for reward in record["rewards"])
        assert record["reward_mean"] == pytest.approx(mean(record["rewards"]), abs=1e-5)
        assert record["reward_max"] == pytest.approx(max(record["rewards"]), abs=1e-5)
        assert record["reward_variance"] == pytest.approx(pvariance(record["rewards"]), abs=1e-5)
        assert record["num_judge_tokens"] == 16
        assert 0 < record["leader_share"] <= 1
    status = settled(engine)
    assert status["num_branches_inside"] == status["num_branches_watched"] == status["num_policy_errors"] == 0


def test_weak_branches_end_early(engine: Any) -> None:
    """With nine tenths of the warm-up as the bar some are ended; without it none."""
    prompts = [prompt(q.text) for q in QUESTIONS if q.num_steps >= 5][:8]
    spent: dict[float, int] = {}
    for weak_frac in (0.0, 0.9):
        field = params(2.0, stop="never", weak_frac=weak_frac, group_tokens=8, statistics=True, width=4)
        records = [out["meta_info"]["dynasor"] for out in engine.generate(prompts, [field] * len(prompts))]
        spent[weak_frac] = sum(record["num_tokens"] for record in records)
        weak = [record["num_weak"] for record in records]
        assert (sum(weak) > 0) == (weak_frac > 0)
        assert all(record["stop_reason"] == "cap" and record["num_branches"] == 16 for record in records)
        assert all(record["num_abstentions"] >= record["num_weak"] for record in records)
    assert spent[0.9] < spent[0.0]


def test_the_answer_s_entropy_is_that_of_sglang_s_logprobs(engine: Any) -> None:
    """Of one branch: its doubt of each token of its answer, what ends it included, and nobody to disagree with."""
    for question in QUESTIONS[:4]:
        field = params(1.0, branches=1, statistics=True)
        out = engine.generate(prompt(question.text), field, return_logprob=True, top_logprobs_num=VOCAB_SIZE)
        record, tops = out["meta_info"]["dynasor"], out["meta_info"]["output_top_logprobs"]
        num = record["num_answer_tokens"]
        assert 2 <= num <= 4
        rows = [[logprob for logprob, _, _ in top if logprob > -50] for top in tops[-num:]]
        assert record["answer_entropy"] == pytest.approx(
            -sum(exp(x) * x for row in rows for x in row), rel=1e-3, abs=1e-4
        )
        assert record["disagreement"] == pytest.approx(0.0, abs=1e-5)  # float32


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_slots_are_exact_whatever_the_scheduler_does(
    start_engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overlap: bool
) -> None:
    """Prompts in chunks, programs retracted in the middle of their answers, others that end while rows are kept, too few slots."""
    rows: dict[Any, list[Any]] = {}
    log, see, add, mix = tmp_path / "told", Watch._see, Slots.add, Watch._mixed

    def seeing(self: Watch, live: Any, req: Any, tag: Any, token: int, found: Any, i: int) -> None:
        self.row = found.rows[i].double().exp()  # type: ignore[attr-defined]
        Slots.watch = self  # type: ignore[attr-defined]
        see(self, live, req, tag, token, found, i)

    def adding(self: Slots, tag: Any, said: Any, place: int, num: int) -> None:
        rows.setdefault((tag.live.program.id, said), []).append(Slots.watch.row)  # type: ignore[attr-defined]
        add(self, tag, said, place, num)

    def mixing(self: Watch, live: Any, added: Any, entropy: float) -> None:
        there = rows[live.program.id, added.slot.said][: added.addition.num_rows]
        mean = torch.stack(there).mean(0)
        error = abs(entropy + torch.special.xlogy(mean, mean).sum().item())
        with log.open("a") as out:
            out.write(json.dumps([len(there), added.addition.num_rows, error]) + "\n")
        mix(self, live, added, entropy)

    monkeypatch.setattr(Watch, "_see", seeing)
    monkeypatch.setattr(Slots, "add", adding)
    monkeypatch.setattr(Watch, "_mixed", mixing)
    monkeypatch.setattr(controller, "share_out", lambda mib, vocab_size: Memory(24, 6))
    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 9)
    engine = start_engine(
        scheduler="dynasor", dynasor_strict=True, chunked_prefill_size=32, disable_overlap_schedule=not overlap
    )
    fields = [{"stop": "never", "statistics": True}, {"stop": "mixture:0.5"}, {"stop": "fast or disagreement:2"}]
    prompts = [prompt(q.text) for q in QUESTIONS[:9]]
    outs = engine.generate(prompts, [params(1.3, branches=8, **field) for field in fields * 3])
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(there == num and error < 1e-4 for there, num, error in told)
    assert max(num for _, num, _ in told) >= 4
    records = [out["meta_info"]["dynasor"] for out in outs]
    assert all(record["disagreement"] >= 0 and record["num_answer_tokens"] > 0 for record in records)
    assert any(record["stop_reason"] == "certain" for record in records)
    assert status_of(engine)["num_answers_without_slot"] > 0
    assert_nothing_left(engine)  # no slot either


@pytest.mark.parametrize("stop", ["confidence", "mixture"])
def test_rules_that_read_logits_stop(engine: Any, stop: str) -> None:
    """They fire on easy questions; an impossible level does not."""
    prompts = [prompt(q.text) for q in WORKED_OUT if q.num_steps <= 2][:8]
    outs = engine.generate(prompts, [params(0.3, stop=stop)] * 8)
    assert (
        sum(out["meta_info"]["dynasor"]["stop_reason"] == "certain" for out in outs) >= 1
    )  # how many, the step of each says
    hot = engine.generate(prompts, [params(3.0, stop="mixture:1" if stop == "mixture" else "confidence:1")] * 8)
    assert any(out["meta_info"]["dynasor"]["stop_reason"] == "cap" for out in hot)


def test_branches_at_their_answer_are_seen(engine: Any) -> None:
    """Where branches agree there is no disagreement; on hot ones there is."""
    prompts = [prompt(q.text) for q in QUESTIONS[:8]]
    cold = [
        o["meta_info"]["dynasor"] for o in engine.generate(prompts, [params(0.2, stop="never", statistics=True)] * 8)
    ]
    hot = [
        o["meta_info"]["dynasor"] for o in engine.generate(prompts, [params(2.0, stop="never", statistics=True)] * 8)
    ]
    assert mean(r["disagreement"] for r in cold) < 0.2 < mean(r["disagreement"] for r in hot)
    assert mean(r["answer_entropy"] for r in cold) < mean(r["answer_entropy"] for r in hot)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({**JUDGE, "judge_good": "good better"}, "dynasor.judge_good='good better' is [2-9] tokens of this model"),
        ({"judge": "model"}, "start the server with --dynasor-reward-url"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(engine: Any, judge: dict[str, Any], message: str) -> None:
    """To its client alone, before anything is queued."""
    before = status_of(engine)
    with pytest.raises(ValueError, match=message):
        engine.generate("Q", params(**judge))
    assert status_of(engine) == before


def test_at_its_deadline_a_judged_program_gives_its_longest_text(engine: Any) -> None:
    """Nobody has voted: there is no time to judge, and the text there is is the answer."""
    for deadline_s in (0.7, 2.0, 6.0):  # on a machine that stalls there is no text at the first
        field = params(branches=64, width=16, stop="never", deadline_s=deadline_s, **JUDGE)
        out = engine.generate(prompt(QUESTIONS[1].text), {**field, "max_new_tokens": 900, "ignore_eos": True})
        assert out["meta_info"]["dynasor"]["stop_reason"] == "deadline"
        if out["text"]:
            break
    assert out["text"]
    status = settled(engine)
    assert status["num_held_programs"] == status["num_policy_errors"] == 0


def test_clients_that_give_up_leave_no_judge(engine: Any) -> None:
    """Aborted at any time, also while branches are judged."""

    async def one(i: int) -> Any:
        field = params(branches=8, stop="never", statistics=True, **JUDGE)
        loop = asyncio.get_running_loop()
        loop.call_later(0.05 * i, engine.tokenizer_manager.abort_request, f"given-up-{i}.")
        return await engine.async_generate(prompt(QUESTIONS[i].text), field, rid=f"given-up-{i}.")

    async def everyone() -> list[Any]:
        return await asyncio.gather(*map(one, range(12)), return_exceptions=True)

    engine.loop.run_until_complete(everyone())
    status = settled(engine)
    assert status["num_branches_inside"] == status["num_branches_watched"] == status["num_held_programs"] == 0
    assert status["num_policy_errors"] == 0


def test_branches_that_clients_send_are_watched_too(engine: Any) -> None:
    """Their confidences are in the record, and votes weigh by them."""
    field = {"program": f"mine-{status_of(engine)['num_steps_watched']}", "branches": 4, "vote": "confidence"}
    outs = engine.generate([prompt(QUESTIONS[2].text)] * 4, [params(stop="never", **field)] * 4)
    last = max((out["meta_info"]["dynasor"] for out in outs), key=lambda r: sum(v["votes"] for v in r["votes"]))
    assert sum(c > 0 for c in last["confidences"]) == 4
    assert 0 < last["leader_share"] <= 1


def reward_checkpoint(folder: Path) -> Path:
    """The tiny reasoner with a scalar head: its logit of good minus that of bad."""
    shutil.copytree(CHECKPOINT, folder)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    good, bad = (tokenizer.encode(JUDGE[f"judge_{key}"], add_special_tokens=False)[0] for key in ("good", "bad"))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["score.weight"] = (embedding[good].float() - embedding[bad].float())[None].to(embedding.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_reward_model_on_another_server(start_engine: Any, tmp_path: Path) -> None:
    """The same judge behind a scalar head, asked over HTTP: the same rewards as the model's own judgement."""
    checkpoint = reward_checkpoint(tmp_path / "reward_model")
    server = WarmServer(tmp_path / "log", "--is-embedding", "--dtype", "float32", checkpoint=checkpoint)
    try:
        server.wait()
        engine = start_engine(
            scheduler="dynasor", dynasor_strict=True, dynasor_reward_url=server.url, dynasor_reward_timeout_s=30
        )
        prompts = [prompt(q.text) for q in QUESTIONS[:16]]
        field = {"branches": 1, "stop": "never", "vote": "reward"}
        outs = {
            name: engine.generate(prompts, [params(0.0, **judge, **field)] * len(prompts))
            for name, judge in (
                ("own", JUDGE),
                ("model", {"judge": "model", "judge_suffix": JUDGE["judge_suffix"]}),
                ("steps", {"judge": "steps", "judge_suffix": JUDGE["judge_suffix"]}),
            )
        }
        for own, model, steps in zip(*outs.values(), strict=True):
            assert own["text"] == model["text"] == steps["text"]
            (mine,), (theirs,), (least,) = (out["meta_info"]["dynasor"]["rewards"] for out in (own, model, steps))
            assert least <= theirs + 1e-2  # the whole text is one of the steps
            assert theirs == pytest.approx(mine, abs=1e-2)  # SGLang rounds in bfloat16 or sends float32
        assert status_of(engine)["num_reward_errors"] == 0
    finally:
        server.stop()
    # The reward model is gone: programs are answered all the same, without rewards.
    out = engine.generate(prompts[0], params(branches=4, stop="never", judge="model"))
    assert out["meta_info"]["dynasor"]["rewards"] == [None] * 4
    assert out["meta_info"]["dynasor"]["answer"] is not None
    status = settled(engine)
    assert status["num_reward_errors"] == 4
    assert status["num_held_programs"] == status["num_branches_inside"] == 0
