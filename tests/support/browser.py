"""A headless Chromium, spoken to over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.server import http_client
from websockets.asyncio.client import ClientConnection, connect

NEEDED = "CTXDB_BROWSER"
"""The environment variable that makes a missing browser an error: ``CTXDB_BROWSER=needed``."""

PICTURES = os.environ.get("CTXDB_PICTURES")
"""The folder in which tests of pages leave pictures; none are taken without it."""

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find_browser() -> str:
    """Return the browser's path; skip the test if there is none, unless it is said to be needed."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get(NEEDED) == "needed":
            pytest.fail(f"There is no Chromium, and {NEEDED} says that it is needed.")
        pytest.skip("there is no Chromium")
    return found


_CONTRASTS = r"""
(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map(part => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && element.parentElement ? ground(element.parentElement) : color;
  };
  return [...document.querySelectorAll(%s)]
    .filter(element => element.innerText && element.checkVisibility())
    .map(element => {
      const pair = [light(getComputedStyle(element).color), light(ground(element))];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
})()
"""


class Tab:
    """One page of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._connection.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(seconds):
            while not await self.run(script):
                await asyncio.sleep(0.02)

    async def screenshot(self, width: int | None = None, height: int | None = None) -> bytes:
        """Return the page as a PNG; with a size, its upper part."""
        area = {} if width is None else {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=True, **area)
        return base64.b64decode(answer["data"])

    async def prefer_colors(self, scheme: str) -> None:
        """Show pages as a reader sees them whose system is ``"light"`` or ``"dark"``."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def least_contrast(self, selector: str) -> float:
        """Return the lowest contrast, by WCAG's formula, of the texts that are visible and match `selector`."""
        contrasts = await self.run(_CONTRASTS % json.dumps(selector))
        assert contrasts, "there is no text"
        return float(min(contrasts))

    def requests(self) -> list[str]:
        """Return the URLs that the page has asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[dict[str, Any]]:
        """Return the errors of the page's script, and the browser's complaints about the page."""
        return [event for event in self.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


@asynccontextmanager
async def browser(folder: Path, width: int = 1280, height: int = 800) -> AsyncIterator[Tab]:
    """Start a browser with a profile of its own in `folder`, and yield an empty tab."""
    arguments = (*_OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank")
    process = await asyncio.create_subprocess_exec(
        find_browser(),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _port(folder / "DevToolsActivePort", process)
        async with connect(await _address(port), max_size=None, proxy=None) as connection:
            tab = Tab(connection)
            yield tab
            await tab.call("Browser.close")
        await process.wait()
    finally:
        if process.returncode is None:
            # The browser's helper processes are in its session, and end with it.
            os.killpg(process.pid, 9)
            await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None, "the browser has ended"
            if file.exists() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            await asyncio.sleep(0.02)


async def _address(port: int) -> str:
    """Return the DevTools address of the first tab."""
    async with asyncio.timeout(20), http_client(f"http://127.0.0.1:{port}") as client:
        while True:
            for target in (await client.get("/json/list")).json():
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
            await asyncio.sleep(0.02)
