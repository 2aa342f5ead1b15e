"""Images: each branch sees what its program's request has, and nothing of it is dropped that a sibling still needs."""

from __future__ import annotations

import asyncio
import json
import weakref
from array import array
from collections import Counter
from collections.abc import Callable
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import assert_nothing_left, status_of
from questions import held_out, prompt
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.mm_utils import extend_mrope_positions_for_retracted_request
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs, Req
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.multimodal.transport.cuda_ipc import CudaIpcTensorTransportProxy
from sglang.srt.sampling.sampling_params import SamplingParams
from vision import IMAGE, make_vision_model, picture

from sglang_dynasor.engine import gate, media, place, streamer, validation
from sglang_dynasor.engine.live import BranchTag, LiveProgram
from sglang_dynasor.engine.req import branch_seed, go_on_from, make_branch
from sglang_dynasor.engine.voting import Voting
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

QUESTIONS = [q for q in held_out(60) if q.num_steps >= 3]
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
THOUGHT = {
    "algorithm": "long_cot", "think_end": "</think>\n####", "probe_suffix": "</think>\n####", "probe_tokens": 16, "min_tokens": 16,
    "agree": 2, "exit": "trial:0.5",
}  # fmt: skip

GREEDY = {"temperature": 0.0, "max_new_tokens": 300}


# Without an engine: SGLang's own Req and inputs


