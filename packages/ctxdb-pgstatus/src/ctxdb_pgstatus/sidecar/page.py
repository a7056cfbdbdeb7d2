"""The status page of the sidecar: one HTML document, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from importlib.metadata import version

from ctxdb_pgstatus.lsn import format_lsn
from ctxdb_pgstatus.sidecar.history import Change, History, LagSample
from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus

__all__ = ["HEADERS", "render"]

_WIDTH = 240
_HEIGHT = 44
# The least and the most seconds between two requests of the page for its present content.
_REFRESH_LIMITS = (1.0, 10.0)

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --text: #1b2330; --quiet: #5d6878; --line: #dde2e9;
  --good: #14793f; --warn: #96610a; --bad: #bf2233; --plot: #2563c9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161c; --card: #1b2129; --text: #e6eaf0; --quiet: #9aa6b6; --line: #303946;
    --good: #4fc983; --warn: #e0ab4c; --bad: #ff7481; --plot: #6ba3ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1.5rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.quiet { color: var(--quiet); } .good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow-x: auto; }
#summary { font-size: 1.1rem; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .6rem .9rem; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
thead th { font-size: .8rem; font-weight: 600; color: var(--quiet); white-space: nowrap; }
tbody th { font-weight: 600; border-bottom: 1px solid var(--line); } tbody tr:last-child th { border-bottom: 0; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.badge { display: inline-block; border: 1px solid currentcolor; border-radius: 1rem; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; white-space: nowrap; }
.small { font-size: .8rem; }
.error { font-size: .85rem; font-weight: 400; max-width: 26rem; overflow-wrap: anywhere; }
svg { display: block; width: 15rem; height: 2.75rem; }
svg polyline { fill: none; stroke: var(--plot); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg circle { fill: var(--plot); }
svg .limit { stroke: var(--warn); stroke-width: 1; stroke-dasharray: 4 4; vector-effect: non-scaling-stroke; }
svg .base { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
ol { list-style: none; margin: 0; padding: .4rem .9rem; } li { padding: .2rem 0; overflow-wrap: anywhere; }
time { font-variant-numeric: tabular-nums; }
footer { padding: 1.5rem 1.25rem; font-size: .85rem; } a { color: inherit; }
#stale { display: none; } .stale #stale { display: inline; } .stale main { opacity: .55; }
"""

# The page requests itself, and replaces its main part. So the last state stays readable while the sidecar is down,
# which a reload would replace by the browser's error page.
_SCRIPT = """
const pause = 1000 * document.body.dataset.refresh;
async function refresh() {
  try {
    const response = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    document.title = fresh.title;
    document.body.classList.remove("stale");
  } catch {
    document.body.classList.add("stale");
  }
  setTimeout(refresh, pause);
}
setTimeout(refresh, pause);
"""


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


