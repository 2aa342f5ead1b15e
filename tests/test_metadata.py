"""The field in a request's metadata: read where it may stand there, for what it would be in `custom_params`, and nothing else is."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.chat import convert
from sglang_dynasor.engine.place import check_place, refuse_ollama
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.metadata import field_in

FIELD = {"branches": 3}
TEXT = json.dumps(FIELD)
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"dynasor": TEXT, "user_id": "u"}, FIELD),
        ({"dynasor": f" \n{TEXT}\n"}, FIELD),
        ({"dynasor": "{}"}, {}),
        ({"dynasor": FIELD}, FIELD),
        ({"dynasor": "self_consistency"}, "self_consistency"),
        ({"dynasor": "math-hard@2"}, "math-hard@2"),
        ({"dynasor": "plain"}, "plain"),
        ({"dynasor": 3}, 3),  # as from custom_params: its own check says what is wrong
        ({"dynasor": None}, None),
        ({"dynasor": False}, None),
        ({"user_id": "dynasor", "note": TEXT}, None),
        ({}, None),
        (None, None),
        ("dynasor", None),
        (["dynasor"], None),
    ],
)
def test_a_field_is_found(metadata: Any, field: Any) -> None:
    """A name, an object or its text; null and false ask for nothing, and other keys are their client's."""
    assert field_in(metadata) == field


@pytest.mark.parametrize(
    "text", ["", " ", "{", '{"branches": }', "[]", "[1]", '"self_consistency"', "branches = 3", "{}{}", "\0", "[" * 100_000, "9" * 5000 + ".",
             '{"budget_tokens": 1' + "0" * 400 + "}", '{"budget_tokens": 18446744073709551616}', '{"deadline_s": NaN}', '{"deadline_s": Infinity}',
             '{"judge_suffix": "\\ud800"}', '{"a": [{"\\udfff": 1}]}']
)  # fmt: skip
def test_a_text_that_is_neither_a_name_nor_an_object_is_refused(text: str) -> None:
    """With what may be sent, and not with a megabyte of it."""
    with pytest.raises(
        FieldError, match=r"^metadata\.dynasor=.* is neither a name nor the JSON of an object; "
    ) as error:
        field_in({"dynasor": text})
    assert len(str(error.value)) < 500


@given(
    st.dictionaries(
        st.text(), st.none() | st.text() | st.integers(-(2**63), 2**64 - 1) | st.dictionaries(st.text(), st.text())
    )
)
def test_any_metadata_can_be_read(metadata: Any) -> None:
    """What is found is what was sent. Numbers are those that JSON bodies may have."""
    assert field_in({**metadata, "dynasor": json.dumps(metadata)}) == metadata


def manager(config: DynasorConfig = DynasorConfig("dynasor")) -> Any:  # noqa: B008
    """As much of a tokenizer manager as is read."""
    return SimpleNamespace(server_args=SimpleNamespace(_dynasor=config), tokenizer=None, preferred_sampling_params=None)


def sent(route: str, **body: Any) -> Any:
    return SimpleNamespace(_json=body, scope={"route": SimpleNamespace(path=route)})


def taken(route: str, body: dict[str, Any], manage: Any = None, **fields: Any) -> Any:
    """A request as it is after SGLang has taken it in; SGLang's classes drop `metadata`."""
    obj = GenerateReqInput(**({"text": "Q"} | fields))
    obj.normalize_batch_and_arguments()
    check_place(manage or manager(), obj, sent(route, **body))
    return obj


@pytest.mark.parametrize("route", [CHAT, "/v1/completions", "/invocations", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("field", [TEXT, FIELD])
def test_it_is_the_field_of_the_request(route: str, field: Any) -> None:
    """At each route that reads it; what else is in `custom_params` stays."""
    body = {"metadata": {"dynasor": field, "user_id": "u"}}
    assert taken(route, body).sampling_params["custom_params"] == {"dynasor": FIELD}
    params = {"temperature": 0.7, "custom_params": {"mine": 1}}
    obj = taken(route, body, sampling_params=params)
    assert obj.sampling_params == {"temperature": 0.7, "custom_params": {"mine": 1, "dynasor": FIELD}}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"metadata": {"user_id": "dynasor"}}),
        (CHAT, {"metadata": {"dynasor": None}}),
        (CHAT, {"metadata": None}),
        (CHAT, {"metadata": "dynasor"}),
        (CHAT, {}),
        ("/v1/score", {"metadata": {"dynasor": TEXT}}),
    ],
)
def test_without_it_a_request_is_stock(route: str, body: dict[str, Any]) -> None:
    assert taken(route, body).sampling_params == GenerateReqInput(text="Q", sampling_params={}).sampling_params
    assert taken(route, body, sampling_params={"top_k": 3}).sampling_params == {"top_k": 3}


