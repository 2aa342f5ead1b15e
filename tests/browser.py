"""Debian's Chromium without a window, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INSTALL = "no Chromium is here; on Debian: apt-get install --no-install-recommends chromium"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--disable-component-update",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Tab:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str):
        self.socket, self.session = socket, session
        self.num = 0
        self.problems: list[str] = []  # exceptions, and what the console or the policy of the page complained of

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self.num += 1
        number = self.num
        await self.socket.send_json({"id": number, "method": method, "params": params, "sessionId": self.session})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            self._note(message)
            if message.get("id") == number and message.get("sessionId") == self.session:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif message.get("method") == "Page.javascriptDialogOpening":
            self.problems.append(f"a dialog: {params['message']}")

    async def ask(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 60) -> Any:
        """Its value once it is true.

        Raises:
            TimeoutError: it never was.
        """
        for _ in range(int(timeout_s / 0.05)):
            if value := await self.ask(expression):
                return value
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{expression}: {await self.ask('document.body.innerText.slice(0, 2000)')}; {self.problems}")

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def look_like(self, width: int, height: int, scale: float = 1, theme: str = "light") -> None:
        """The size of the window, and light or dark."""
        is_mobile = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_mobile
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    async def press(self, key: str, code: int, text: str = "") -> None:
        """A key, as a person presses it."""
        common = {"key": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def shoot(self, path: Path) -> None:
        """A picture of the window, as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """A browser with one tab."""
    assert CHROMIUM is not None, INSTALL
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "about:blank", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )  # fmt: skip
        try:
            assert process.stderr is not None
            async with asyncio.timeout(120):
                async for line in process.stderr:
                    if b"DevTools listening on " in line:
                        address = line.decode().split("DevTools listening on ")[1].strip()
                        break
            drain = asyncio.create_task(process.stderr.read())
            async with (
                aiohttp.ClientSession() as client,
                client.ws_connect(address, max_msg_size=0) as socket,
            ):
                root = Tab(socket, "")
                target = await _root_call(root, "Target.createTarget", url="about:blank")
                attached = await _root_call(root, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
                tab = Tab(socket, attached["sessionId"])
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                yield tab
            drain.cancel()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _root_call(root: Tab, method: str, **params: Any) -> dict[str, Any]:
    root.num += 1
    await root.socket.send_json({"id": root.num, "method": method, "params": params})
    while True:
        message = json.loads((await root.socket.receive(timeout=60)).data)
        if message.get("id") == root.num and "sessionId" not in message:
            return message["result"]
