"""Every Python code block of the README files and of docs/ runs, from top to bottom of its page.

How to write a page that runs is in CONTRIBUTING.md, "Documentation".
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from psycopg import sql
from sybil import Document, Example
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser

from ctxdb_pgstatus.testing import EmbeddedPostgres

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("packages/*/README.md")),
    ROOT / "examples" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
MODULE = "documentation_page"

PYTHON_FENCE = re.compile(r"^[ \t>*+\-\d.)]*(?:`{3,}|~{3,})[ \t]*(?:py|\{)", re.MULTILINE | re.IGNORECASE)
NEEDS = re.compile(r"^<!--- needs: (?P<modules>.+) --->$", re.MULTILINE)
HIDDEN_BLOCK = re.compile(r"^[ \t]*<!--+\s*(?:;\s*)?(?:invisible-)?code", re.MULTILINE)
FILE_NAME = re.compile(r"# (?P<path>[\w/-]+\.py)\n")
POSTGRES_URL = re.compile(r"postgresql(?:\+\w+)?://(?:(?P<role>\w+)(?::[^@/\s]*)?@)?[^@/\s]*/(?P<database>\w+)")


class Page:
    """A Markdown page as one Python module, whose blocks may await at top level."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.document = Document.parse(str(path), CodeBlockParser("python", self._run_block))
        # Declarative models and dataclasses look their own module up.
        module = ModuleType(MODULE)
        monkeypatch.setitem(sys.modules, MODULE, module)
        self.document.namespace = vars(module)

    def run(self) -> None:
        """Run the blocks, all that await on one event loop."""
        with asyncio.Runner() as self._runner:
            for example in self.document.examples():
                example.evaluate()

    def _run_block(self, example: Example) -> None:
        if name := FILE_NAME.match(example.parsed):
            # A file of the reader's: a later, hidden block runs it. It lies in the empty folder that the test is in.
            file = Path(name["path"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(example.parsed, encoding="utf-8")
            return
        source = pad(example.parsed, example.line + example.parsed.line_offset)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        if example.namespace.get("annotations") is annotations:
            # An earlier block has imported it from `__future__`, for the whole module.
            flags |= annotations.compiler_flag
        code = compile(source, example.path, "exec", flags=flags, dont_inherit=True)
        result = eval(code, example.namespace)
        if inspect.iscoroutine(result):
            self._runner.run(result)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's files, such as a SQLite database, come and go with its test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def end_of_logging() -> Iterator[None]:
    """Take the root logger back to its state after a page.

    Litestar, for one, has it write each record of each library, which the later tests of the process would do, too.
    """
    root = logging.getLogger()
    level, handlers = root.level, set(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - handlers:
        root.removeHandler(handler)


@pytest.fixture
def servers_for_urls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the PostgreSQL URLs of a page lead to the embedded server: with each role and database that they name.

    The drivers take from the environment what a URL leaves out: here, the port.
    """
    path: Path = request.getfixturevalue("path")
    urls = list(POSTGRES_URL.finditer(path.read_text(encoding="utf-8")))
    if not urls:
        yield ""
        return
    server: EmbeddedPostgres = request.getfixturevalue("postgres_server")
    for variable, value in (("PGHOST", server.host), ("PGPORT", str(server.port)), ("PGUSER", "postgres")):
        monkeypatch.setenv(variable, value)
    databases = sorted({url["database"] for url in urls} - {"postgres"})
    roles = sorted({url["role"] for url in urls} - {None, "postgres"})
    with psycopg.connect(autocommit=True, dbname="postgres") as admin:
        for role in roles:
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN SUPERUSER").format(sql.Identifier(role)))
        for database in databases:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        yield server.host
        for database in databases:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
        for role in roles:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.usefixtures("servers_for_urls")
def test_the_code_of_a_page_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Libraries that a page is about come with the groups `ecosystem` and `competitors`.
    for needs in NEEDS.finditer(path.read_text(encoding="utf-8")):
        for module in needs["modules"].split(", "):
            pytest.importorskip(module, reason=f"{module} is in an optional group")
    Page(path, monkeypatch).run()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_python_block_of_a_page_is_overlooked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(path, monkeypatch)
    blocks = PYTHON_FENCE.findall(page.document.text) + HIDDEN_BLOCK.findall(page.document.text)
    assert len(list(page.document.examples())) == len(blocks), "write ```python, and nothing else on that line"


def test_a_block_that_raises_fails_its_page_at_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# Page\n\n```python\nanswer = 42\n```\n\n<!--- invisible-code-block: python\nawait nothing\n--->\n"
    )
    with pytest.raises(NameError, match="nothing") as caught:
        Page(path, monkeypatch).run()
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (path, 8)


def test_a_block_that_begins_with_the_name_of_a_file_becomes_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.md"
    path.write_text('# Page\n\n=== "Tab"\n\n    ```python\n    # shop/app.py\n    answer = 42\n    ```\n')
    Page(path, monkeypatch).run()
    assert (tmp_path / "shop" / "app.py").read_text() == "# shop/app.py\nanswer = 42\n"


def test_a_python_block_with_attributes_counts_as_overlooked() -> None:
    assert len(PYTHON_FENCE.findall("```python title=app.py\n```\n\n- ~~~Python3\n  ~~~\n\n```sh\n```\n")) == 2
