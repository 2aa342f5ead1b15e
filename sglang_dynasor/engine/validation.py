"""What a field may ask of this server, for this request: what is wrong is an HTTP 400, before anything is queued.

What the field alone says is read by policy/spec.py, where it stands by place.py, and whose its ids are by claims.py.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_exec, get_memory, get_serving

from sglang_dynasor.engine.books import budgets_of
from sglang_dynasor.engine.comparing import same_tokens
from sglang_dynasor.engine.flag import config_of, serves_programs
from sglang_dynasor.engine.judge import judge_tokens
from sglang_dynasor.engine.media import INPUTS, check_judge
from sglang_dynasor.engine.owner import owned
from sglang_dynasor.engine.probe import thought_tokens
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.spec import JudgeSpec, ProgramSpec, check_greedy, parse_field
from sglang_dynasor.symbolic import check_installed

UNSUPPORTED_INPUTS = (
    "input_embeds",
    "session_params",
    "positional_embed_overrides",
)

CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")  # of a grammar

MOST_TOP_K = 2**31 - 1

NO_ROOM = "max_new_tokens=0 with dynasor leaves no room for an answer; send at least 1"


def validate(result: None, tokenizer_manager: Any, obj: Any, input_ids: list[int]) -> None:
    """Refuse a wrong `dynasor` field (FieldError, a ValueError: HTTP 400) before anything is queued.

    Nothing is taken note of here: what SGLang still refuses has claimed nothing (claims.py).
    """
    params: Any = getattr(obj, "sampling_params", None)
    if not isinstance(obj, GenerateReqInput) or not serves_programs(tokenizer_manager.server_args):
        return
    set_placed(obj)
    if has_field(params):
        # With images SGLang has put its own ids in, which it reads as no tokens.
        ids: Any = obj.input_ids if _sees(tokenizer_manager) and media_of(obj) else input_ids
        check_harmless(ids, params, tokenizer_manager.model_config.vocab_size)
        _check_internals(obj)
        obj.sampling_params = check_program(obj, params, tokenizer_manager)


def check_harmless(input_ids: Sequence[int] | None, params: dict[str, Any], vocab_size: int) -> None:
    """Raise FieldError for what SGLang 0.5.23 takes of any request, and its scheduler dies of.

    Args:
        input_ids: tokens of the prompt; None where it is no text.
        params: its sampling parameters.
    """
    if input_ids is not None and not len(input_ids):
        raise FieldError("the prompt has no tokens: send a text, or input_ids, that are not empty")
    if input_ids is not None and (wrong := _first_outside(input_ids, vocab_size)) is not None:
        raise FieldError(
            f"input_ids has {quoted(wrong)}, outside [0, {vocab_size}): send ids of this model's vocabulary"
        )
    top_k = params.get("top_k")
    if isinstance(top_k, int) and top_k > MOST_TOP_K:
        raise FieldError(f"top_k={quoted(top_k)} is above {MOST_TOP_K}; send -1 for all tokens")


def _check_internals(obj: Any) -> None:
    """Raise FieldError for JSON in place of what SGLang makes itself, or an Engine in this process: its scheduler dies of it."""
    if obj.positional_embed_overrides is not None and not isinstance(obj.positional_embed_overrides, PositionalEmbeds):
        raise FieldError(
            f"positional_embed_overrides={quoted(obj.positional_embed_overrides)} is no PositionalEmbeds, which JSON cannot say; leave it out"
        )
    if obj.lora_id is not None and not obj.lora_path:
        raise FieldError(f"lora_id={quoted(obj.lora_id)} is SGLang's own; send the adapter's name as lora_path")


def _first_outside(input_ids: Sequence[Any], vocab_size: int) -> object:
    if isinstance(input_ids, array):  # as a scheduler has them, whose loop waits for this (gate.py)
        ids = np.frombuffer(input_ids, input_ids.typecode)
        if ids.min() >= 0 and ids.max() < vocab_size:
            return None
    try:
        return next((token for token in input_ids if not 0 <= token < vocab_size), None)
    except TypeError:  # one is no number: JSON may say anything
        return next((token for token in input_ids if not isinstance(token, int)), None)


# Of the request that this task serves: the endpoint that it was sent to. SGLang makes one object of each of its prompts.
route: ContextVar[str] = ContextVar("route", default="")


def is_placed(obj: Any) -> bool:
    """Whether place.py has seen a request before: SGLang brings the choices of one again, each with what it was given."""
    return getattr(obj, "_dynasor_placed", False)


def set_placed(obj: Any) -> None:
    obj._dynasor_placed = True
    obj._dynasor_route = route.get()


def has_field(params: Any) -> bool:
    """Whether one prompt's sampling parameters have a field, right or wrong."""
    custom: Any = params.get("custom_params") if isinstance(params, dict) else None
    return isinstance(custom, dict) and "dynasor" in custom


