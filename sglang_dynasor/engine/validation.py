"""Every HTTP 400 about the `dynasor` field: `validate` and `check_place` raise it, before anything is queued.

What the field alone says is read by policy/spec.py; here is what only the server knows of the request around it.
"""

from __future__ import annotations

import uuid
from typing import Any, cast

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_exec, get_memory, get_serving

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.comparing import same_tokens
from sglang_dynasor.engine.flag import config_of
from sglang_dynasor.engine.judge import judge_tokens
from sglang_dynasor.engine.probe import thought_tokens
from sglang_dynasor.errors import FieldError
from sglang_dynasor.observe.ledger import BudgetBook, Owners
from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS
from sglang_dynasor.policy.near_miss import CLIENT_ARGUMENT, near_miss, plain
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec, check_greedy, parse_field
from sglang_dynasor.symbolic import check_installed

# OpenAI's words for the field's; "none" turns thinking off, which leaves nothing to probe.
REASONING_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_UNSUPPORTED_INPUTS = (
    "image_data",
    "video_data",
    "audio_data",
    "input_embeds",
    "session_params",
    "positional_embed_overrides",
    "lora_path",  # SGLang lets an adapter go with the answer, while siblings still end
)
# Where the field is read, by route. Only routes whose errors SGLang answers with HTTP 400 are here; the others go unlooked at.
_NATIVE, _OPENAI = ("sampling_params", "custom_params", "dynasor"), ("custom_params", "dynasor")
_PLACES: dict[str, tuple[str, ...] | None] = {
    "sgl.Engine": _NATIVE,
    "/generate": _NATIVE,
    "/v1/chat/completions": _OPENAI,
    "/v1/completions": _OPENAI,
    "/invocations": _OPENAI,
    "/v1/responses": None,
    "/v1/messages": None,
}


def owners_of(tokenizer_manager: Any) -> Owners:
    """Whose the programs are whose branches clients send."""
    if not hasattr(tokenizer_manager, "_dynasor_owners"):
        tokenizer_manager._dynasor_owners = Owners()
    return tokenizer_manager._dynasor_owners


def budgets_of(tokenizer_manager: Any) -> BudgetBook:
    """The budgets that were declared, and how long branches are here."""
    if not hasattr(tokenizer_manager, "_dynasor_budgets"):
        tokenizer_manager._dynasor_budgets = BudgetBook()
    return tokenizer_manager._dynasor_budgets


def validate(result: None, tokenizer_manager: Any, obj: Any, input_ids: list[int]) -> None:
    """Refuse a wrong `dynasor` field (FieldError, a ValueError: HTTP 400) before anything is queued."""
    rid: Any = getattr(obj, "rid", None)
    if isinstance(rid, str) and rid.startswith("\0") and config_of(tokenizer_manager.server_args).is_on:
        raise FieldError(f"rid={rid!r} begins with a NUL, as the server's own do; send another, or none")
    params: Any = getattr(obj, "sampling_params", None)
    custom: Any = params.get("custom_params") if isinstance(params, dict) else None
    if not isinstance(custom, dict) or "dynasor" not in custom:
        return
    config = config_of(tokenizer_manager.server_args)
    if not config.is_on or not isinstance(obj, GenerateReqInput):
        return
    spec = parse_field(custom["dynasor"], config.dynasor_max_branches, config.dynasor_level)
    if (params.get("beam_width") or 1) != 1:
        raise FieldError(f"beam_width={params['beam_width']!r} with dynasor is not supported; leave out one of the two")
    if spec.judge is not None:
        _check_judge(spec.judge, tokenizer_manager, config)
    _check_comparer(spec, tokenizer_manager, config)
    if spec.thought is not None:
        _check_thought(spec, obj, params, tokenizer_manager)
    if spec.budget is not None:
        budgets_of(tokenizer_manager).check(spec, _sampling(params, tokenizer_manager).get("max_new_tokens"))
    if spec.program is not None:  # the client samples the branches itself
        check_greedy(spec.branches, _sampling(params, tokenizer_manager))
        owners_of(tokenizer_manager).check(spec)
        return
    if params.get("max_new_tokens") == 0:
        raise FieldError("max_new_tokens=0 with dynasor leaves no room for an answer; send at least 1")
    num_choices = params.get("n") or 1
    if num_choices != 1:
        obj.sampling_params = _as_choices(spec, params, num_choices, custom["dynasor"], tokenizer_manager)
        check_greedy(num_choices, _sampling(params, tokenizer_manager))
        return
    check_greedy(spec.branches, _sampling(params, tokenizer_manager))
    for name in _UNSUPPORTED_INPUTS:
        if getattr(obj, name, None) is not None:
            raise FieldError(f"{name} with dynasor is not supported; leave out one of the two")


