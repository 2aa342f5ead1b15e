"""A server's chat endpoint: what it is, one request to it, and what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self, cast

import httpx

from sglang_dynasor.errors import ConfigError

CONNECT_S = 10.0
PAUSES_S = (1.0, 2.0)  # before a request is sent again, of which nothing came back; then the server counts as gone
SHOWN_CHARS = 300  # of what a server says


class GoneError(Exception):
    """The server no longer answers."""


class RefusedError(Exception):
    """The server answered that it will not do this."""

    def __init__(self, status: int, message: str):
        super().__init__(f"HTTP {status}: {message}")
        self.is_about_one = status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)  # request alone


@dataclass(frozen=True, slots=True)
class Choice:
    """One text that came back."""

    text: str  # without a thought that the server keeps apart
    num_tokens: int
    is_cut: bool  # by its length
    record: Mapping[str, Any] | None = None  # of a program


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back of one request."""

    choices: tuple[Choice, ...]
    num_tokens: int  # generated, as the server says
    latency_s: float
    num_requests: int  # that it took
    is_estimated: bool  # the tokens of each choice: the server says only those of all together


@dataclass(frozen=True, slots=True)
class Chat:
    """An OpenAI-compatible chat endpoint. Make it with `connect`."""

    client: httpx.AsyncClient
    url: str
    model: str
    is_sglang: bool  # it says the tokens of each choice
    has_scheduler: bool  # it was started with --scheduler dynasor

    @classmethod
    async def connect(cls, client: httpx.AsyncClient, url: str, model: str | None) -> Self:
        """Find out what the server is.

        Args:
            url: http://HOST:PORT, with or without /v1.
            model: the name to send; None: the first that the server says it has.

        Raises:
            ConfigError: nobody answers there, or not as a chat endpoint does.
        """
        base = url.rstrip("/").removesuffix("/v1")
        try:
            models = await client.get(f"{base}/v1/models", timeout=CONNECT_S)
            status = await client.get(f"{base}/dynasor/status", timeout=CONNECT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"--url={url} does not answer: {str(error) or type(error).__name__}; give http://HOST:PORT of a running server"
            ) from None
        if models.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise ConfigError(f"--url={url} says HTTP {models.status_code}; give its key with --api-key")
        found = _json(models)
        listed = cast("list[dict[str, Any]]", found.get("data") or [])
        if not model and (models.status_code != HTTPStatus.OK or not listed):
            raise ConfigError(
                f"--url={url} is no OpenAI-compatible server: its /v1/models says HTTP {models.status_code}, {models.text[:80]!r}; if it is one, give --model"
            )
        is_sglang = any(one.get("owned_by") == "sglang" for one in listed)
        return cls(client, base, model or listed[0]["id"], is_sglang, is_sglang and status.status_code == HTTPStatus.OK)

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one request.

        Raises:
            RefusedError: the server will not do it.
            GoneError: it did not answer, also not when asked again.
            ConfigError: what came back is no answer of a chat endpoint.
        """
        sent = {"model": self.model, **body, **({"return_meta_info": True} if self.is_sglang else {})}
        num_requests = 0
        while True:
            num_requests += 1
            began_s = time.perf_counter()
            response = await self._post(sent)
            if isinstance(response, httpx.Response):
                break
            if num_requests > len(PAUSES_S):
                raise GoneError(response)
            await asyncio.sleep(PAUSES_S[num_requests - 1])
        latency_s = time.perf_counter() - began_s
        if response.status_code != HTTPStatus.OK:
            raise RefusedError(response.status_code, _said(response))
        return read_reply(_json(response), latency_s, num_requests)

    async def _post(self, body: Mapping[str, Any]) -> httpx.Response | str:
        """The response; or, where the server did not give one or has failed, why."""
        try:
            response = await self.client.post(f"{self.url}/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return f"HTTP {response.status_code}: {_said(response)}"
        return response


def read_reply(answer: Mapping[str, Any], latency_s: float, num_requests: int = 1) -> Reply:
    """What a chat completion says.

    Raises:
        ConfigError: it has no choices, or no `usage`.
    """
    choices: Sequence[Mapping[str, Any]] = answer.get("choices") or []
    usage: Mapping[str, Any] = answer.get("usage") or {}
    total = usage.get("completion_tokens")
    if not choices or not isinstance(total, int):
        raise ConfigError(
            f"the server's answer has no {'usage.completion_tokens' if choices else 'choices'}, without which nothing can be "
            f"counted: {str(dict(answer))[:SHOWN_CHARS]}"
        )
    metas: list[Mapping[str, Any]] = [choice.get("meta_info") or {} for choice in choices]
    tokens: list[Any] = [meta.get("completion_tokens") for meta in metas]
    is_estimated = len(choices) > 1 and not all(isinstance(num, int) for num in tokens)
    if is_estimated or len(choices) == 1:
        tokens = shared(total, [_num_chars(choice) for choice in choices])
    read = (
        Choice(_message(choice).get("content") or "", num, choice.get("finish_reason") == "length", meta.get("dynasor"))
        for choice, meta, num in zip(choices, metas, tokens, strict=True)
    )
    return Reply(tuple(read), total, latency_s, num_requests, is_estimated)


def shared(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in whole parts as `sizes` are to each other; the parts together are `total`."""
    whole, so_far, given = sum(sizes) or 1, 0, 0
    parts: list[int] = []
    for size in sizes:
        so_far += size
        parts.append(total * so_far // whole - given)
        given += parts[-1]
    return parts


def _message(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    return choice.get("message") or {}


def _num_chars(choice: Mapping[str, Any]) -> int:
    message = _message(choice)
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    return 1 + len(str(message.get("content") or "")) + len(str(thought))


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _said(response: httpx.Response) -> str:
    """The message of an error, as servers write it."""
    found = _json(response)
    error = found.get("error", found)
    message = cast("dict[str, Any]", error).get("message", error) if isinstance(error, dict) else error
    return str(message or response.text)[:SHOWN_CHARS]
