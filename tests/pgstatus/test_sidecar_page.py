"""The status page of the sidecar in a browser, and the `History` of lags and changes that it shows."""

from __future__ import annotations

import re
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.support.browser import PICTURES, Tab
from tests.support.sidecar import START, FakeMonitor, cluster, dead, lagging_history, master, replica, serve_sidecar

from ctxdb_pgstatus import HostStatus
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import Change, History, changes_between
from ctxdb_pgstatus.sidecar.page import render

TEXTS = "h1, h2, p, th, .badge, .error, .warn, li, footer, footer a, td.number"


class Structure(HTMLParser):
    """Checks that each element of a document is closed, in the right order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_cluster(history: History | None = None) -> tuple[SidecarApp, FakeMonitor]:
    history = history or lagging_history("n2", "n3")
    monitor = FakeMonitor(
        cluster(
            master("n1.example"),
            replica("n2"),
            replica("n3", by_time=False),
            dead("n4", "ConnectionRefusedError: connection refused"),
            master="n1.example",
        )
    )
    before = cluster(master("n1.example"), replica("n2"), replica("n3"), replica("n4"), master="n1.example")
    history.note(before, monitor.status)
    app = SidecarApp(history, poll_interval=1.0)
    app.monitor = monitor
    return app, monitor


async def picture(tab: Tab, name: str) -> None:
    if PICTURES:
        (Path(PICTURES) / f"{name}.png").write_bytes(await tab.screenshot())


async def test_the_page_shows_hosts_roles_lag_and_changes(tab: Tab) -> None:
    app, _ = a_cluster()
    async with serve_sidecar(app) as url:
        await tab.open(url)
        rows = await tab.run(
            "Object.fromEntries([...document.querySelectorAll('tr[data-host]')]"
            ".map(row => [row.dataset.host, row.innerText]))"
        )
        assert list(rows) == ["n1.example", "n2", "n3", "n4"]
        assert "master" in rows["n1.example"]
        assert "replica" in rows["n2"]
        assert "5 ms" in rows["n2"]
        assert "6,193 ms" in rows["n3"]
        assert "does not answer" in rows["n4"]
        assert "connection refused" in rows["n4"]
        assert "n1.example is the master; 1 of 4" in await tab.run("document.querySelector('#summary').innerText")
        assert "n4 does not answer" in await tab.run("document.querySelector('#changes li').innerText")
        assert "n1.example" in await tab.run("document.title")
        # Each replica has a plot that is really drawn: a line on both sides of the time when its lag was not known.
        drawn = await tab.run(
            "[...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('polyline')]"
            ".map(line => line.getBBox().width > 20 && line.getBBox().height > 5"
            " && getComputedStyle(line).stroke !== 'none'))"
        )
        assert drawn == [[True, True], [True, True]]
        await picture(tab, "light")


async def test_the_page_is_readable_in_light_and_in_dark(tab: Tab) -> None:
    app, _ = a_cluster()
    async with serve_sidecar(app) as url:
        grounds = []
        for scheme in ("light", "dark"):
            await tab.prefer_colors(scheme)
            await tab.open(url)
            grounds.append(await tab.run("getComputedStyle(document.body).backgroundColor"))
            # WCAG 2.1, level AA, asks for a contrast of 4.5 (criterion 1.4.3).
            assert await tab.least_contrast(TEXTS) >= 4.5, scheme
            await picture(tab, scheme)
    assert grounds == ["rgb(246, 247, 249)", "rgb(18, 22, 28)"]


async def test_the_page_follows_the_cluster_and_keeps_the_last_state_without_the_sidecar(tab: Tab) -> None:
    app, monitor = a_cluster()
    async with serve_sidecar(app) as url:
        await tab.open(url)
        monitor.status = cluster(dead("n1.example"), master("n2"), replica("n3"), master="n2")
        await tab.until("document.title.startsWith('n2')")
        assert "n2 is the master" in await tab.run("document.querySelector('#summary').innerText")
        assert await tab.run("getComputedStyle(document.querySelector('#stale')).display") == "none"
    await tab.until("getComputedStyle(document.querySelector('#stale')).display !== 'none'")
    assert "n2 is the master" in await tab.run("document.querySelector('#summary').innerText")


async def test_the_page_loads_nothing_but_itself(tab: Tab) -> None:
    app, _ = a_cluster()
    async with serve_sidecar(app) as url:
        await tab.open(url)
        await tab.call("Network.setCacheDisabled", cacheDisabled=True)
        await tab.until("performance.getEntriesByType('resource').length > 0")
        assert {each for each in tab.requests() if not each.startswith("data:")} == {f"{url}/"}
        assert tab.complaints() == []


async def test_the_page_fits_a_narrow_screen(tab: Tab) -> None:
    app, _ = a_cluster()
    async with serve_sidecar(app) as url:
        await tab.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        await tab.open(url)
        # A table that is too wide scrolls within the page, which does not scroll itself.
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth")
        await picture(tab, "narrow")


async def test_errors_and_names_of_hosts_are_shown_as_text_not_as_html(tab: Tab) -> None:
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    app, monitor = a_cluster(History())
    monitor.status = cluster(master("n1", error=evil), replica("'\"><b>n2</b>"), master="n1")
    async with serve_sidecar(app) as url:
        await tab.open(url)
        assert evil in await tab.run("document.querySelector('.error').innerText")
        assert await tab.run("document.querySelectorAll('main img, main script, main b').length") == 0
        assert "evil" not in await tab.run("document.title")


async def test_the_page_says_so_until_each_host_was_asked(tab: Tab) -> None:
    async with serve_sidecar(SidecarApp(History())) as url:
        await tab.open(url)
        assert "for the first time" in await tab.run("document.querySelector('#summary').innerText")
        assert tab.complaints() == []


def test_the_page_is_well_formed() -> None:
    app, monitor = a_cluster()
    structure = Structure()
    structure.feed(render(monitor.status, app._history, 1000, 1.0))
    assert structure.open == []


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        (master("n2", fault="stale"), "claims to be master"),
        (master("n2", fault="rival"), "second master"),
        (replica("n2", fault="stranger"), "another cluster&#x27;s"),
        (replica("n2", fault="shared_name"), "several servers"),
        (replica("n2", possible_dead=True), "replica, does not answer now"),
        (dead("n2"), "does not answer"),
    ],
)
def test_the_page_shows_the_fault_of_a_host_and_that_it_may_be_dead(host: HostStatus, shown: str) -> None:
    page = render(cluster(master("n1"), host), History(), 1000, 1.0)
    assert f">{shown}</span>" in page


def test_a_replica_whose_lag_was_never_known_has_an_empty_plot() -> None:
    history = History()
    status = cluster(replica("n1", lag_ms=None), master=None)
    history.add(status)
    page = render(status, history, 1000, 1.0)
    assert "<svg" in page
    assert "<polyline" not in page
    assert "There is no master" in page


def test_samples_reach_back_as_far_as_the_plots() -> None:
    history = lagging_history("n1", minutes=20)
    samples = history.samples("n1")
    assert samples[-1].at - samples[0].at == timedelta(minutes=5)


def test_samples_from_before_the_clock_was_set_back_are_forgotten() -> None:
    history = lagging_history("n1")
    history.add(cluster(replica("n1"), at=START - timedelta(hours=1)))
    assert [sample.at for sample in history.samples("n1")] == [START - timedelta(hours=1)]


def test_samples_of_a_host_that_has_left_the_list_are_forgotten() -> None:
    history = lagging_history("n1", "n2")
    history.add(cluster(replica("n2"), at=START + timedelta(hours=1)))
    assert history.samples("n1") == ()


def test_a_status_is_sampled_once() -> None:
    history = History()
    status = cluster(replica("n1"))
    history.add(status)
    history.add(status)
    assert len(history.samples("n1")) == 1


def test_the_sample_of_a_dead_host_has_no_lag() -> None:
    history = History()
    history.add(cluster(dead("n1")))
    assert [sample.lag_ms for sample in history.samples("n1")] == [None]


def test_the_changes_of_a_failover_are_described_in_words() -> None:
    before = cluster(master("n1"), replica("n2"), replica("n3"), dead("n4"))
    after = cluster(dead("n1", "no answer"), master("n2"), replica("n3", by_time=False), replica("n4"), master="n2")
    assert changes_between(before, after) == [
        "n1 does not answer: no answer",
        "n2 has become a master",
        "n4 answers as a replica",
        "n2 is the master",
    ]
    assert changes_between(after, after) == []
    assert changes_between(before, cluster(*before.hosts, master=None)) == ["there is no master"]


def test_the_latest_change_comes_first_and_old_ones_are_forgotten() -> None:
    history = History()
    for number in range(50):
        status = cluster(master("n1"), master=f"n{number}", at=START + timedelta(seconds=number))
        history.note(cluster(master("n1"), master=None), status)
    assert history.changes()[0] == Change(START + timedelta(seconds=49), "n49 is the master")
    assert len(history.changes()) == 20
    assert history.changes_in_all == 50


def test_the_page_has_no_style_or_script_without_a_hash_in_its_policy() -> None:
    """The policy names the hashes of the page's style and script, so browsers run no other ones."""
    page = render(None, History(), 1000, 1.0)
    assert len(re.findall(r"<(?:style|script)>", page)) == 2
    assert " style=" not in page
    assert not re.search(r"\son\w+=", page)
