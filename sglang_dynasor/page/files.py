"""What a browser loads: one page, its style and its scripts. They are the same on every server and say nothing of one."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

PAGE = "/dynasor"
FOLDER = f"{PAGE}/page/"
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, and no way to make HTML of a text.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """By path: the bytes and their media type."""
    found = {
        f"{FOLDER}{file.name}": (file.read_bytes(), MEDIA_TYPES[file.name.rpartition(".")[2]])
        for file in files("sglang_dynasor.page").joinpath("static").iterdir()
        if file.name.rpartition(".")[2] in MEDIA_TYPES
    }
    found[PAGE] = found.pop(f"{FOLDER}page.html")
    return found


def page_file(path: str) -> Response:
    """The file at this path; 404 where there is none."""
    if path not in page_files():
        return Response(status_code=404)
    content, media_type = page_files()[path]
    return Response(content, media_type=media_type, headers=HEADERS)


class OpenPage:
    """Serves the page's files before anybody asks for a key: a browser that opens an address sends none. Data want the key."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in page_files():
                await page_file(path)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def serve_file(request: Request) -> Response:
    """The route of the page and of its files."""
    return page_file(request.url.path.removeprefix(request.scope.get("root_path", "")))
