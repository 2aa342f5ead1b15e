"""A field at the wrong place, or misspelt, is an error that says where it belongs; a plain request never is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.place import check_place
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.near_miss import _is_within, near_miss

FIELD = {"algorithm": "self_consistency"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "dynasor?"}], "max_tokens": 9, "n": 1}
NATIVE: dict[str, Any] = {"text": "dynasor?", "sampling_params": {"max_new_tokens": 9}, "stream": False}
OPENAI, METADATA = ("custom_params", "dynasor"), ("metadata", "dynasor")
DEEP = ("sampling_params", "custom_params", "dynasor")


@pytest.mark.parametrize(
    ("more", "place", "path"),
    [
        ({"dynasor": FIELD}, OPENAI, "dynasor"),
        ({"dynasor": "self_consistency"}, DEEP, "dynasor"),
        ({"dynasor": {}}, OPENAI, "dynasor"),
        ({"sampling_params": {"dynasor": FIELD}}, DEEP, "sampling_params.dynasor"),
        ({"sampling_params": [{}, {"dynasor": FIELD}]}, DEEP, "sampling_params.dynasor"),
        ({"custom_params": {"dynasor": FIELD}}, DEEP, "custom_params.dynasor"),
        ({"sampling_params": {"custom_params": {"dynasor": FIELD}}}, OPENAI, "sampling_params.custom_params.dynasor"),
        ({"extra_body": {"custom_params": {"dynasor": FIELD}}}, OPENAI, "extra_body.custom_params.dynasor"),
        ({"extra_body": {"dynasor": FIELD}}, OPENAI, "extra_body.dynasor"),
        ({"extra_body": {"sampling_params": {"custom_params": {"dynasor": FIELD}}}}, DEEP,
         "extra_body.sampling_params.custom_params.dynasor"),
        ({"custom_param": {"dynasor": FIELD}}, OPENAI, "custom_param.dynasor"),
        ({"customParams": {"dynasor": FIELD}}, OPENAI, "customParams.dynasor"),
        ({"custom-parameters": {"dynasor": FIELD}}, OPENAI, "custom-parameters.dynasor"),
        ({"costum_params": {"dynasor": FIELD}}, OPENAI, "costum_params.dynasor"),
        ({"sampling_param": {"custom_params": {"dynasor": FIELD}}}, DEEP, "sampling_param.custom_params.dynasor"),
        ({"custom_params": {"custom_params": {"dynasor": FIELD}}}, OPENAI, "custom_params.custom_params.dynasor"),
        ({"custom_params": {"dynasor": FIELD}, "dynasor": FIELD}, OPENAI, "dynasor"),  # which of them was meant?
        ({"custom_params": {"dynasor": FIELD}}, METADATA, "custom_params.dynasor"),
        ({"metadata": {"dynasor": "self_consistency"}}, DEEP, "metadata.dynasor"),
        ({"metadata": {"user_id": "u", "Dynasor": "self_consistency"}}, METADATA, "metadata.Dynasor"),
        ({"metadata": {"custom_params": {"dynasor": FIELD}}}, METADATA, "metadata.custom_params.dynasor"),
        ({"extra_body": {"metadata": {"dynasor": "self_consistency"}}}, METADATA, "extra_body.metadata.dynasor"),
        *(({"custom_params": {key: FIELD}}, OPENAI, f"custom_params.{key}")
          for key in ("dynasour", "Dynasor", "dynasor_", "DYNASOR", "dynaosr", "dynasr", "dinasor", "dynazor", "x-dynasor")),
    ],
)  # fmt: skip
def test_a_near_miss_is_found(more: dict[str, Any], place: tuple[str, ...], path: str) -> None:
    """With the path as its client wrote it, whatever stands beside it."""
    body = (NATIVE if place == DEEP else CHAT) | more
    assert near_miss(body, place) == tuple(path.split("."))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"custom_params": {"dynasor": FIELD}},
        {"metadata": {"dynasor": "self_consistency", "note": "dynasor"}},
        {"metadata": {"user_id": "dynasor", "dynamo": "v1", "mine": {"dynasor": "theirs"}, "dynasor_version": "2"}},
        {"metadata": dict.fromkeys(map(str, range(16)), "mine") | {"dynasour": "more than OpenAI takes"}},
        {"metadata": "dynasor", "meta_data": {"dynasor": "theirs"}, "Metadata": {"dynasor": "theirs"}},
        {"custom_params": {"metadata": {"dynasor": "of a logit processor"}}},
        {"labels": {"dynasor": "on"}, "user": "dynasor", "unknown": {"nested": {"dynasor": FIELD}}},
        {"custom_params": {"thinking_budget": 9, "note": "dynasor", "mine": {"dynasor": "theirs"}}},
        {"custom_params": {"dynamo": 1, "dynamic": 2, "dynasty": 3, "dynosaur": 4, "sensor": 5, "a": 6}},
        {"dynamo": {"x": 1}, "dinosaur": True, "dynasor_server_version_of_the_client": 2, "nvext": {}},
        {"extra_body": {"top_k": 3}, "extra_headers": {"dynasor": "x"}, "extra_query": {"dynasor": "x"}},
        {"dynasor": None, "Dynasor": False, "extra_body": None, "custom_params": None},
        {"custom_params": "dynasor", "sampling_params": "dynasor", "extra_body": ["dynasor", ["dynasor"], 3]},
        {
            "tools": [
                {"type": "function", "function": {"name": "dynasor", "parameters": {"dynasor": {"type": "string"}}}}
            ]
        },
        {"response_format": {"type": "json_schema", "json_schema": {"dynasor": {"type": "string"}}}},
        {"chat_template_kwargs": {"dynasor": True}, "logit_bias": {"dynasor": 1}},
        {"x" * 100_000: {"dynasor": FIELD}, "": {"dynasor": FIELD}, "_": FIELD, "123": FIELD},
    ],
)
def test_a_plain_request_is_none(more: dict[str, Any]) -> None:
    """Nor is a program whose field is at its place: what others call theirs is not looked into."""
    assert near_miss(CHAT | more, OPENAI, METADATA) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_body_can_be_looked_at(body: Any) -> None:
    """Whatever JSON it is: nothing is found in texts that nobody chose."""
    assert near_miss(body, OPENAI) is None


def test_a_body_made_to_be_slow_is_not() -> None:
    """Keys without end, all of them nearly ours, or objects in objects: a few milliseconds, whatever is left unseen."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    near = {a + "custom" + b + c + "params": {} for a in letters for b in letters for c in letters}
    nested: dict[str, Any] = {"dynasor": FIELD}
    for _ in range(500):
        nested = {"custom_params": nested, "extra_body": [nested] * 9}
    for body in (near, {"custom_params": near}, nested, {"extra_body": [{key: {}} for key in near]}):
        least = float("inf")
        for _ in range(5):  # others use the cores too
            began = time.thread_time()
            assert near_miss(body, OPENAI) is None
            least = min(least, time.thread_time() - began)
        assert least < 0.1  # 4 ms here; without a bound as long as the body


