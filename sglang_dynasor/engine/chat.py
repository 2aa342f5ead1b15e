"""A chat on its way into SGLang: its messages are wrapped as its template says, and OpenAI's `reasoning_effort` reaches the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionMessageContentTextPart,
    ChatCompletionMessageGenericParam,
)

from sglang_dynasor.engine.flag import serves_programs
from sglang_dynasor.engine.place import carried, route_of
from sglang_dynasor.engine.templates import book_of, why_plain, with_field
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS
from sglang_dynasor.policy.templates import PLAIN, Template

# OpenAI's words for the field's; "none" turns thinking off, which leaves nothing to probe.
REASONING_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def convert(original: Callable[..., Any], serving_chat: Any, request: Any, raw_request: Any = None) -> Any:
    """SGLang renders a chat: with its template around it, if it has one.

    A default for a chat that cannot be a program, which only its rendering tells, leaves it as it was.

    Raises:
        FieldError: no such template, or one that cannot be had here.
    """
    tokenizer_manager = serving_chat.tokenizer_manager
    if not serves_programs(tokenizer_manager.server_args):
        return original(serving_chat, request, raw_request)
    if (field := carried(raw_request)) is not None:
        request = with_carried(request, field)
    book, custom = book_of(tokenizer_manager), request.custom_params
    is_asked, row = isinstance(custom, dict) and "dynasor" in custom, None
    name: Any = custom["dynasor"] if is_asked else None
    if name == PLAIN:
        name = None
    if not is_asked:
        row = book.templates.default_for(route_of(raw_request), request.model)
        name = None if row is None or row.template == PLAIN else row.template
    field, template = book.take(name) if name is not None else (None, None)
    if row is not None and name is not None:
        result, why = _convert_default(original, serving_chat, request, raw_request, field, template)
        book.note_default(row, why)
        if why:
            return result
    else:
        result = original(serving_chat, request if template is None else wrap_chat(request, template), raw_request)
        if template is not None:
            result[0].sampling_params = with_field(result[0].sampling_params, field)
    book.note(template)
    take_effort(result)
    return result


def _convert_default(
    original: Callable[..., Any],
    serving_chat: Any,
    request: Any,
    raw_request: Any,
    field: Any,
    template: Template | None,
) -> tuple[Any, str]:
    """A chat with a field that nobody asked for, and an empty text; or as it is, and why."""
    try:
        wrapped = request if template is None else wrap_chat(request, template)
    except FieldError as error:
        return original(serving_chat, request, raw_request), str(error)
    result = original(serving_chat, wrapped, raw_request)
    params: dict[str, Any] = result[0].sampling_params
    if params.get("custom_params") is None or isinstance(params["custom_params"], dict):
        given = with_field(params, field)
        why = why_plain(result[0], given, serving_chat.tokenizer_manager)
    else:
        given, why = params, "custom_params is no object"
    if not why:
        result[0].sampling_params = given
    elif wrapped is not request:
        result = original(serving_chat, request, raw_request)
    return result, why


def with_carried(request: Any, field: Any) -> Any:
    """A chat with the field that its metadata carry, and with its record in the answer: who sends it there cannot ask for that.

    SGLang's router drops `return_meta_info`; SGLang refuses it of a stream.
    """
    custom = {**(request.custom_params or {}), "dynasor": field}
    return request.model_copy(update={"custom_params": custom, "return_meta_info": not request.stream})


def wrap_chat(request: Any, template: Template) -> Any:
    """A chat with what a template puts around its last user message, and before all.

    Raises:
        FieldError: it has no user message, or is tokens already.
    """
    if not template.has_wrapper:
        return request
    if request.input_ids is not None:
        raise FieldError(
            f"template {template.id} puts text around the prompt, and input_ids are tokens; send messages only"
        )
    messages = list(request.messages)
    if template.before or template.after:
        at = next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), None)
        if at is None:
            raise FieldError(
                f"template {template.id} puts text around the user's message, and this chat has none; send one"
            )
        messages[at] = _around(messages[at], template.before, template.after)
    if template.system:
        if messages and messages[0].role in ("system", "developer"):
            messages[0] = _around(messages[0], f"{template.system}\n\n", "")
        else:
            messages.insert(0, ChatCompletionMessageGenericParam(role="system", content=template.system))
    # SGLang takes keys out of this one while it renders.
    kwargs = request.chat_template_kwargs
    return request.model_copy(
        update={"messages": messages, "chat_template_kwargs": dict(kwargs) if kwargs is not None else None}
    )


def _around(message: Any, before: str, after: str) -> Any:
    """A message with text before and after its own; of one in parts, in its first and last part of text."""
    content = message.content
    if not isinstance(content, list):
        return message.model_copy(update={"content": f"{before}{content or ''}{after}"})
    parts = list(content)
    if not any(part.type == "text" for part in parts):
        parts.append(ChatCompletionMessageContentTextPart(type="text", text=""))
    texts = [i for i, part in enumerate(parts) if part.type == "text"]
    parts[texts[0]] = parts[texts[0]].model_copy(update={"text": before + parts[texts[0]].text})
    parts[texts[-1]] = parts[texts[-1]].model_copy(update={"text": parts[texts[-1]].text + after})
    return message.model_copy(update={"content": parts})


def take_effort(result: Any) -> None:
    """OpenAI's `reasoning_effort` becomes the field's `effort`, where a field that takes that has none."""
    adapted, request = result
    params: Any = adapted.sampling_params
    custom: Any = params.get("custom_params") if isinstance(params, dict) else None
    field: Any = custom.get("dynasor") if isinstance(custom, dict) else None
    effort = REASONING_EFFORTS.get(request.reasoning_effort) if isinstance(request.reasoning_effort, str) else None
    if isinstance(field, str):
        field = {"algorithm": field}
    name = field.get("algorithm") if isinstance(field, dict) else None
    about = ENGINE_ALGORITHMS.get(name) if isinstance(name, str) else None
    if effort is None or about is None or "effort" not in about.engine_keys or "effort" in field:
        return
    adapted.sampling_params = params | {"custom_params": custom | {"dynasor": field | {"effort": effort}}}
