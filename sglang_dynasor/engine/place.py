"""Where the `dynasor` field is read: at its place in a body, from a template, or for a request that sends none.

What stands at the wrong place is an HTTP 400, which SGLang would drop without a word.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, cast

from fastapi.responses import JSONResponse
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_dynasor.engine import validation
from sglang_dynasor.engine.flag import serves_programs
from sglang_dynasor.engine.owner import owner_of, with_owner
from sglang_dynasor.engine.templates import give_templates, with_field
from sglang_dynasor.engine.validation import has_field
from sglang_dynasor.errors import FieldError, quoted, spelled
from sglang_dynasor.policy.metadata import field_in
from sglang_dynasor.policy.near_miss import CLIENT_ARGUMENT, METADATA, near_miss, plain

# Where the field is read, by route. Only routes whose errors SGLang answers with HTTP 400 are here; the others go unlooked at.
_NATIVE, _OPENAI = ("sampling_params", "custom_params", "dynasor"), ("custom_params", "dynasor")
_METADATA = METADATA, "dynasor"
_PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "sgl.Engine": (_NATIVE,),
    "/generate": (_NATIVE,),
    "/v1/chat/completions": (_OPENAI, _METADATA),
    "/v1/completions": (_OPENAI, _METADATA),
    "/invocations": (_OPENAI, _METADATA),
    "/v1/responses": (_METADATA,),
    "/v1/messages": (_METADATA,),
}


def check_place(tokenizer_manager: Any, obj: Any, request: Any = None) -> None:
    """Refuse a field that is misspelt, or where nobody reads it (FieldError), before SGLang makes anything of the request.

    A body is looked at as its client wrote it: FastAPI, which drops unknown keys, keeps what it has parsed. From here on a
    request has the settings of its template and says whose it is, and its prompts share its budget.
    """
    if not serves_programs(tokenizer_manager.server_args) or validation.is_placed(obj):
        return
    _check_rids(obj)
    if not isinstance(obj, GenerateReqInput):
        return
    _map_params(obj, _unowned)  # first: whatever fails from here on, nobody says by himself whose he is
    body: Any = getattr(request, "_json", None)
    route = route_of(request)
    validation.route.set(route)
    if isinstance(body, dict):
        wrong = _misplaced(body, route)
    else:  # from `sgl.Engine`, or not JSON
        wrong = _misplaced({"sampling_params": obj.sampling_params}, "sgl.Engine")
    if wrong is not None:
        raise FieldError(wrong)
    if (field := carried(request)) is not None:
        _put(obj, field)
    give_templates(tokenizer_manager, obj, route, model_of(body))
    if route == "/v1/completions" and isinstance(body, dict) and body.get("rid") is None:
        _name_prompts(obj)
    _set_owner(obj, tokenizer_manager.server_args, request)
    if isinstance(obj.sampling_params, list):
        _share_budget(obj)


def route_of(request: Any) -> str:
    """The endpoint that a request was sent to, as SGLang's app has it; empty if it was sent to none."""
    scope: Any = getattr(request, "scope", None)
    return getattr(scope.get("route"), "path", "") if isinstance(scope, dict) else ""


def carried(request: Any) -> Any:
    """The field that a request's metadata carry where they are read; None where there is none.

    Raises:
        FieldError: it is wrong, or another stands in `custom_params`.
    """
    body: Any = getattr(request, "_json", None)
    if not isinstance(body, dict) or _METADATA not in _PLACES.get(route_of(request), ()):
        return None
    field, custom = field_in(body.get(METADATA)), body.get("custom_params")
    if field is not None and isinstance(custom, dict) and "dynasor" in custom:
        raise FieldError("metadata.dynasor and custom_params.dynasor are both there; send one of them")
    return field


def _put(obj: Any, field: Any) -> None:
    """Let each prompt have the field that the request's metadata carry; a chat has it already (chat.py)."""

    _map_params(obj, lambda params: params if has_field(params) else with_field(params, field))


def _map_params(obj: Any, change: Callable[[Any], Any]) -> None:
    """Change the sampling parameters of each prompt."""
    params = obj.sampling_params
    obj.sampling_params = [change(each) for each in params] if isinstance(params, list) else change(params)


def _unowned(params: Any) -> Any:
    """A program's without what only the front process says."""
    return params | {"custom_params": with_owner(params["custom_params"], "")} if has_field(params) else params


def _name_prompts(obj: Any) -> None:
    """Let a client know the ids of all programs of one request, of which a response tells one: the first prompt's, which ends in _0."""
    params = obj.sampling_params
    if isinstance(params, list) and isinstance(obj.rid, list) and any(map(has_field, params)):
        name = uuid.uuid4().hex
        obj.rid = [f"{name}_{i}" for i in range(len(obj.rid))]


def model_of(body: Any) -> str:
    """The model that a body names."""
    model: Any = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else ""