def edits(word: str, other: str) -> int:
    """Letters added, left out, replaced or swapped with their neighbour, by the table of all prefixes."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(other) + 1)] for i in range(len(word) + 1)]
    for i, a in enumerate(word, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
            if i > 1 and j > 1 and word[i - 2 : i] == other[j - 2 : j][::-1]:
                table[i][j] = min(table[i][j], table[i - 2][j - 2] + 1)
    return table[-1][-1]


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.integers(0, 2))
def test_words_are_near_by_their_edits(word: str, other: str, most: int) -> None:
    """As the table has it."""
    assert _is_within(word, other, most) == (edits(word, other) <= most)


def manager(scheduler: str | None = "dynasor") -> Any:
    return SimpleNamespace(server_args=SimpleNamespace(_dynasor=DynasorConfig(scheduler)))


def sent(body: Any, route: str) -> Any:
    return SimpleNamespace(_json=body, scope={"route": SimpleNamespace(path=route)})


@pytest.mark.parametrize(
    ("body", "route", "words"),
    [
        ({"dynasor": FIELD}, "/generate", ["dynasor is not read by /generate", '{"sampling_params": {"custom_params": {"dynasor"']),
        ({"dynasor": FIELD}, "/v1/chat/completions", ["send the field as custom_params.dynasor", '{"custom_params": {"dynasor"']),
        ({"dynasor": FIELD}, "/v1/completions", ["send the field as custom_params.dynasor"]),
        ({"extra_body": {"dynasor": FIELD}}, "/v1/chat/completions", ["argument of the OpenAI Python client"]),
        ({"metadata": {"Dynasor": "x"}}, "/v1/chat/completions", ['send the field as metadata.dynasor, such as {"metadata": {"dynasor": "self_consistency"}}']),
        ({"metadata": {"dynasor": "x"}}, "/generate", ["metadata.dynasor is not read by /generate; send the field as sampling_params.custom_params.dynasor"]),
        ({"custom_params": {"dynasor": FIELD}}, "/v1/responses", ["not read by /v1/responses; send the field as metadata.dynasor"]),
        ({"custom_params": {"dynasor": FIELD}}, "/v1/messages", ["not read by /v1/messages; send the field as metadata.dynasor"]),
    ],
)  # fmt: skip
def test_the_error_says_where_it_belongs(body: dict[str, Any], route: str, words: list[str]) -> None:
    """By the endpoint that the request was sent to."""
    with pytest.raises(FieldError) as error:
        check_place(manager(), GenerateReqInput(text="Q"), sent(body, route))
    for word in words:
        assert word in str(error.value)


def test_an_engine_s_sampling_parameters_are_looked_at() -> None:
    """There is no body then; also where each prompt has its own."""
    for params in ({"dynasor": FIELD}, [{}, {"custom_params": {"dynasour": FIELD}}]):
        with pytest.raises(FieldError, match=r"sgl.Engine; send the field as sampling_params.custom_params.dynasor"):
            check_place(manager(), GenerateReqInput(text="Q", sampling_params=params))
    check_place(manager(), GenerateReqInput(text="Q", sampling_params={"custom_params": {"dynasor": FIELD}}))
    check_place(manager(), GenerateReqInput(text="Q"))


def test_what_is_not_looked_at() -> None:
    """No flag, no generation, routes whose errors SGLang does not answer with 400, and bodies that are no objects."""
    wrong = {"dynasor": FIELD}
    check_place(manager(None), GenerateReqInput(text="Q"), sent(wrong, "/generate"))
    check_place(manager(), EmbeddingReqInput(text="Q"), sent(wrong, "/encode"))
    check_place(manager(), GenerateReqInput(text="Q"), sent(wrong, "/api/chat"))
    check_place(
        manager(), GenerateReqInput(text="Q"), sent({"parameters": {"custom_params": wrong}}, "/vertex_generate")
    )
    check_place(manager(), GenerateReqInput(text="Q"), sent([wrong], "/generate"))
    check_place(manager(), GenerateReqInput(text="Q"), SimpleNamespace())


def test_a_plain_request_waits_microseconds() -> None:
    """However long its texts are; 3 us here, bounded loosely for shared machines. The best of many: others use the cores too."""
    body = CHAT | {
        "messages": [{"role": "user", "content": "x" * 1_000_000}] * 20,
        "metadata": dict.fromkeys(map(str, range(9999))),
    }
    manage, obj, request = manager(), GenerateReqInput(text="Q"), sent(body, "/v1/chat/completions")

    def cost_s() -> float:
        began = time.thread_time()
        for _ in range(100):
            check_place(manage, obj, request)
        return (time.thread_time() - began) / 100

    assert min(cost_s() for _ in range(20)) < 50e-6
