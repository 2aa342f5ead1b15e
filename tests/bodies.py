"""Requests as nobody should send them, drawn by a seed: what is around the field and what is in it, right and wrong."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS
from sglang_dynasor.policy.answers import EXTRACTORS
from sglang_dynasor.policy.spec import FIELD_HELP, JUDGES, VOTES

END = "</think>\n####"
DEEP = json.loads("[" * 60 + "]" * 60)
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 65, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -(2**70), 0.5, -0.5, 1.0, 1e-9, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", "5", "-1", "null", "\0", "\ud800", "\udfff x", "é𝕏", "a" * 5000, "\n", [], {}, [None], [[]],
    [1, 2], ["x"], [0.5], [[1], ["x"]], [{}], {"a": 1}, {"a": {"b": []}}, {"": None}, {"dynasor": {}}, {"dynasor": None}, DEEP,
)  # fmt: skip
BILLIONS = (
    2**31 - 1,
    2**31,
)  # of choices: SGLang makes a list of so many before anybody sees the request (docs/serving.md)
# Right values for the keys of the field: the cheap ones, as thousands of these are sent.
FIELD: dict[str, tuple[Any, ...]] = {
    "algorithm": tuple(ENGINE_ALGORITHMS), "branches": (1, 2, 3, 4), "width": (1, 2), "answer": (*EXTRACTORS, "regex:(.)", "choice:ABC"),
    "stop": ("never", "careful", "fast", "margin", "beta:0.9", "entropy:0.5", "predictive:0.1", "confidence", "reward:0.5", "never or trials:0.8", "margin and fast"),
    "equal": ("math", "text", "symbolic", "model:0.5", "embedding"), "deadline_s": (1e-9, 1e-3, 0.05, 5, 86400), "tenant": ("a", "b"),
    "vote": VOTES, "judge": JUDGES, "judge_suffix": ("<judge>",), "judge_good": (" good",), "judge_bad": (" bad",), "group_tokens": (1, 8),
    "weak_frac": (0, 0.5), "statistics": (True, False), "exit": ("trial:0.5", "published"), "agree": (1, 2), "min_tokens": (0, 4),
    "probe_tokens": (1, 4), "hold_tokens": (4,), "probe_word": ("so",), "probe_suffix": (END,), "think_end": (END,), "effort": ("low", "high"),
    "budget_tokens": (1, 30, 400), "budget": ("budget-1", "budget-2"), "budget_programs": (1, 3), "template": ("vote",),
    "program": ("program-1", "program-2"),
}  # fmt: skip
assert FIELD.keys() == FIELD_HELP.keys()
THOUGHT = {"algorithm": "long_cot", "think_end": END, "probe_suffix": END, "probe_tokens": 2, "min_tokens": 2}
JUDGED = {"vote": "reward", "judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}
WHOLE: tuple[Any, ...] = (
    "self_consistency", {}, {"branches": 2}, {"branches": 3, "answer": "hash"}, {**THOUGHT, "branches": 1}, {**THOUGHT, "branches": 2},
    {**JUDGED, "branches": 2}, {"branches": 2, "equal": "symbolic"}, {"branches": 2, "deadline_s": 1e-9}, {"branches": 2, "budget_tokens": 40},
    {"branches": 2, "program": "mine"}, {"branches": 2, "vote": "confidence", "weak_frac": 0.5},
)  # fmt: skip
# Right values of SGLang's own keys, where junk seldom is one.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "n": (1, 2, 3), "temperature": (0.7, 1), "top_p": (0.9,), "top_k": (5, 2**31 - 1, -1), "min_p": (0.1,), "stop": ("9", ["9", "8"]), "stop_token_ids": ([5],),
    "stop_regex": ("[0-9]",), "frequency_penalty": (1,), "presence_penalty": (-1,), "repetition_penalty": (1.2,), "min_new_tokens": (2,), "beam_width": (1, 2),
    "regex": ("[0-9]+",), "json_schema": ('{"type": "integer"}',), "ebnf": ('root ::= "a"',), "logit_bias": ({"5": 1.0}, {"5": -100}), "sampling_seed": (3,), "stream_interval": (1, 4),
}  # fmt: skip
TOP: dict[str, tuple[Any, ...]] = {
    "text": ("Q", "", ["Q", "R"], ["", "Q"]), "input_ids": ([5, 6], [[5], [6, 7]], [], [-5], [10**6], [[]], [[5], [-1]]), "rid": ("rid-1", ["rid-1", "rid-2"]),
    "stream": (True,), "return_logprob": (True,), "logprob_start_len": (0, -1), "top_logprobs_num": (2,), "token_ids_logprob": ([5],),
    "extra_key": ("k",), "cache_salt": ("s",), "priority": (1,), "session_params": ({"id": "s"},), "prompt": ("Q", ["Q", "R"], [5, 6], [[5], [6]], ""),
    "messages": ([{"role": "user", "content": "Q"}], [], [{"role": "user"}], [{"role": "system", "content": "S"}, {"role": "user", "content": ""}]),
    "logprobs": (2, True), "top_logprobs": (2,), "n": (1, 2, 3), "stream_options": ({"include_usage": True},), "return_meta_info": (True,), "max_tokens": (1, 3),
    "tools": ([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],), "response_format": ({"type": "json_object"},),
    "echo": (True,), "best_of": (1, 2), "reasoning_effort": ("low", "none"),
}  # fmt: skip
_SAMPLING_KEYS = sorted(set(SamplingParams.__struct_fields__) - {"custom_params"})
_TOP_KEYS = {
    "/generate": sorted({f.name for f in dataclasses.fields(GenerateReqInput)} - {"sampling_params"}),
    "/v1/completions": sorted(set(CompletionRequest.model_fields) - {"custom_params"}),
    "/v1/chat/completions": sorted(set(ChatCompletionRequest.model_fields) - {"custom_params"}),
}
PATHS = ("/generate", "/generate", "/generate", "/v1/completions", "/v1/chat/completions")


class Drawn:
    """One request: `path`, and `content` as it is sent.

    Args:
        number: of the request; the same one is the same everywhere.
    """

    def __init__(self, number: int):
        self.draw = draw = random.Random(number)
        self.path = draw.choice(PATHS)
        self.body = self._body()
        self.content = json.dumps(self.body).encode()
        self.is_json = draw.random() > 0.02
        if not self.is_json:
            self.content = draw.choice(
                (b"", b"{", b"[]", b"null", b'"x"', b"\xff", self.content[:-1], self.content + b"}")
            )

    @property
    def plain(self) -> bytes:
        """The same without a field; what is no JSON as it is."""
        if not self.is_json:
            return self.content
        body = json.loads(self.content)
        body.pop("custom_params", None)
        each = body.get("sampling_params")
        for params in each if isinstance(each, list) else [each]:
            if isinstance(params, dict):
                params.pop("custom_params", None)
        return json.dumps(body).encode()

    def _body(self) -> dict[str, Any]:
        draw, custom = self.draw, {"dynasor": self._field()}
        if self.path == "/generate":
            sampling = {"max_new_tokens": 4, "temperature": 1.0, "custom_params": custom}
            self._alter(sampling, _SAMPLING_KEYS, SAMPLING, (0, 0, 0, 0, 1, 2))
            body: dict[str, Any] = {"text": "Q", "sampling_params": sampling}
        else:
            asks = (
                {"prompt": "Q"} if self.path == "/v1/completions" else {"messages": [{"role": "user", "content": "Q"}]}
            )
            body = {"model": "any", **asks, "max_tokens": 4, "temperature": 1.0, "custom_params": custom}
        self._alter(body, _TOP_KEYS[self.path], {**SAMPLING, **TOP}, (0, 0, 0, 0, 1, 2))
        if self.path == "/generate" and draw.random() < 0.05:
            num = draw.choice((1, 2, 3))
            body |= {"sampling_params": [body["sampling_params"]] * num, "text": ["Q"] * (num + (draw.random() < 0.2))}
        return body

    def _field(self) -> Any:
        draw = self.draw
        if draw.random() < 0.04:
            return draw.choice(JUNK)
        field = draw.choice(WHOLE)
        if not isinstance(field, dict):
            return field
        field = dict(field)
        self._alter(field, sorted(FIELD), FIELD, (0, 0, 0, 0, 1, 2, 4))
        if draw.random() < 0.03:
            field[draw.choice(("widht", "", "\0", "a" * 300, "é"))] = draw.choice(JUNK)
        return field

    def _alter(
        self, body: dict[str, Any], keys: list[str], right: dict[str, tuple[Any, ...]], nums: tuple[int, ...]
    ) -> None:
        draw = self.draw
        for _ in range(draw.choice(nums)):
            key = draw.choice(keys)
            if draw.random() < 0.1 and key in body:
                del body[key]
            else:
                value = draw.choice(right[key] if key in right and draw.random() < 0.7 else JUNK)
                body[key] = 65 if key in ("n", "best_of") and value in BILLIONS else value
