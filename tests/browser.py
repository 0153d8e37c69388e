"""A real browser for tests of pages: Chromium without a window, driven over its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/; the mouse and the keys are the browser's own input, not made-up events.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SECONDS = 30.0


class Page:
    """One page in a browser of its own.

    Attributes:
        errors: what the page wrote to the console as an error or a warning, and what it threw.
    """

    def __init__(self, address: str, width: int, height: int) -> None:
        self.errors: list[str] = []
        self._address, self._size = address, (width, height)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._count = 0

    async def __aenter__(self) -> Page:
        assert EXECUTABLE is not None
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen([EXECUTABLE, *flags, "about:blank"], stderr=subprocess.DEVNULL, start_new_session=True)
        self._http = aiohttp.ClientSession()
        port = await self._port()
        async with self._http.get(f"http://127.0.0.1:{port}/json/list") as reply:
            target = next(entry for entry in await reply.json() if entry["type"] == "page")
        self._socket = await self._http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.ensure_future(self._read())
        for domain in ("Runtime", "Page", "Log"):
            await self.send(f"{domain}.enable")
        width, height = self._size
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        await self.send("Page.navigate", url=self._address)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.cancel()
        await self._http.close()
        os.killpg(self._process.pid, 9)
        self._process.wait()
        self._folder.cleanup()

    async def _port(self) -> str:
        file = Path(self._folder.name, "DevToolsActivePort")
        for _ in range(int(SECONDS * 20)):
            if file.exists() and (lines := file.read_text().splitlines()):
                return lines[0]
            await asyncio.sleep(0.05)
        raise AssertionError(f"{EXECUTABLE} did not start within {SECONDS} s")

    async def _read(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._replies.pop(event["id"]).set_result(event)
            elif event["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                self.errors.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] in ("error", "warning", "assert"):
                self.errors.append(str(event["params"]["args"]))

    async def send(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        self._count += 1
        reply = self._replies[self._count] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        answer = await asyncio.wait_for(reply, SECONDS)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for a JavaScript expression to be true."""
        for _ in range(int(SECONDS * 20)):
            if await self.value(condition):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true within {SECONDS} s: {condition}")

    async def frame(self) -> None:
        """Wait until what was asked for is drawn."""
        await self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    async def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """``mouseMoved``, ``mousePressed``, ``mouseReleased`` or ``mouseWheel`` at a point of the window."""
        await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        await self.frame()

    async def drag(self, x: float, y: float, to_x: float) -> None:
        await self.mouse("mousePressed", x, y, button="left", clickCount=1)
        await self.mouse("mouseMoved", (x + to_x) / 2, y, button="left", buttons=1)
        await self.mouse("mouseMoved", to_x, y, button="left", buttons=1)
        await self.mouse("mouseReleased", to_x, y, button="left", clickCount=1)

    async def key(self, name: str) -> None:
        text = {"text": name} if len(name) == 1 else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=name)
        await self.frame()

    async def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode((await self.send("Page.captureScreenshot"))["data"]))


def browse(address: str, width: int, height: int, visit: Callable[[Page], Awaitable[None]]) -> None:
    """Open a page, let ``visit`` use it, and check that the page complained of nothing.

    Args:
        address: of the page.
        width: of the window, in pixels, as ``height``.
        height: see ``width``.
        visit: asserts what it wants of the page.
    """

    async def run() -> None:
        async with Page(address, width, height) as page:
            await visit(page)
            assert not page.errors

    asyncio.run(run())
