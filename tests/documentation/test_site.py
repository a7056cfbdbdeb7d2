"""The site of docs/ as readers have it: complete, without a third party, with a search that finds.

These tests need the group ``docs``: ``uv run --group docs pytest tests/documentation/test_site.py``.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.packaging.workspace import PACKAGES
from tests.support.browser import Tab

pytest.importorskip("mkdocs", reason="the group `docs` is not installed")
pytest.importorskip("mkdocstrings", reason="the group `docs` is not installed")

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))
MODULES = (
    "ctxdb_core.adapters",
    "ctxdb_core.logs",
    "ctxdb_core.otel",
    "ctxdb_core.prometheus",
    "ctxdb_core.sentry",
    "ctxdb_core.testing.pytest_plugin",
)

pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CONTRIBUTING.md says: a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "scripts/build_docs.py", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site on a server of this test."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def public_modules() -> list[str]:
    """Return all packages, and the modules that are public beside them."""
    found = list(MODULES)
    for member in PACKAGES:
        package = importlib.import_module(member.package)
        found.append(member.package)
        inside = pkgutil.walk_packages(package.__path__, f"{member.package}.")
        found += [info.name for info in inside if info.ispkg and "._" not in info.name]
    return sorted(found)


@pytest.mark.parametrize("module", public_modules())
def test_the_reference_has_every_public_name_of_a_package(site: Path, module: str) -> None:
    page = (site / "reference" / f"{module}.html").read_text(encoding="utf-8")
    described = set(re.findall(r'<h\d id="([\w.]+)"', page))
    names = importlib.import_module(module).__all__
    assert [name for name in names if f"{module}.{name}" not in described] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_guide_is_in_the_site_and_in_its_navigation(site: Path, page: str) -> None:
    html = (site / page).with_suffix(".html")
    assert html.exists()
    start = (site / "index.html").read_text(encoding="utf-8")
    assert f'href="{html.relative_to(site).as_posix()}"' in start or page == "index.md"


def test_llms_txt_names_each_page_and_nothing_that_is_not_there(site: Path) -> None:
    text = (site / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# ctxdb\n\n> ")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", text, re.MULTILINE)
    assert [address for address in listed if not (site / address).exists()] == []
    assert set(PAGES) <= set(listed)


def test_the_text_for_language_models_has_no_hidden_blocks(site: Path) -> None:
    assert "invisible-code" not in (site / "llms-full.txt").read_text(encoding="utf-8")


def test_no_script_of_the_site_names_a_host_that_serves_scripts(site: Path) -> None:
    hosts = ("unpkg.com", "jsdelivr.net", "fonts.googleapis.com", "fonts.gstatic.com")
    for file in [*site.rglob("*.js"), *site.rglob("*.css"), *site.rglob("*.html")]:
        text = file.read_text(encoding="utf-8")
        assert [host for host in hosts if host in text] == [], file


async def search(tab: Tab, words: str) -> str:
    """Type into the search box, and return the address of the first result."""
    # A headless page has no focus of its own, and the box opens when it is focused.
    await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
    await tab.run(
        "(() => { const box = document.querySelector('.md-search__input'); box.focus();"
        f" box.value = {words!r}; box.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}}));"
        " box.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    await tab.until("document.querySelector('.md-search-result__item a') !== null", seconds=60)
    return str(await tab.run("document.querySelector('.md-search-result__item a').href"))


@pytest.mark.parametrize(
    ("words", "page"),
    [("set_rollback_only", "ctxdb_core.html"), ("ContextClosedError", ""), ("SERIALIZABLE", "transactions.html")],
)
async def test_search_finds_a_page_and_asks_no_other_host(address: str, tab: Tab, words: str, page: str) -> None:
    await tab.open(f"{address}/index.html")
    assert page in await search(tab, words)
    assert [url for url in tab.requests() if not url.startswith((address, "data:", "blob:"))] == []
    assert tab.complaints() == []


async def test_search_works_on_files_without_a_server(site: Path, tab: Tab) -> None:
    await tab.open((site / "index.html").as_uri())
    assert await search(tab, "gather_in_new_ctx")


async def test_a_reader_can_switch_to_dark_mode(address: str, tab: Tab) -> None:
    await tab.open(f"{address}/transactions.html")
    for _ in range(3):
        await tab.run("document.querySelector('[data-md-component=palette] label:not([hidden])').click()")
        if await tab.run("document.body.getAttribute('data-md-color-scheme')") == "slate":
            break
    assert await tab.run("getComputedStyle(document.body).colorScheme") == "dark"


async def test_each_block_of_code_can_be_copied(address: str, tab: Tab) -> None:
    await tab.open(f"{address}/transactions.html")
    await tab.until("document.querySelector('.highlight button') !== null")
    blocks, buttons = await tab.run(
        "[document.querySelectorAll('pre > code').length,"
        " document.querySelectorAll('.highlight [data-md-type=copy], .highlight .md-clipboard').length]"
    )
    assert blocks == buttons > 0
