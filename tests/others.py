"""HTTP servers of tests that stand for somebody else's."""

from __future__ import annotations

from http.server import ThreadingHTTPServer


class OtherServer(ThreadingHTTPServer):
    """One that takes in as many as ask at once: beyond Python's 5 the kernel drops who connects, and seconds pass before it asks again."""

    request_queue_size = 128