HEADERS = (
    (
        b"content-security-policy",
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_hash(_STYLE)}; "
        f"script-src {_hash(_SCRIPT)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'".encode(),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
"""The header fields of the page, by which browsers run its own script alone, and none out of the name of a host."""


def render(status: ClusterStatus | None, history: History, limit_ms: int, refresh: float) -> str:
    """Return the page.

    Args:
        status: the status of the cluster; ``None`` as long as nothing is known.
        history: the lags and changes of the last minutes.
        limit_ms: up to which lag in milliseconds a replica is in sync by time.
        refresh: how many seconds pass until the page requests its present content.
    """
    seconds = min(max(refresh, _REFRESH_LIMITS[0]), _REFRESH_LIMITS[1])
    title, content = ("starting", _starting()) if status is None else _cluster(status, history, limit_ms)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · PostgreSQL cluster</title>
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="{seconds:.0f}"></noscript>
<style>{_STYLE}</style>
</head>
<body data-refresh="{seconds:g}">
<header><h1>PostgreSQL cluster</h1><span id="stale" class="bad" role="status">The sidecar does not answer: this is \
how it was.</span></header>
<main>{content}</main>
<footer class="quiet">ctxdb-pgstatus {escape(version("ctxdb-pgstatus"))} · <a href="/hosts">hosts</a> · \
<a href="/health">health</a> · <a href="/metrics">metrics</a></footer>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _starting() -> str:
    return '<p id="summary" class="warn">The hosts are being asked for the first time.</p>'


def _cluster(status: ClusterStatus, history: History, limit_ms: int) -> tuple[str, str]:
    alive = sum(host.alive for host in status.hosts)
    if status.master is None:
        title, kind, text = "no master", "bad", "There is no master: the cluster takes no writes."
    elif alive < len(status.hosts):
        title, kind = status.master, "warn"
        away = len(status.hosts) - alive
        do = "does" if away == 1 else "do"
        text = f"{status.master} is the master; {away} of {len(status.hosts)} hosts {do} not answer."
    else:
        title, kind, text = status.master, "good", f"{status.master} is the master; all hosts answer."
    minutes = history.span.total_seconds() / 60
    rows = "".join(_row(host, status, history, limit_ms) for host in status.hosts)
    return title, (
        f'<p id="summary" class="{kind}">{escape(text)}</p>'
        '<div class="card"><table><thead><tr><th scope="col">Host</th><th scope="col">Role</th>'
        f'<th scope="col">Lag</th><th scope="col">Lag, last {minutes:g} minutes</th><th scope="col">WAL position</th>'
        '<th scope="col">Since (UTC)</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"{_changes(history.changes())}"
        f'<p class="quiet">As of {_time(status.at, datetime.now(UTC))} UTC. The dashed line in the plots is the limit '
        f"of {limit_ms} ms, up to which a replica is in sync by time.</p>"
    )


def _row(host: HostStatus, status: ClusterStatus, history: History, limit_ms: int) -> str:
    kind, role = _role(host, status)
    when = "last error: " if host.alive else ""
    error = f'<div class="error quiet">{when}{escape(host.error)}</div>' if host.error else ""
    is_replica = host.alive and host.role == "replica"
    plot = _plot(host.host, history.samples(host.host), history.span, limit_ms) if is_replica else ""
    position = ""
    if host.alive and host.position is not None:
        timeline = "" if host.timeline is None else f'<div class="quiet">timeline {host.timeline}</div>'
        position = format_lsn(host.position) + timeline
    return (
        f'<tr data-host="{escape(host.host)}"><th scope="row">{escape(host.host)}{error}</th>'
        f'<td><span class="badge {kind}">{escape(role)}</span></td>'
        f'<td class="number">{_lag(host) if is_replica else ""}</td><td>{plot}</td>'
        f'<td class="number">{position}</td>'
        f'<td class="number">{_time(host.since, status.at)}</td></tr>'
    )


def _role(host: HostStatus, status: ClusterStatus) -> tuple[str, str]:
    if not host.alive:
        return "bad", "does not answer"
    if host.fault is not None:
        return "bad", _FAULTS[host.fault]
    if host.possible_dead:
        return "warn", f"{host.role or 'unknown'}, does not answer now"
    if host.host == status.master:
        return "good", "master"
    if host.role == "master":
        return "bad", "claims to be master"
    return ("good" if host.in_sync_by_time or host.in_sync_by_bytes else "warn"), "replica"


_FAULTS: dict[Fault, str] = {
    "stranger": "another cluster's",
    "shared_name": "several servers",
    "rival": "second master",
    "stale": "claims to be master",
}


def _lag(host: HostStatus) -> str:
    in_time = _measure(None if host.lag_ms is None else f"{host.lag_ms:,} ms", in_sync=host.in_sync_by_time)
    in_bytes = _measure(None if host.lag_bytes is None else f"{host.lag_bytes:,} bytes", in_sync=host.in_sync_by_bytes)
    return f"<div>{in_time}</div><div>{in_bytes}</div>"


def _measure(text: str | None, *, in_sync: bool) -> str:
    if text is None:
        return '<span class="quiet">unknown</span>'
    return text if in_sync else f'<span class="warn">{text}</span>'


def _plot(name: str, samples: Sequence[LagSample], span: timedelta, limit_ms: int) -> str:
    """Return a plot of the lag over time as an SVG, with a line for each stretch over which the lag was known."""
    if not samples:
        return ""
    end = samples[-1].at
    highest = max((sample.lag_ms or 0 for sample in samples), default=0)
    top = max(highest, limit_ms, 1) * 1.15

    def across(at: datetime) -> float:
        return _WIDTH * (1 - (end - at) / span)

    def up(lag_ms: float) -> float:
        return _HEIGHT - 2 - (_HEIGHT - 4) * lag_ms / top

    stretches: list[list[str]] = [[]]
    for sample in samples:
        if sample.lag_ms is not None:
            stretches[-1].append(f"{across(sample.at):.1f},{up(sample.lag_ms):.1f}")
        elif stretches[-1]:
            stretches.append([])
    lines = "".join(f'<polyline points="{" ".join(points)}"/>' for points in stretches if len(points) > 1)
    last = samples[-1].lag_ms
    point = "" if last is None else f'<circle cx="{_WIDTH - 2}" cy="{up(last):.1f}" r="2"/>'
    text = escape(f"Lag of {name}: at most {highest:,} ms")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{text}">'
        f"<title>{text}</title>"
        f'<line class="base" x1="0" x2="{_WIDTH}" y1="{up(0):.1f}" y2="{up(0):.1f}"/>'
        f'<line class="limit" x1="0" x2="{_WIDTH}" y1="{up(limit_ms):.1f}" y2="{up(limit_ms):.1f}"/>'
        f'{lines}{point}</svg><div class="quiet small">at most {highest:,} ms</div>'
    )


def _changes(changes: Sequence[Change]) -> str:
    if not changes:
        return '<h2>Last changes</h2><p class="quiet" id="changes">None since the sidecar started.</p>'
    now = datetime.now(UTC)
    items = "".join(f"<li>{_time(each.at, now)} · {escape(each.text)}</li>" for each in changes)
    return f'<h2>Last changes</h2><ol class="card" id="changes">{items}</ol>'


def _time(at: datetime, now: datetime) -> str:
    shown = f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M}"
    return f'<time datetime="{at.isoformat(timespec="seconds")}">{shown}</time>'