class Lent(CudaIpcTensorTransportProxy):
    """Features that the front process has lent: CUDA is left out, how often they are given back is counted."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.num_given_back = tensor, 0

    def reconstruct_on_target_device(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_given_back += 1
        return self.tensor

    def release_without_reconstruction(self, consumer_count: int = 1) -> None:
        self.num_given_back += 1


def inputs_of(feature: Any, num_tokens: int, delta: int = -2, **more: Any) -> MultimodalInputs:
    """An image in tokens 1 to 4 of a prompt."""
    item = MultimodalDataItem(
        modality=Modality.IMAGE,
        hash=7,
        offsets=[(1, 4)],
        feature=feature,
        model_specific_data={"grid": torch.ones(1, 3)},
    )
    item.set_pad_value()
    positions = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 2, 2], [0, 1, 2, 1, 2]])
    text = torch.arange(5, num_tokens).expand(3, -1) + delta
    return MultimodalInputs(
        [item],
        mrope_positions=torch.cat([positions, text], dim=1),
        mrope_position_delta=torch.tensor([[delta]]),
        **more,
    )


def request_of(inputs: MultimodalInputs | None, num_tokens: int = 9) -> Req:
    params = SamplingParams(max_new_tokens=24, custom_params={"dynasor": {}})
    params.normalize(None)
    req = Req("parent", "", array("q", range(num_tokens)), params, eos_token_ids={0}, vocab_size=100)
    req.multimodal_inputs = inputs
    return req


def branches_of(parent: Req, num: int) -> list[Req]:
    live = LiveProgram(Program("p", parse_field({"branches": 16}, 64)), parent=parent)
    server, keeper = SimpleNamespace(disaggregation_mode=DisaggregationMode.NULL), Any
    tags = [BranchTag(live, live.program.start_branch(), keeper) for _ in range(num)]  # type: ignore[arg-type]
    return [make_branch(server, parent, f"rid-{tag.index}.", tag) for tag in tags]


def features(req: Req) -> list[Any]:
    assert req.multimodal_inputs is not None
    return [item.feature for item in req.multimodal_inputs.mm_items]


def test_what_one_drops_the_others_keep() -> None:
    """Each has items of its own with the same tensor in them: also one that is a copy of the first, made when that is gone."""
    tensor = torch.zeros(4, 2)
    parent = request_of(inputs_of(tensor, 9))
    first, second = branches_of(parent, 2)
    assert first.multimodal_inputs is not None
    (item,), (its,) = first.multimodal_inputs.mm_items, parent.multimodal_inputs.mm_items  # type: ignore[union-attr]
    assert (item.hash, item.pad_values, item.offsets) == (its.hash, its.pad_values, its.offsets)
    assert first.get_mm_token_counts() == parent.get_mm_token_counts() == (4, 0, 0)
    item.model_specific_data["mark"] = True  # as SGLang marks what it has lent
    first.release_mm_inputs_on_abort()
    assert first.multimodal_inputs is None
    for req in (parent, second):
        assert features(req)[0] is tensor
        assert "mark" not in req.multimodal_inputs.mm_items[0].model_specific_data  # type: ignore[union-attr]
    media.drop(parent)
    assert parent.multimodal_inputs is None
    assert parent.get_mm_token_counts() == (4, 0, 0)  # its client is told
    assert features(second)[0] is tensor


def test_of_text_nobody_has_anything() -> None:
    parent = request_of(None)
    media.keep(parent)
    (branch,) = branches_of(parent, 1)
    media.drop(parent)
    assert branch.multimodal_inputs is None
    assert branch.get_mm_token_counts() == (0, 0, 0)


@pytest.mark.parametrize("delta", [-2, 0, 5])
def test_a_longer_text_has_positions_to_its_end(delta: int) -> None:
    """As SGLang counts them while it decodes, and again for what was retracted; what is text is text."""
    parent = request_of(inputs_of(torch.zeros(4, 2), 9, delta, token_modalities=[0, 1, 1, 1, 1, 0, 0, 0, 0]))
    (branch,) = branches_of(parent, 1)
    go_on_from(branch, array("q", [1, 2, 3]))
    table: Any = branch.multimodal_inputs
    assert table.mrope_positions.shape == (3, 12)
    assert table.token_modalities == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    decoded = [ForwardBatch._expand_mrope_from_input(Any, parent.multimodal_inputs, n) for n in range(10, 13)]  # type: ignore[arg-type]
    assert torch.equal(table.mrope_positions[:, 9:], torch.cat(decoded, dim=1))
    assert parent.multimodal_inputs.mrope_positions.shape == (3, 9)  # type: ignore[union-attr]
    again = extend_mrope_positions_for_retracted_request(parent.multimodal_inputs.mrope_positions, 3)  # type: ignore[union-attr, arg-type]
    assert torch.equal(table.mrope_positions, again)


def test_what_was_lent_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the program comes; from then on all share a tensor of this process, whoever ends first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    lent, tensor = Lent(torch.ones(4, 2)), torch.zeros(4, 2)
    parent = request_of(inputs_of(lent, 9))
    parent.multimodal_inputs.mm_items.append(inputs_of([tensor], 9).mm_items[0])  # type: ignore[union-attr]
    media.keep(parent)
    media.keep(parent)  # no harm
    branches = branches_of(parent, 3)
    assert all(features(req)[0] is lent.tensor and features(req)[1][0] is tensor for req in (parent, *branches))
    for req in branches:
        req.release_mm_inputs_on_abort()
    media.drop(parent)
    assert lent.num_given_back == 1


@pytest.mark.parametrize(
    ("field", "counts_frames", "wrong"),
    [
        ({}, True, None),
        ({"vote": "best", **JUDGE}, False, None),
        ({"vote": "best", **JUDGE}, True, "judge='self'"),
        (THOUGHT, True, "algorithm='long_cot'"),
        (THOUGHT, False, None),
    ],
)
def test_where_nobody_knows_what_a_longer_text_sees(
    field: dict[str, Any], counts_frames: bool, wrong: str | None
) -> None:
    """Only programs that ask after a branch are refused, of a model that counts frames for each token of the prompt."""
    spec = parse_field(field, 64)
    frames = torch.ones(9) if counts_frames else None
    media.check_longer(spec, request_of(None))
    if wrong is None:
        media.check_longer(spec, request_of(inputs_of(None, 9, visible_frame_counts=frames)))
        return
    with pytest.raises(FieldError, match=wrong):
        media.check_longer(spec, request_of(inputs_of(None, 9, visible_frame_counts=frames)))


def test_images_on_a_model_of_text_are_refused() -> None:
    """SGLang drops them without a word, so that the answer would be about nothing."""
    server = SimpleNamespace(_dynasor=None, mm_processor=None)
    manager = SimpleNamespace(server_args=server, mm_processor=None, preferred_sampling_params=None)
    params = {"custom_params": {"dynasor": {"branches": 2}}, "max_new_tokens": 9}
    validation.check_program(SimpleNamespace(image_data=None, video_data=[]), params, manager)
    with pytest.raises(FieldError, match="image_data with dynasor on a server whose model reads text only"):
        validation.check_program(SimpleNamespace(image_data=["x"]), params, manager)


# In the real engine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_vision_model(tmp_path_factory.mktemp("vision") / "model"))


@pytest.fixture
def engine(shared_engine: Any, model: str) -> Any:
    return eager(shared_engine, model, dynasor_reward_url="http://127.0.0.1:9/")


def eager(start: Callable[..., Any], model: str, *, is_stock: bool = False, **options: Any) -> Any:
    """An engine that sees, with programs. SGLang compiles the rotation of patches, which takes a minute on a CPU: not here."""
    if not is_stock:
        options |= {"scheduler": "dynasor", "dynasor_strict": True}
    with torch.compiler.set_stance("force_eager"):
        return start(model_path=model, **options)


def params(seed: int = 7, max_new_tokens: int = 80, **field: Any) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "sampling_seed": seed}
    return {**sampling, "custom_params": {"dynasor": {"answer": "hash", **field}}} if field else sampling


def text_of(number: int, *, think: bool = False) -> str:
    return IMAGE + prompt(QUESTIONS[number].text, think=think)


def run(engine: Any, requests: list[tuple[str, dict[str, Any], int | None]]) -> list[dict[str, Any]]:
    """Send all at once, each a prompt, sampling parameters and a picture's seed; answers in their order."""

    async def send() -> list[Any]:
        calls = [
            engine.async_generate(text, sampling, image_data=None if seed is None else [picture(seed)])
            for text, sampling, seed in requests
        ]
        return await asyncio.gather(*calls)

    return engine.loop.run_until_complete(send())


