"""A headless Chromium, spoken to over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
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
    """One page of the browser, or the browser itself."""

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


class Browser:
    """A browser's process, which several tests share, as it takes long to start. Each tab has a profile of its own.

    Args:
        folder: an empty folder for what the browser stores.
        width: of its windows.
        height: of its windows.
    """

    def __init__(self, folder: Path, width: int = 1280, height: int = 800) -> None:
        self._port_file = folder / "DevToolsActivePort"
        self._process = subprocess.Popen(
            [find_browser(), *_OPTIONS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @asynccontextmanager
    async def tab(self) -> AsyncIterator[Tab]:
        """Open an empty tab with a profile of its own, and throw both away afterwards."""
        port, path = await self._address()
        async with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            browser = Tab(connection)
            profile = (await browser.call("Target.createBrowserContext"))["browserContextId"]
            target = await browser.call("Target.createTarget", url="about:blank", browserContextId=profile)
            page = f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}"
            try:
                # Without a bound: a full queue of events that no test reads would keep back the answer to the closing.
                async with connect(page, max_size=None, max_queue=None, proxy=None) as of_page:
                    yield Tab(of_page)
            finally:
                await browser.call("Target.disposeBrowserContext", browserContextId=profile)

    def end(self) -> None:
        # The browser's helper processes are in its session, and end with it.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def _address(self) -> list[str]:
        """Return the port, and the path of the browser itself, when it has told them."""
        async with asyncio.timeout(60):
            while True:
                assert self._process.poll() is None, "the browser has ended"
                if self._port_file.exists() and len(lines := self._port_file.read_text().splitlines()) == 2:
                    return lines
                await asyncio.sleep(0.02)
