"""Server-sent events: a viewer who is slow skips, one who is stuck is dropped, and nothing is kept for either."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

STUCK_S = 30.0  # a viewer who takes nothing for so long is gone, as a sleeping laptop is


def event(name: str, value: Any, id: str = "") -> bytes:
    """One event with a JSON value; never more than one line of data, whatever the value holds."""
    try:
        data = orjson.dumps(value)
    except (TypeError, ValueError):  # half a surrogate pair in what a client sent
        data = json.dumps(value).encode()
    return b"event: %b\n%bdata: %b\n\n" % (name.encode(), f"id: {id}\n".encode() if id else b"", data)


class EventStream(Response):
    """What `events` yields, as fast as the viewer takes it: the generator is asked for more only then."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], stuck_s: float = STUCK_S):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.stuck_s = stuck_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in events:
                # A server without backpressure would buffer for ever; those of SGLang wait here for who is slow.
                message = {"type": "http.response.body", "body": part, "more_body": True}
                try:
                    async with asyncio.timeout(
                        self.stuck_s
                    ):  # `wait_for` of Python 3.11 may swallow that the viewer left
                        await send(message)
                except TimeoutError:
                    return
            await send({"type": "http.response.body", "body": b""})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