def _check_rids(obj: Any) -> None:
    """SGLang aborts by prefix of the rid as soon as it knows it: none may be one of the server's own."""
    for rid in _rids(obj):
        if rid.startswith("\0"):
            raise FieldError(f"rid={quoted(rid)} begins with a NUL, as the server's own do; send another, or none")


def _rids(obj: Any) -> list[str]:
    return [rid for rid in (obj.rid if isinstance(obj.rid, list) else [obj.rid]) if isinstance(rid, str)]


def _check_names(obj: Any) -> None:
    """Programs are listed by their rids, in UTF-8, which has no place for half a surrogate pair."""
    for rid in _rids(obj):
        try:
            rid.encode()
        except UnicodeEncodeError:
            raise FieldError(
                f"rid={quoted(rid)} has half a surrogate pair and is no text; send another, or none"
            ) from None


def _set_owner(obj: Any, server_args: Any, request: Any) -> None:
    """Let the prompts that are programs say whose they are."""
    params: Any = obj.sampling_params
    if any(map(has_field, params if isinstance(params, list) else [params])):
        _check_names(obj)
        owner = owner_of(server_args, request)
        _map_params(obj, lambda one: _of(owner, one))


def _of(owner: str, params: Any) -> Any:
    """One prompt's sampling parameters as its owner's."""
    custom: Any = params["custom_params"] if has_field(params) else None
    return params if custom is None else params | {"custom_params": with_owner(custom, owner)}


def _share_budget(obj: Any) -> None:
    """Let the prompts of one request share the tokens that it names without an id."""
    fields = [_field(params) for params in obj.sampling_params]
    sharing = [field for field in fields if _shares(field)]
    if not sharing:
        return
    if any(field["budget_tokens"] != sharing[0]["budget_tokens"] for field in sharing):
        raise FieldError(
            f"dynasor.budget_tokens={quoted(sharing[0]['budget_tokens'])} and others in one request: its prompts share one budget; send one "
            "number, or dynasor.budget, an id, with each"
        )
    shared = {"budget": f"r-{uuid.uuid4().hex}", "budget_programs": len(sharing)}
    obj.sampling_params = [
        params | {"custom_params": params["custom_params"] | {"dynasor": shared | field}} if _shares(field) else params
        for params, field in zip(obj.sampling_params, fields, strict=True)
    ]


def _shares(field: dict[str, Any]) -> bool:
    return "budget_tokens" in field and "budget" not in field


def _field(params: Any) -> dict[str, Any]:
    """The field in one prompt's sampling parameters; empty where there is none, or it is only a name."""
    custom: Any = params.get("custom_params") if isinstance(params, dict) else None
    field: Any = custom.get("dynasor") if isinstance(custom, dict) else None
    return cast("dict[str, Any]", field) if isinstance(field, dict) else {}


def say_place(result: str | None, body: Any) -> str | None:
    """What SGLang says of a key of `sampling_params` that it does not know, but where the field was meant."""
    if result is None:
        return None
    from sglang.srt.entrypoints import http_server

    serves = serves_programs(http_server.get_global_state().tokenizer_manager.server_args)
    return _misplaced(body, "/generate") if serves else None


def refuse_ollama(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    """Ollama's endpoints: a field, which nobody reads there, is an HTTP 400 before SGLang begins a stream; else the same as by stock."""
    body: Any = getattr(raw_request, "_json", None)
    if serves_programs(serving.tokenizer_manager.server_args) and isinstance(body, dict):
        path = near_miss(body)
        if path is None and (inner := near_miss(body.get("options"))) is not None:
            path = ("options", *inner)
        if path is not None:
            return _refused(_told(path, route_of(raw_request), ()))
    return original(serving, request, raw_request)


async def _refused(message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=400)


def _misplaced(body: Any, route: str) -> str | None:
    """What is wrong with the place of the field in a body sent to `route`; None if nothing is."""
    if route not in _PLACES:
        return None
    places = _PLACES[route]
    path = near_miss(body, *places)
    return None if path is None else _told(path, route, places)


def _told(path: tuple[str, ...], route: str, places: tuple[tuple[str, ...], ...]) -> str:
    """The error of a field at `path`, where `route` does not read it, but at `places`."""
    where = ".".join(map(spelled, path))
    if not places:
        return f"{where} is not read by {route}, which takes no dynasor field; send the request to /v1/chat/completions or /generate"
    place = _METADATA if path[0] == METADATA and _METADATA in places else places[0]
    example = '{"dynasor": "self_consistency"}'
    for key in reversed(place[:-1]):
        example = f'{{"{key}": {example}}}'
    message = f"{where} is not read by {route}; send the field as {'.'.join(place)}, such as {example}"
    if plain(path[0]) == CLIENT_ARGUMENT:
        message += f" ({spelled(path[0])} is an argument of the OpenAI Python client, which sends what is in it at the top of the body)"
    return message
