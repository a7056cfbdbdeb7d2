"""``ctxdb-demo --watch``: the inspector over an application under load, with faults to be switched on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.browser import Tab
from tests.support.server import http_client

from ctxdb_pgstatus.testing import postgres_is_available

COMMAND = Path(sys.executable).with_name("ctxdb-demo")
TIMEOUT_SECONDS = 60

pytestmark = [
    pytest.mark.skipif(not postgres_is_available(), reason="there is no embedded PostgreSQL for this platform"),
    pytest.mark.skipif(os.name != "posix", reason="signals and processes as POSIX has them"),
]


@asynccontextmanager
async def watched(*options: str) -> AsyncIterator[str]:
    """Start the command, yield its address, and end it by Ctrl-C; it must have nothing to complain of."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, "--watch", *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("Watch it on http://127.0.0.1:"), line
        yield line.split()[3].removesuffix("/_ctxdb/")
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        _, complaints = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in complaints, complaints.decode()
    assert b"nothing is left behind" in complaints


class Watched:
    """What the page and its buttons ask for."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def switch(self, fault: str, *, on: bool) -> None:
        response = await self.client.post(f"/_watch/faults/{fault}", json={"on": on})
        assert response.status_code == 204

    async def state(self) -> Any:
        return (await self.client.get("/_watch/state.json")).json()

    async def data(self) -> Any:
        return (await self.client.get("/_ctxdb/units.json")).json()

    async def until(self, condition: Any) -> None:
        """Wait until what the inspector shows fulfils `condition`."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not condition(await self.data()):
                await asyncio.sleep(0.05)


def units(data: Any, request: str) -> list[Any]:
    return [unit for unit in data["units"] if unit["request"] == request]


async def test_each_fault_is_shown_by_the_inspector() -> None:
    async with watched() as url, http_client(url) as client:
        watch = Watched(client)
        faults = (await watch.state())["faults"]
        assert faults == dict.fromkeys(("slow_reader", "leak", "failing_commit", "killed_backend"), False)
        # The load, without any fault.
        await watch.until(lambda data: "committed" in {unit["outcome"] for unit in units(data, "GET /accounts")})
        for fault in faults:
            await watch.switch(fault, on=True)
        assert set((await watch.state())["faults"].values()) == {True}
        await watch.until(lambda data: any(hold["leaked"] for unit in data["units"] for hold in unit["holds"]))
        await watch.until(
            lambda data: any(unit["outcome"] == "commit failed" for unit in units(data, "POST /transfers"))
        )
        await watch.until(
            lambda data: any(
                unit["ended"] is None and all(hold["returned"] for hold in unit["holds"])
                for unit in units(data, "GET /accounts/alice/statement")
            )
        )
        await watch.until(lambda data: "terminat" in str([unit["error"] for unit in data["units"]]))
        for fault in faults:
            await watch.switch(fault, on=False)
        await watch.until(
            lambda data: (
                not any(hold["returned"] is None and hold["leaked"] for unit in data["units"] for hold in unit["holds"])
            )
        )
        assert (await client.post("/_watch/faults/unheard-of", json={"on": True})).status_code == 404
        headers = {"sec-fetch-site": "cross-site"}
        response = await client.post("/_watch/faults/leak", json={"on": True}, headers=headers)
        assert response.status_code == 403
        # Ctrl-C comes while a fault is on.
        await watch.switch("leak", on=True)


async def test_the_buttons_are_on_the_inspectors_page(tab: Tab) -> None:
    async with watched("--database-url", "sqlite://") as url, http_client(url) as client:
        await tab.open(f"{url}/")
        await tab.until("document.querySelectorAll('.unit').length > 0")
        buttons = "[...document.querySelectorAll('#watch button')]"
        assert await tab.run(f"{buttons}.map(each => each.innerText)") == [
            "slow reader", "leak by a bad handler", "failing commit",
        ]  # fmt: skip
        press = "document.querySelector('[data-fault=leak]')"
        await tab.run(f"{press}.click()")
        await tab.until(f"{press}.getAttribute('aria-pressed') === 'true'")
        await tab.until("document.querySelector('#trouble').innerText.includes('leak:')")
        await tab.run(f"{press}.click()")
        await tab.until(f"{press}.getAttribute('aria-pressed') === 'false'")
        assert not (await Watched(client).state())["faults"]["leak"]
        # By the keyboard alone.
        await tab.run(f"{press}.focus()")
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if kind == "keyDown" else {}
            await tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, **text)
        await tab.until(f"{press}.getAttribute('aria-pressed') === 'true'")
        # With a fault switched on, in light and in dark, and on a phone.
        for scheme in ("light", "dark"):
            await tab.prefer_colors(scheme)
            assert await tab.least_contrast("#watch h2, #watch button, h1, #held td, .unit span") >= 4.5, scheme
        await tab.call("Emulation.setDeviceMetricsOverride", width=375, height=700, deviceScaleFactor=1, mobile=True)
        assert await tab.run("document.documentElement.scrollWidth") <= 375
        assert tab.complaints() == []


async def test_the_hosts_of_a_cluster_are_told_and_change_with_a_failover() -> None:
    async with watched("--cluster") as url, http_client(url) as client:
        watch = Watched(client)

        def roles(state: Any) -> list[str]:
            return [host["role"] for host in state["hosts"]]

        async def until_roles(*wanted: str) -> None:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while roles(await watch.state()) != list(wanted):
                    await asyncio.sleep(0.05)

        await until_roles("master", "replica", "replica")
        await watch.until(lambda data: "committed" in {unit["outcome"] for unit in units(data, "POST /payments")})
        # Payments go to the master, and are read from a replica then.
        await watch.until(lambda data: len({pool["name"] for pool in data["pools"]}) >= 2)
        await watch.switch("fail_over", on=True)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while roles(await watch.state())[0] != "replica" or "master" not in roles(await watch.state()):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("option", [["--serve"], ["--framework", "litestar"]])
async def test_watch_refuses_an_option_that_it_cannot_be_combined_with(option: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(COMMAND, "--watch", *option, stderr=asyncio.subprocess.PIPE)
    _, complaint = await process.communicate()
    assert process.returncode == 2
    assert b"--watch runs on fastapi until Ctrl-C" in complaint