def check_place(tokenizer_manager: Any, obj: Any, request: Any = None) -> None:
    """Refuse a field that is misspelt, or where nobody reads it (FieldError), before SGLang makes anything of the request.

    A body is looked at as its client wrote it: FastAPI, which drops unknown keys, keeps what it has parsed. The prompts of one
    request share its budget from here on.
    """
    if not config_of(tokenizer_manager.server_args).is_on or not isinstance(obj, GenerateReqInput):
        return
    body: Any = getattr(request, "_json", None)
    if isinstance(body, dict):
        route: Any = request.scope.get("route")
        wrong = _misplaced(body, getattr(route, "path", ""))
    else:  # from `sgl.Engine`, or not JSON
        wrong = _misplaced({"sampling_params": obj.sampling_params}, "sgl.Engine")
    if wrong is not None:
        raise FieldError(wrong)
    if isinstance(obj.sampling_params, list):
        _share_budget(obj)


def _share_budget(obj: Any) -> None:
    """Let the prompts of one request share the tokens that it names without an id."""
    fields = [_field(params) for params in obj.sampling_params]
    sharing = [field for field in fields if _shares(field)]
    if not sharing:
        return
    if any(field["budget_tokens"] != sharing[0]["budget_tokens"] for field in sharing):
        raise FieldError(
            f"dynasor.budget_tokens={sharing[0]['budget_tokens']!r} and others in one request: its prompts share one budget; send one "
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

    is_on = config_of(http_server.get_global_state().tokenizer_manager.server_args).is_on
    return _misplaced(body, "/generate") if is_on else None


def _misplaced(body: Any, route: str) -> str | None:
    """What is wrong with the place of the field in a body sent to `route`; None if nothing is."""
    if route not in _PLACES:
        return None
    place = _PLACES[route]
    path = near_miss(body, place)
    if path is None:
        return None
    where = ".".join(path)
    if place is None:
        return f"{where} is not read by {route}, which takes no dynasor field; send the request to /v1/chat/completions or /generate"
    example = '{"dynasor": "self_consistency"}'
    for key in reversed(place[:-1]):
        example = f'{{"{key}": {example}}}'
    message = f"{where} is not read by {route}; send the field as {'.'.join(place)}, such as {example}"
    if plain(path[0]) == CLIENT_ARGUMENT:
        message += (
            f" ({path[0]} is an argument of the OpenAI Python client, which sends what is in it at the top of the body)"
        )
    return message


def _sampling(params: dict[str, Any], tokenizer_manager: Any) -> dict[str, Any]:
    """What a request is sampled by: its own parameters, and the operator's --preferred-sampling-params for the others."""
    return {**(tokenizer_manager.preferred_sampling_params or {}), **params}


def _as_choices(
    spec: ProgramSpec, params: dict[str, Any], num_choices: int, field: Any, tokenizer_manager: Any
) -> dict[str, Any]:
    """`n` choices as a program whose branches they are: the client sees each, those not needed empty or cut short."""
    options: dict[str, Any] = {"algorithm": field} if isinstance(field, str) else dict(field)
    # The choices are requests like any other: SGLang's, in its own queue.
    wrong = (
        "algorithm"
        if spec.thought
        else next(
            (key for key in ("judge", "deadline_s", "tenant", "budget_tokens") if key in options),
            "equal" if spec.comparer else None,
        )
    )
    if wrong is not None:
        raise FieldError(
            f"dynasor.{wrong}={options[wrong]!r} with n={num_choices} is not supported; send n=1 and dynasor.branches={num_choices}"
        )
    if get_exec().deterministic.enable_deterministic_inference:
        raise FieldError(
            f"n={num_choices} with dynasor on a server with deterministic inference: the choices would sample "
            f"by one seed and be the same; send n=1 and dynasor.branches={num_choices}"
        )
    if options.get("branches", num_choices) != num_choices:
        raise FieldError(
            f"dynasor.branches={options['branches']} with n={num_choices}: the n choices are the branches; send one of the two"
        )
    # Looked at here, because SGLang makes n requests of it that nobody looks at again.
    program = options | {"program": f"n-{uuid.uuid4().hex}", "branches": num_choices}
    parse_field(program, config_of(tokenizer_manager.server_args).dynasor_max_branches)
    return params | {"custom_params": params["custom_params"] | {"dynasor": program}}


def _check_thought(spec: ProgramSpec, obj: GenerateReqInput, params: dict[str, Any], tokenizer_manager: Any) -> None:
    assert spec.thought is not None
    thought_tokens(spec.thought, spec.answer, tokenizer_manager.tokenizer)
    if get_memory().disable_radix_cache:
        raise FieldError(
            f"dynasor.algorithm={spec.algorithm!r} on a server without radix cache (--disable-radix-cache, or SGLang turned it off): probes would compute the whole "
            "thought again; use another algorithm"
        )
    if get_serving().strip_thinking_cache:
        raise FieldError(
            f"dynasor.algorithm={spec.algorithm!r} on a server with --strip-thinking-cache: probes read thoughts from the cache; "
            "use another algorithm, or leave that option out"
        )
    constraint = next((key for key in ("json_schema", "regex", "ebnf", "structural_tag") if params.get(key)), None)
    if constraint is not None or obj.return_logprob:
        raise FieldError(
            f"{constraint or 'return_logprob'} with dynasor.algorithm={spec.algorithm!r} is not supported: the end of a closed thought is "
            "not sampled; leave out one of the two"
        )


def take_effort(result: Any, serving_chat: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """OpenAI's `reasoning_effort` becomes the field's `effort`, where a field that takes that has none."""
    params: Any = result[0].sampling_params
    custom: Any = params.get("custom_params") if isinstance(params, dict) else None
    field: Any = custom.get("dynasor") if isinstance(custom, dict) else None
    effort = REASONING_EFFORTS.get(request.reasoning_effort) if isinstance(request.reasoning_effort, str) else None
    if isinstance(field, str):
        field = {"algorithm": field}
    name = field.get("algorithm") if isinstance(field, dict) else None
    about = ENGINE_ALGORITHMS.get(name) if isinstance(name, str) else None
    if effort is None or about is None or "effort" not in about.engine_keys or "effort" in field:
        return
    result[0].sampling_params = params | {"custom_params": custom | {"dynasor": field | {"effort": effort}}}


def _check_comparer(spec: ProgramSpec, tokenizer_manager: Any, config: DynasorConfig) -> None:
    match spec.comparer:
        case "symbolic":
            check_installed()
        case "model":
            tokens, vocab_size = same_tokens(tokenizer_manager.tokenizer), tokenizer_manager.model_config.vocab_size
            if max(tokens.yes, tokens.no) >= vocab_size:
                raise FieldError(
                    f"dynasor.equal={spec.equal!r}: the tokenizer knows tokens that the model does not, whose vocabulary is {vocab_size}; use equal "
                    "'math' or 'text'"
                )
        case "embedding" if not config.dynasor_embedding_url:
            raise FieldError(
                f"dynasor.equal={spec.equal!r} without an embedding server: start the server with --dynasor-embedding-url, or use "
                "another equality"
            )
        case _:
            pass


def _check_judge(judge: JudgeSpec, tokenizer_manager: Any, config: DynasorConfig) -> None:
    if not judge.is_external:
        tokens, vocab_size = judge_tokens(judge, tokenizer_manager.tokenizer), tokenizer_manager.model_config.vocab_size
        if max(tokens.good, tokens.bad) >= vocab_size:
            raise FieldError(
                f"dynasor.judge_good={judge.good!r}, judge_bad={judge.bad!r}: the tokenizer knows tokens that the model "
                f"does not, whose vocabulary is {vocab_size}; send others"
            )
    elif not config.dynasor_reward_url:
        raise FieldError(
            f"dynasor.judge={'steps' if judge.by_steps else 'model'!r} without a reward model: start the server with --dynasor-reward-url, or send judge 'self' "
            "with judge_suffix, judge_good and judge_bad for the model to judge itself"
        )