def singly(engine: Any, number: int, seed: int, num: int) -> list[dict[str, Any]]:
    """Plain requests that say what the branches of a program on this question and picture say."""
    return run(engine, [(text_of(number), params(branch_seed(7, i)), seed) for i in range(num)])


def answers(outs: list[dict[str, Any]]) -> Counter[str | None]:
    return Counter(extract_answer(out["text"], "hash") for out in outs)


def record_of(out: dict[str, Any]) -> dict[str, Any]:
    return out["meta_info"]["dynasor"]


@pytest.mark.engine
def test_branches_see_the_picture_of_their_program(engine: Any) -> None:
    """Each says what a plain request with that picture and its seed says, and the prompt is computed once, picture and all."""
    field = {"branches": 4, "stop": "never"}
    asked = [(number, seed) for number in (0, 1, 2) for seed in (1, 2)]
    outs = run(engine, [(text_of(number), params(**field), seed) for number, seed in asked])
    said = dict[tuple[int, int], list[str]]()
    for (number, seed), out in zip(asked, outs, strict=True):
        plain, record = singly(engine, number, seed, 4), record_of(out)
        said[number, seed] = [one["text"] for one in plain]
        assert out["text"] == said[number, seed][record["branch"]]
        assert record["branch_tokens"] == [one["meta_info"]["completion_tokens"] for one in plain]
        assert Counter({v["answer"]: v["votes"] for v in record["votes"]}) == answers(plain)
        assert out["meta_info"]["image_tokens"] == plain[0]["meta_info"]["image_tokens"] == 12  # of one branch
        assert out["meta_info"]["prompt_tokens"] == 4 * plain[0]["meta_info"]["prompt_tokens"]
        assert record["num_cached_tokens"] >= 3 * (plain[0]["meta_info"]["prompt_tokens"] - 1)
    assert sum(said[number, 1] != said[number, 2] for number in (0, 1, 2)) >= 2  # a picture does something here
    # Beside it: text alone on the same model, no picture of another's.
    (text,) = run(engine, [(prompt(QUESTIONS[0].text), params(**field), None)])
    alone = run(engine, [(prompt(QUESTIONS[0].text), params(branch_seed(7, i)), None) for i in range(4)])
    assert text["text"] == alone[record_of(text)["branch"]]["text"]
    assert "image_tokens" not in text["meta_info"]


