"""`sgl.Engine` as a backend of SGLang's frontend, for programs that declare branches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template, get_chat_template_by_model_path
from sglang.lang.global_config import global_config

from sglang_dynasor.errors import FieldError, RefusedError
from sglang_dynasor.frontend import seat
from sglang_dynasor.frontend.driver import DEFAULT_ROWS, Driver

_LOGPROB_KEYS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob")


_loops_lock = threading.Lock()
_LOOP = "_dynasor_loop"  # of an engine: the backends that use its loop, and the thread that runs it for them


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:  # none is
        return False


def _hold_loop(engine: Any) -> None:
    """Have the engine's loop run until as many have let it go as hold it."""
    if _is_running_here(engine.loop):
        raise FieldError(
            "this engine belongs to the event loop that is calling (a notebook's, for one), which would wait for itself; make the "
            "engine in a thread of its own, or serve the model and use Endpoint(url)"
        )
    with _loops_lock:
        num_users, thread = getattr(engine, _LOOP, (0, None))
        if not engine.loop.is_running():  # else the author runs it
            thread = threading.Thread(target=engine.loop.run_forever, daemon=True)
            thread.start()
            running = threading.Event()
            engine.loop.call_soon_threadsafe(running.set)
            running.wait()
        setattr(engine, _LOOP, (num_users + 1, thread))


def _let_loop_go(engine: Any) -> None:
    with _loops_lock:
        num_users, thread = getattr(engine, _LOOP)
        if num_users == 1 and thread is not None:
            engine.loop.call_soon_threadsafe(engine.loop.stop)
            thread.join()
            thread = None
        setattr(engine, _LOOP, (num_users - 1, thread))


class LocalEngine(RuntimeEndpoint):
    """An engine in this process: `with LocalEngine(engine) as backend: ...`.

    The engine's loop runs in a thread meanwhile, so that many executors may send at once; `engine.generate` works again
    after `close`.

    Args:
        engine: an `sgl.Engine`, with or without our scheduler.
        rows: most requests at once of searches that run here.
        chat_template: the name of one of SGLang's chat templates; None: found by the model's path.
    """

    def __init__(self, engine: Any, *, rows: int = DEFAULT_ROWS, chat_template: str | None = None):
        # Not RuntimeEndpoint's own, which asks a server.
        self.support_concate_and_append = False
        self.engine = engine
        self.model_info = {"model_path": engine.server_args.model_path}
        if chat_template is not None:
            self.chat_template = get_chat_template(chat_template)
        else:
            self.chat_template = get_chat_template_by_model_path(self.model_info["model_path"])
        _hold_loop(engine)
        self._is_open = True
        self.driver = Driver(self, rows)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads go, so that the engine can be used or shut down. No harm if it was closed before."""
        self.driver.close()
        if self._is_open:
            self._is_open = False
            _let_loop_go(self.engine)

    @property
    def name(self) -> str:
        return "this engine"

    @property
    def has_scheduler(self) -> bool:
        config = getattr(self.engine.server_args, "_dynasor", None)
        return config is not None and config.is_on

    def _run(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.engine.loop).result()

    def _request(self, data: dict[str, Any]) -> Any:
        """One request, or several where `text` is a list; its errors as they are."""
        out = self._run(self._generate(data))
        if data.get("return_text_in_logprobs"):
            self._add_texts(out)
        return out

    def _generate(self, data: dict[str, Any], **options: Any) -> Any:
        """The engine's coroutine for one payload."""
        options |= {key: data[key] for key in (*_LOGPROB_KEYS, "image_data") if key in data}
        return self.engine.async_generate(
            data.get("text"), data["sampling_params"], data.get("input_ids"), rid=data.get("rid"), **options
        )

    def _add_texts(self, out: Any) -> None:
        """Put the tokens' texts into logprobs; the engine's own method has no parameter for it."""
        tokenizer = self.engine.tokenizer_manager.tokenizer
        for one in out if isinstance(out, list) else [out]:
            for key in ("input_token_logprobs", "output_token_logprobs"):
                logprobs = one["meta_info"].get(key) or []
                one["meta_info"][key] = [(value, token, tokenizer.decode([token])) for value, token, *_ in logprobs]

    def post(self, data: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self._request(data)
        except HTTPException:
            return None
        except ValueError as error:
            raise error if isinstance(error, FieldError) else RefusedError(str(error)) from error

    def tokenize(self, text: str) -> list[int]:
        return self.engine.tokenizer_manager.tokenizer.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        tokenizer = self.engine.tokenizer_manager.tokenizer
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (ValueError, TemplateError) as error:
            raise RefusedError(
                f"this engine's model takes no such chat ({error}); send prompts as the model reads them"
            ) from error
        begin: str | None = tokenizer.bos_token
        is_added = begin is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(begin) if begin and is_added else text

    def abort(self, rid: str) -> None:
        self.engine.loop.call_soon_threadsafe(self.engine.tokenizer_manager.abort_request, rid)

    def get_server_info(self) -> Any:
        return self._run(self.engine.tokenizer_manager.get_internal_state())

    def flush_cache(self) -> None:
        self._run(self.engine.tokenizer_manager.flush_cache())

    def cache_prefix(self, prefix_str: str) -> None:
        self._request({"text": prefix_str, "sampling_params": {"max_new_tokens": 0}})

    def _payload(self, s: Any, sampling_params: Any) -> dict[str, Any]:
        self._handle_dtype_to_regex(sampling_params)
        data: dict[str, Any] = {
            "text": s.text_,
            "sampling_params": {
                "skip_special_tokens": global_config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
                **sampling_params.to_srt_kwargs(),
            },
        }
        for key in (*_LOGPROB_KEYS, "return_text_in_logprobs"):
            if (value := getattr(sampling_params, key, None)) is not None:
                data[key] = value
        self._add_images(s, data)
        return data

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """SGLang's `select` sends by this."""
        self._add_images(s, data)
        return self._request(data)

    def commit_lazy_operations(self, s: Any) -> None:
        self._generate_http_request(s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    fill_image = commit_lazy_operations

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        super()._add_images(s, data)
        seat.attach(s, data)

    def generate(self, s: Any, sampling_params: Any) -> seat.Said:
        return seat.generate(s, sampling_params, lambda: _said(self._request(self._payload(s, sampling_params))))

    def generate_stream(self, s: Any, sampling_params: Any) -> Generator[seat.Said, Any, None]:
        return seat.generate_stream(s, sampling_params, lambda: self._stream(self._payload(s, sampling_params)))

    def _stream(self, data: dict[str, Any]) -> Generator[seat.Said, Any, None]:
        chunks = self._run(self._generate(data, stream=True))
        position = 0
        while (chunk := self._run(_next(chunks))) is not None:
            yield chunk["text"][position:], chunk["meta_info"]
            position = len(chunk["text"])


def _said(out: dict[str, Any]) -> seat.Said:
    return out["text"], out["meta_info"]


async def _next(chunks: Any) -> Any:
    return await anext(chunks, None)