def test_without_the_flag_nothing_is_read() -> None:
    """Nor refused."""
    for text in (TEXT, "{"):
        assert (
            taken(CHAT, {"metadata": {"dynasor": text}}, manager(DynasorConfig()), sampling_params={}).sampling_params
            == {}
        )


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        (CHAT, {"metadata": {"dynasor": "{branches"}}, "neither a name nor"),
        (CHAT, {"metadata": {"dynasor": TEXT}, "custom_params": {"dynasor": FIELD}}, "are both there; send one of them"),
        ("/v1/completions", {"metadata": {"dynasor": TEXT}, "custom_params": {"dynasor": None}}, "are both there"),
        ("/generate", {"metadata": {"dynasor": TEXT}}, "metadata.dynasor is not read by /generate"),
    ],
)  # fmt: skip
def test_a_wrong_one_is_refused(route: str, body: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        taken(route, body)


def test_prompts_of_one_request_have_ids_that_tell_each_other() -> None:
    """A response of completions names its first program only. Where the client names them, or none is one, nothing is changed."""
    body, prompts = {"metadata": {"dynasor": TEXT}}, ["a", "b", "c"]
    obj = taken("/v1/completions", body, text=prompts)
    name = obj.rid[0].removesuffix("_0")
    assert obj.rid == [f"{name}_{i}" for i in range(3)]
    assert [obj[i].rid for i in range(3)] == obj.rid
    assert [params["custom_params"] for params in obj.sampling_params] == [{"dynasor": FIELD}] * 3
    assert taken("/v1/completions", body | {"rid": "mine"}, text=prompts, rid="mine").rid == [
        "mine_0",
        "mine_1",
        "mine_2",
    ]
    assert not any("_" in rid for rid in taken("/v1/completions", {}, text=prompts).rid)
    assert "_" not in taken("/v1/completions", body).rid
    unasked = manager(DynasorConfig("dynasor", dynasor_default="self_consistency"))
    assert [rid[-2:] for rid in taken("/v1/completions", {}, unasked, text=prompts).rid] == ["_0", "_1", "_2"]
    plain = {"metadata": {"dynasor": "plain"}}
    assert not any("_" in rid for rid in taken("/v1/completions", plain, unasked, text=prompts).rid)


def converted(request: Any, body: dict[str, Any], route: str = CHAT) -> tuple[Any, Any]:
    """What becomes of a chat, and the chat that SGLang answers to."""

    def original(serving: Any, request: Any, raw_request: Any) -> Any:
        return GenerateReqInput(input_ids=[1], sampling_params={"custom_params": request.custom_params}), request

    return convert(original, SimpleNamespace(tokenizer_manager=manager()), request, sent(route, **body))


def chat(**more: Any) -> Any:
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "Q"}], **more)


def test_a_chat_has_its_record_in_the_answer() -> None:
    """Where the field came in metadata: who cannot send it elsewhere cannot ask for that. SGLang has none in streams."""
    body = {"metadata": {"dynasor": TEXT}}
    adapted, answered = converted(chat(custom_params={"mine": 1}), body)
    assert adapted.sampling_params["custom_params"] == {"mine": 1, "dynasor": FIELD}
    assert answered.return_meta_info
    adapted.normalize_batch_and_arguments()
    check_place(manager(), adapted, sent(CHAT, **body))
    assert adapted.sampling_params["custom_params"] == {"mine": 1, "dynasor": FIELD}
    adapted, answered = converted(chat(stream=True), body)
    assert adapted.sampling_params["custom_params"] == {"dynasor": FIELD}
    assert not answered.return_meta_info
    for other in ({"metadata": {"user_id": "u"}}, {}):
        request = chat(custom_params={"dynasor": FIELD})
        assert converted(request, other)[1] is request
        assert not request.return_meta_info
    with pytest.raises(FieldError, match="neither a name nor"):
        converted(chat(), {"metadata": {"dynasor": "{"}})


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"dynasor": TEXT}, "dynasor"),
        ({"options": {"dynasor": FIELD, "seed": 1}}, "options.dynasor"),
        ({"options": {"custom_params": {"dynasor": FIELD}}}, "options.custom_params.dynasor"),
        ({"metadata": {"dynasor": TEXT}}, "metadata.dynasor"),
        ({"custom_params": {"dynasor": FIELD}}, "custom_params.dynasor"),
    ],
)
def test_ollama_s_endpoints_refuse_it(body: dict[str, Any], where: str) -> None:
    """By a response, as a stream that has begun cannot be one."""
    serving = SimpleNamespace(tokenizer_manager=manager())
    response = asyncio.run(refuse_ollama(pytest.fail, serving, None, sent("/api/chat", **body)))
    assert response.status_code == 400
    assert json.loads(response.body)["error"].startswith(
        f"{where} is not read by /api/chat, which takes no dynasor field"
    )


@pytest.mark.parametrize(
    ("config", "body"),
    [
        (
            DynasorConfig("dynasor"),
            {"model": "dynasor", "options": {"seed": 1, "mine": {"dynasor": 1}}, "labels": {"dynasor": 1}},
        ),
        (DynasorConfig("dynasor"), {"options": None, "dynasor": None}),
        (DynasorConfig("dynasor"), {"options": ["dynasor"]}),
        (DynasorConfig(), {"dynasor": TEXT}),
    ],
)
def test_ollama_s_other_requests_are_stock(config: DynasorConfig, body: dict[str, Any]) -> None:
    serving, request = SimpleNamespace(tokenizer_manager=manager(config)), sent("/api/chat", **body)
    assert refuse_ollama(lambda *args: args, serving, "request", request) == (serving, "request", request)