@pytest.mark.engine
def test_several_pictures(engine: Any) -> None:
    """Of several sizes, in one prompt."""
    text = f"{IMAGE}{IMAGE}{prompt(QUESTIONS[3].text)}"
    pictures = [picture(1), picture(2, 56, 56)]
    out = engine.generate(text, params(branches=3, stop="never"), image_data=pictures)
    plain = [engine.generate(text, params(branch_seed(7, i)), image_data=pictures) for i in range(3)]
    assert out["text"] == plain[record_of(out)["branch"]]["text"]
    assert record_of(out)["branch_tokens"] == [one["meta_info"]["completion_tokens"] for one in plain]
    assert out["meta_info"]["image_tokens"] == 16


@pytest.mark.engine
def test_a_video(engine: Any) -> None:
    """As Hugging Face's processor leaves one, of four frames: SGLang needs no decoder for it."""
    patches = torch.randn(2 * 4 * 4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    video = {
        "format": "processor_output",
        "modality": "VIDEO",
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    text = f"<|vision_start|>{'<|video_pad|>' * 8}<|vision_end|>{prompt(QUESTIONS[0].text)}"
    ids = engine.tokenizer_manager.tokenizer.encode(text)
    out = engine.generate(input_ids=ids, sampling_params=params(branches=3, stop="never"), video_data=[video])
    plain = [
        engine.generate(input_ids=ids, sampling_params=params(branch_seed(7, i)), video_data=[video]) for i in range(3)
    ]
    assert out["text"] == plain[record_of(out)["branch"]]["text"]
    assert record_of(out)["branch_tokens"] == [one["meta_info"]["completion_tokens"] for one in plain]
    assert out["meta_info"]["video_tokens"] == 8


@pytest.mark.engine
def test_a_judge_sees_the_picture(engine: Any) -> None:
    """It gives what a plain request gives that asks the same after the same picture and text."""
    tokenizer = engine.tokenizer_manager.tokenizer
    suffix, good, bad = (
        tokenizer.encode(JUDGE[key], add_special_tokens=False) for key in ("judge_suffix", "judge_good", "judge_bad")
    )
    for seed in (1, 2):
        out = engine.generate(
            text_of(0), params(branches=2, stop="never", vote="best", **JUDGE), image_data=[picture(seed)]
        )
        record, said = record_of(out), list(out["output_ids"])
        if out["meta_info"]["finish_reason"]["type"] == "stop":
            said.pop()
        asked = engine.generate(
            input_ids=[*tokenizer.encode(text_of(0)), *said, *suffix],
            sampling_params={"max_new_tokens": 1, "temperature": 1.0},
            image_data=[picture(seed)],
            return_logprob=True,
            token_ids_logprob=[*good, *bad],
        )
        found = {token: value for value, token, *_ in asked["meta_info"]["output_token_ids_logprobs"][0]}
        chances = torch.tensor([found[good[0]], found[bad[0]]]).softmax(0)
        assert record["rewards"][record["branch"]] == pytest.approx(chances[0].item(), abs=1e-4)
        assert record["num_judge_tokens"] == 2 * (len(suffix) + 1)


@pytest.mark.engine
def test_a_thought_about_a_picture_is_asked(engine: Any) -> None:
    """That changes nothing of the thought and reads its KV; a trial is what the model says there, and as sure."""
    tokenizer, before = engine.tokenizer_manager.tokenizer, status_of(engine)
    text, field = text_of(0, think=True), {"answer": "hash", **THOUGHT, "agree": 64}
    plain = engine.generate(text, GREEDY, image_data=[picture(1)])
    out = engine.generate(text, GREEDY | {"custom_params": {"dynasor": field}}, image_data=[picture(1)])
    assert out["output_ids"] == plain["output_ids"]
    trials, record = list[tuple[str, float]](), record_of(out)
    for trial in record["trials"]:
        said = out["output_ids"][: trial["tokens"]]
        assert tokenizer.decode(said).endswith("\n")
        asked = [*tokenizer.encode(text), *said, *tokenizer.encode("</think>\n####", add_special_tokens=False)]
        there = engine.generate(
            input_ids=asked,
            sampling_params=GREEDY | {"max_new_tokens": 9},
            image_data=[picture(1)],
            return_logprob=True,
        )
        *logprobs, _ = (
            logprob for logprob, *_ in there["meta_info"]["output_token_logprobs"]
        )  # not that it ends there
        trials.append((there["text"].strip(), exp(sum(logprobs) / len(logprobs))))
    assert len(trials) == record["num_probes"] >= 2
    assert [trial["answer"] for trial in record["trials"]] == [answer for answer, _ in trials]
    assert [trial["probability"] for trial in record["trials"]] == pytest.approx([sure for _, sure in trials], abs=1e-4)
    status = status_of(engine)
    read, cached = (status[key] - before[key] for key in ("num_probe_tokens_read", "num_probe_tokens_cached"))
    assert cached / read >= 0.99, (cached, read)


@pytest.mark.engine
def test_a_thought_about_a_picture_is_closed(engine: Any) -> None:
    """Who goes on computes from a fresh Req what a plain request computes after the same picture and text."""
    tokenizer, text = engine.tokenizer_manager.tokenizer, text_of(0, think=True)
    field = {"answer": "hash", **THOUGHT}
    out = engine.generate(text, GREEDY | {"custom_params": {"dynasor": field}}, image_data=[picture(1)])
    assert record_of(out)["closed_at_tokens"] != [None]
    given = out["text"][: out["text"].rindex("####") + 4]
    ids = [*tokenizer.encode(text), *tokenizer.encode(given, add_special_tokens=False)]
    after = engine.generate(input_ids=ids, sampling_params=GREEDY, image_data=[picture(1)])
    assert out["text"] == given + after["text"]


@pytest.mark.engine
def test_branches_of_clients_with_pictures_vote(engine: Any) -> None:
    """Their answers are read as ever, though where the picture stands no tokenizer knows the numbers."""
    field = {"program": "seen", "branches": 3, "stop": "never"}
    outs = run(engine, [(text_of(0), params(branch_seed(7, i), **field), 1) for i in range(3)])
    plain = singly(engine, 0, 1, 3)
    assert [out["text"] for out in outs] == [one["text"] for one in plain]
    last = max((record_of(out) for out in outs), key=lambda record: sum(v["votes"] for v in record["votes"]))
    assert Counter({v["answer"]: v["votes"] for v in last["votes"]}) == answers(plain)


@pytest.mark.engine
def test_what_stays_refused_is_refused(engine: Any) -> None:
    """Each with its reason, and nobody else is disturbed."""
    field = {"branches": 2}
    plain = singly(engine, 0, 1, 1)[0]["text"]
    for more, options, message in (
        ({"judge": "model", "vote": "best"}, {"image_data": [picture(1)]}, "dynasor.judge='model' with image_data: the reward model reads text only"),
        ({}, {"image_data": [picture(1)], "session_params": {"id": "s"}}, "session_params with dynasor is not supported"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            engine.generate(text_of(0), params(**field, **more), **options)
    ids = [*engine.tokenizer_manager.tokenizer.encode(text_of(0)), 10**9]
    with pytest.raises(ValueError, match=r"input_ids has 1000000000, outside \[0, "):
        engine.generate(input_ids=ids, sampling_params=params(**field), image_data=[picture(1)])
    assert singly(engine, 0, 1, 1)[0]["text"] == plain
    assert status_of(engine)["num_policy_errors"] == 0


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Of engines started after this: what branches said, which came back, how many Reqs were made to see, and how many features are there at a flush."""
    log = tmp_path / "told.jsonl"
    log.touch()
    kept: list[Any] = []
    give, finish, retract = media.give, Voting.finish, Req.reset_for_retract
    flush = sglang_scheduler.Scheduler.flush_cache

    def tell(*line: Any) -> None:
        with log.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def giving(req: Req, parent: Req) -> None:
        give(req, parent)
        if req.multimodal_inputs is not None:
            kept.extend(weakref.ref(feature) for feature in features(req))
            tell("given")

    def finishing(self: Voting, live: LiveProgram, index: int, req: Req, reward: float | None = None) -> None:
        finish(self, live, index, req, reward)
        tell("said", live.program.id, index, self.texts.said(req, ""))

    def flushing(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell("left", sum(ref() is not None for ref in kept))
        return flush(self, *args, **kwargs)

    def retracting(self: Req, *args: Any, **kwargs: Any) -> Any:
        tell("retracted", self.rid, self.multimodal_inputs is not None)
        return retract(self, *args, **kwargs)

    monkeypatch.setattr(media, "give", giving)
    monkeypatch.setattr(Voting, "finish", finishing)
    monkeypatch.setattr(sglang_scheduler.Scheduler, "flush_cache", flushing)
    monkeypatch.setattr(Req, "reset_for_retract", retracting)

    def lines(what: str) -> list[list[Any]]:
        return [rest for name, *rest in map(json.loads, log.read_text().splitlines()) if name == what]

    return lines


@pytest.mark.engine
def test_pictures_are_read_again_and_then_forgotten(
    start_engine: Any, model: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks that cut pictures, no cache of any kind, forced retraction: each branch says what stock SGLang says without all that.

    So do plain requests beside them. At the end no feature is left.
    """
    asked = [(0, 1), (1, 2), (2, 1)]
    stock = eager(start_engine, model, is_stock=True)
    expected = {pair: [out["text"] for out in singly(stock, *pair, 3)] for pair in asked}
    monkeypatch.setattr(sglang_scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(sglang_scheduler, "TEST_RETRACT_INTERVAL", 11)
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "0")  # of what the tower has computed
    other = eager(start_engine, model, disable_radix_cache=True, chunked_prefill_size=16, max_running_requests=16)
    programs = [(text_of(number), params(branches=3, width=3, stop="never"), seed) for number, seed in asked]
    plain = [(text_of(number), params(branch_seed(7, 0)), seed) for number, seed in asked]
    outs = run(other, programs + plain)
    assert [out["text"] for out in outs[3:]] == [expected[pair][0] for pair in asked]
    names = {record_of(out)["program"]: pair for out, pair in zip(outs, asked, strict=False)}
    said = {(names[program], index): text for program, index, text in told("said")}
    assert said == {(pair, i): text for pair in asked for i, text in enumerate(expected[pair])}
    again = [sees for rid, sees in told("retracted") if rid.startswith("\0")]
    assert len(again) >= 3, "nothing was retracted: the test does not test"
    assert all(again)
    # One ends early, one at its deadline: their features go too.
    run(other, [(text_of(0), params(branches=6, width=2, stop="beta:0.5"), 1)])
    num_given = len(told("given"))
    for deadline_s in (0.3, 2.0, 10.0):  # later where a slow machine has not started them by then
        field = {"branches": 4, "stop": "never", "deadline_s": deadline_s}
        gone = {**params(max_new_tokens=800, **field), "ignore_eos": True}
        assert record_of(run(other, [(text_of(1), gone, 2)])[0])["stop_reason"] == "deadline"
        if len(told("given")) >= num_given + 4:
            break
    assert_nothing_left(other)
    assert told("left")[-1] == [0]
    assert len(told("given")) >= num_given + 4 >= 9 + 4


@pytest.mark.engine
def test_pictures_through_several_tokenizer_workers(
    start_engine: Any, engine: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler looks at the field then: it takes the numbers where pictures stand for no tokens, and refuses what it must."""
    expected = [out["text"] for out in singly(engine, 0, 1, 3)]
    for module in (validation, place):  # as if no plugin were in the front process
        monkeypatch.setattr(module, "serves_programs", lambda server_args: False)
    for module in (gate, streamer):  # schedulers fork from here
        monkeypatch.setattr(module, "has_many_fronts", lambda server_args: True)
    other = eager(start_engine, model, dynasor_reward_url="http://127.0.0.1:9/")
    (out,) = run(other, [(text_of(0), params(branches=3, stop="never"), 1)])
    assert out["text"] == expected[record_of(out)["branch"]]
    with pytest.raises(ValueError, match="the reward model reads text only"):
        run(other, [(text_of(0), params(branches=3, judge="model", vote="best"), 1)])
    assert_nothing_left(other)