def check_program(obj: Any, params: dict[str, Any], tokenizer_manager: Any) -> dict[str, Any]:
    """The sampling parameters of a program: as they are, or of its choices.

    Args:
        obj: the request, of one prompt.
        params: its sampling parameters, with a field.

    Raises:
        FieldError: the field is wrong, or cannot be served with the request around it.
    """
    config = config_of(tokenizer_manager.server_args)
    field, sampling = params["custom_params"]["dynasor"], sampling_of(params, tokenizer_manager)
    spec = owned(parse_field(field, config.dynasor_max_branches, config.dynasor_level), params["custom_params"])
    if (params.get("beam_width") or 1) != 1:
        raise FieldError(
            f"beam_width={quoted(params['beam_width'])} with dynasor is not supported; leave out one of the two"
        )
    check_spec(spec, tokenizer_manager)
    if spec.thought is not None:
        check_thought(spec, obj, params)
    if spec.budget is not None:
        budgets_of(tokenizer_manager).check(spec, sampling.get("max_new_tokens"))
    if spec.program is not None:  # the client samples the branches itself
        check_greedy(spec.branches, sampling)
        return params
    if params.get("max_new_tokens") == 0:
        raise FieldError(NO_ROOM)
    num_choices = params.get("n") or 1
    if num_choices != 1:
        check_greedy(num_choices, sampling)
        return _as_choices(spec, params, num_choices, field, tokenizer_manager)
    check_greedy(spec.branches, sampling)
    for name in UNSUPPORTED_INPUTS:
        if getattr(obj, name, None) is not None:
            raise FieldError(f"{name} with dynasor is not supported; leave out one of the two")
    for name in media_of(obj):
        if not _sees(tokenizer_manager):
            raise FieldError(f"{name} with dynasor on a server whose model reads text only; leave one of the two out")
        check_judge(spec, name)
    return params


def media_of(obj: Any) -> list[str]:
    """What of INPUTS a request has."""
    return [name for name in INPUTS if getattr(obj, name, None)]


def _sees(tokenizer_manager: Any) -> bool:
    """Whether SGLang reads anything but text here; else it drops images without a word."""
    return getattr(tokenizer_manager, "mm_processor", None) is not None


def check_spec(spec: ProgramSpec, tokenizer_manager: Any) -> None:
    """Raise FieldError where this server, with its model and options, cannot run such programs whatever the request is."""
    if spec.judge is not None:
        _check_judge(spec.judge, tokenizer_manager)
    _check_comparer(spec, tokenizer_manager)
    if spec.thought is None:
        return
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


def sampling_of(params: dict[str, Any], tokenizer_manager: Any) -> dict[str, Any]:
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
            f"dynasor.{wrong}={quoted(options[wrong])} with n={num_choices} is not supported; send n=1 and dynasor.branches={num_choices}"
        )
    if get_exec().deterministic.enable_deterministic_inference:
        raise FieldError(
            f"n={num_choices} with dynasor on a server with deterministic inference: the choices would sample "
            f"by one seed and be the same; send n=1 and dynasor.branches={num_choices}"
        )
    if options.get("branches", num_choices) != num_choices:
        raise FieldError(
            f"dynasor.branches={quoted(options['branches'])} with n={num_choices}: the n choices are the branches; send one of the two"
        )
    # Looked at here, because SGLang makes n requests of it that nobody looks at again.
    program = options | {"program": f"n-{uuid.uuid4().hex}", "branches": num_choices}
    parse_field(program, config_of(tokenizer_manager.server_args).dynasor_max_branches)
    return params | {"custom_params": params["custom_params"] | {"dynasor": program}}


def check_thought(spec: ProgramSpec, obj: Any, params: dict[str, Any]) -> None:
    """Raise FieldError where the end of a thought would not be the model's own to say."""
    constraint = next((key for key in CONSTRAINTS if params.get(key)), None)
    if constraint is not None or obj.return_logprob:
        raise FieldError(
            f"{constraint or 'return_logprob'} with dynasor.algorithm={spec.algorithm!r} is not supported: the end of a closed thought is "
            "not sampled; leave out one of the two"
        )


def _check_comparer(spec: ProgramSpec, tokenizer_manager: Any) -> None:
    match spec.comparer:
        case "symbolic":
            check_installed()
        case "model":
            tokens, vocab_size = same_tokens(tokenizer_manager.tokenizer), tokenizer_manager.model_config.vocab_size
            if max(tokens.yes, tokens.no) >= vocab_size:
                raise FieldError(
                    f"dynasor.equal={quoted(spec.equal)}: the tokenizer knows tokens that the model does not, whose vocabulary is {vocab_size}; use equal "
                    "'math' or 'text'"
                )
        case "embedding" if not config_of(tokenizer_manager.server_args).dynasor_embedding_url:
            raise FieldError(
                f"dynasor.equal={quoted(spec.equal)} without an embedding server: start the server with --dynasor-embedding-url, or use "
                "another equality"
            )
        case _:
            pass


def _check_judge(judge: JudgeSpec, tokenizer_manager: Any) -> None:
    if not judge.is_external:
        tokens, vocab_size = judge_tokens(judge, tokenizer_manager.tokenizer), tokenizer_manager.model_config.vocab_size
        if max(tokens.good, tokens.bad) >= vocab_size:
            raise FieldError(
                f"dynasor.judge_good={quoted(judge.good)}, judge_bad={quoted(judge.bad)}: the tokenizer knows tokens that the model "
                f"does not, whose vocabulary is {vocab_size}; send others"
            )
    elif not config_of(tokenizer_manager.server_args).dynasor_reward_url:
        raise FieldError(
            f"dynasor.judge={'steps' if judge.by_steps else 'model'!r} without a reward model: start the server with --dynasor-reward-url, or send judge 'self' "
            "with judge_suffix, judge_good and judge_bad for the model to judge itself"
        )
