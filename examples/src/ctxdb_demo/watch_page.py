"""The inspector's page with buttons for the demo's faults above it, and a table of hosts where there are several."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from ctxdb_demo.faults import Fault

__all__ = ["WatchPage"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Any, Receive, Send], Awaitable[None]]

_STYLE = """
#watch { margin: .8rem 0 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 8px; }
#watch { background: var(--card); }
#watch h2 { margin: 0 0 .4rem; } #watch div { display: flex; flex-wrap: wrap; gap: .5rem; }
#watch button[aria-pressed=true] { background: var(--bad); border-color: var(--bad); color: var(--card); }
#watch table { margin-top: .6rem; }
"""

_SCRIPT = """
(() => {
  const bar = document.getElementById("watch"), hosts = bar.querySelector("tbody");
  const cell = text => { const made = document.createElement("td"); made.textContent = text; return made; };
  async function show() {
    const state = await (await fetch("/_watch/state.json")).json();
    for (const button of bar.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(state.faults[button.dataset.fault]));
    bar.querySelector("table").hidden = state.hosts.length === 0;
    hosts.replaceChildren(...state.hosts.map(host => {
      const row = document.createElement("tr");
      row.append(...[host.name, host.host, host.role, host.lag].map(cell));
      return row;
    }));
  }
  bar.addEventListener("click", async event => {
    const button = event.target.closest("button");
    if (button === null) return;
    const body = JSON.stringify({ on: button.getAttribute("aria-pressed") !== "true" });
    const headers = { "content-type": "application/json" };
    await fetch(`/_watch/faults/${button.dataset.fault}`, { method: "POST", headers, body });
    await show();
  });
  setInterval(() => show().catch(() => {}), 1000);
  show();
})();
"""


class WatchPage:
    """An ASGI application: the inspector, with the buttons on its page.

    Args:
        inspector: the inspector.
        faults: what there is a button for, by name.
    """

    def __init__(self, inspector: App, faults: Mapping[str, Fault]) -> None:
        self._inspector = inspector
        buttons = "".join(
            f'<button type="button" data-fault="{html.escape(name)}" aria-pressed="false" '
            f'title="{html.escape(fault.description)}">{html.escape(fault.title)}</button>'
            for name, fault in faults.items()
        )
        bar = (
            f'<section id="watch" aria-labelledby="watch-title"><style>{_STYLE}</style><h2 id="watch-title">Faults</h2>'
            f'<div>{buttons}</div><table hidden><thead><tr><th scope="col">Host</th><th scope="col">Address</th>'
            '<th scope="col">Role</th><th scope="col">Behind by</th></tr></thead><tbody></tbody></table>'
            f"<script>{_SCRIPT}</script></section>"
        )
        self._bar = bar.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).strip("/")
        if scope["type"] != "http" or path != "":
            await self._inspector(scope, receive, send)
            return
        started: list[Message] = []

        async def send_page(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
                return
            body = message["body"].replace(b"</header>", b"</header>" + self._bar, 1)
            (start,) = started
            await send({**start, "headers": [_changed(name, value, body) for name, value in start["headers"]]})
            await send({**message, "body": body})

        await self._inspector(scope, receive, send_page)


def _changed(name: bytes, value: bytes, body: bytes) -> tuple[bytes, bytes]:
    if name == b"content-length":
        return name, str(len(body)).encode()
    if name == b"content-security-policy":
        # The page's policy lets nothing run that it does not name.
        for directive, content in ((b"style-src ", _STYLE), (b"script-src ", _SCRIPT)):
            value = value.replace(directive, directive + _hash(content) + b" ")
    return name, value


def _hash(content: str) -> bytes:
    return b"'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()) + b"'"
