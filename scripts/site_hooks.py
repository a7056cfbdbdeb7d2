"""What the site of docs/ has beside its Markdown pages: a hook of mkdocs (``hooks:`` in mkdocs.yml).

* The reference: a page for each public package, with all names of its ``__all__``.
* A page for each file of the repository outside of docs/ that a page links to, so that no link leaves the site.
* The navigation: patterns in mkdocs.yml's ``nav`` are replaced by the pages that no other entry names.
* ``llms.txt`` and ``llms-full.txt`` (https://llmstxt.org), and the Markdown of each page beside its HTML.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"

MODULES = (
    "ctxdb_core.adapters",
    "ctxdb_core.logs",
    "ctxdb_core.otel",
    "ctxdb_core.prometheus",
    "ctxdb_core.sentry",
    "ctxdb_core.testing.pytest_plugin",
)
"""What is public beside the packages, which are the folders whose names start with no underscore."""

ORDER = ("core", "starlette", "litestar", "aiohttp", "inspector", "pgstatus")

LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCED = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^(?P=indent)(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
HIDDEN = re.compile(r"[ \t]*<!--.*?-->\n*", re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".cfg": "text"}
LANGUAGES |= {".toml": "toml", ".service": "ini"}

pages_in_markdown: dict[str, str] = {}
"""The text of each page, by its path in the site: what ``llms.txt`` is made of."""


# --- the reference ----------------------------------------------------------------------------------------------------


def public_modules() -> list[tuple[str, Path]]:
    """Return the dotted name and the file of each public module, packages in the order in which people come."""
    found = []
    for name in ORDER:
        source = ROOT / "packages" / f"ctxdb-{name}" / "src"
        for file in sorted(source.rglob("*.py"), key=lambda file: file.as_posix().replace("__init__", "")):
            module = ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
            if (file.name == "__init__.py" or module in MODULES) and "._" not in module:
                found.append((module, file))
    return found


def names_in(file: Path) -> list[str]:
    """Return the names that a module's ``__all__`` lists, without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets):
            return list(ast.literal_eval(node.value))
    raise PluginError(f"{file} has no __all__")


def reference_page(module: str, names: list[str]) -> str:
    """Return the Markdown of a module's page, which mkdocstrings fills in."""
    members = "".join(f"        - {name}\n" for name in names)
    return f"# {module}\n\n::: {module}\n    options:\n      members:\n{members}"


# --- files outside of docs/ -------------------------------------------------------------------------------------------


def page_of(path: str) -> str:
    """Return where the site has a file or folder of the repository, as a path within docs/."""
    if path.startswith(f"{DOCS}/"):
        target = path.removeprefix(f"{DOCS}/")
        return target if target.endswith(".md") else f"{target}/index.md"
    if (ROOT / path).is_dir():
        return f"repository/{path}/README.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def origin_of(source: str) -> str:
    """Return the file of the repository that a page of the site shows, the other way round."""
    return source.removeprefix("repository/") if source.startswith("repository/") else f"{DOCS}/{source}"


def links_in(markdown: str) -> Iterator[re.Match[str]]:
    """Yield the links of a page that lead to files, those in code left out."""
    prose = FENCED.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), markdown)
    yield from LINK.finditer(prose)


def leads_to(link: re.Match[str], origin: str) -> str:
    """Return the file of the repository that a link on the page of `origin` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["target"]))


def text_of(path: str) -> str:
    """Return the Markdown that shows a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        readme = file / "README.md"
        if readme.exists():
            return readme.read_text(encoding="utf-8")
        inside = sorted(entry for entry in file.rglob("*") if entry.is_file() and "__pycache__" not in entry.parts)
        listed = [f"- [{entry.relative_to(file)}]({entry.relative_to(file).as_posix()})" for entry in inside]
        return f"# {path}\n\n" + "\n".join(listed) + "\n"
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * 4
    return f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n"


def pages_outside(files: Files) -> dict[str, str]:
    """Return the pages of files outside of docs/ that other pages lead to, by their paths, with their text."""
    found: dict[str, str] = {}
    todo = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while todo:
        source, markdown = todo.pop()
        origin = origin_of(source)
        for link in links_in(markdown):
            target = leads_to(link, origin if not is_folder(origin) else f"{origin}/README.md")
            page = page_of(target)
            if page in found or not page.startswith("repository/") or not (ROOT / target).exists():
                continue
            found[page] = text_of(target)
            todo.append((page, found[page]))
    return found


def is_folder(path: str) -> bool:
    """Return whether a path of the repository is a folder."""
    return (ROOT / path).is_dir()


# --- events of mkdocs -------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    """Forget what an earlier build in this process has noted."""
    pages_in_markdown.clear()


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and resolve the patterns of the navigation."""
    for module, file in public_modules():
        add(files, config, f"reference/{module}.md", reference_page(module, names_in(file)))
    for page, text in sorted(pages_outside(files).items()):
        add(files, config, page, text)
    resolve(config, [file.src_uri for file in files.documentation_pages()])


def add(files: Files, config: MkDocsConfig, source: str, content: str) -> None:
    """Add a page that has no file in docs/."""
    files.append(File.generated(config, source, content=content))


def resolve(config: MkDocsConfig, pages: list[str]) -> None:
    """Replace each pattern in the navigation by its pages that are named nowhere, nor by a pattern before it."""
    left = [page for page in pages if page not in set(named_in(config.nav))]
    # The modules of the reference keep the order in which they were added; files of the repository are sorted by name.
    left.sort(key=lambda page: "" if page.startswith("reference/") else page)

    def expand(entry: Any) -> list[Any]:
        if isinstance(entry, list):
            return [expanded for child in entry for expanded in expand(child)]
        if isinstance(entry, dict):
            inside = {title: expand(child) if is_pattern(child) else child for title, child in entry.items()}
            return [{title: child for title, child in inside.items() if child != []}] if any(inside.values()) else []
        if not is_pattern(entry):
            return [entry]
        matched = [page for page in left if matches(page, entry)]
        left[:] = [page for page in left if page not in matched]
        return list(matched)

    config.nav = expand(config.nav)


def is_pattern(entry: Any) -> bool:
    """Return whether an entry of the navigation is to be expanded."""
    return isinstance(entry, list) or "*" in entry


def matches(page: str, pattern: str) -> bool:
    """Return whether a pattern names a page: ``*`` within one folder, ``**`` in all folders beneath."""
    return fnmatchcase(page, pattern) and ("**" in pattern or page.count("/") == pattern.count("/"))


def named_in(entry: Any) -> Iterator[str]:
    """Yield the pages that the navigation names."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from named_in(list(entry.values()))
    else:
        for child in entry:
            yield from named_in(child)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages; note what the page says."""
    source = page.file.src_uri
    origin = origin_of(source)
    if is_folder(posixpath.dirname(origin)) and source.endswith("README.md") and not (ROOT / origin).exists():
        origin = f"{posixpath.dirname(origin)}/README.md"
    parts, end = [], 0
    for link in links_in(markdown):
        target = page_of(leads_to(link, origin))
        if files.get_file_from_path(target) is None:
            continue
        to = posixpath.relpath(target, posixpath.dirname(source) or ".")
        parts.append(markdown[end : link.start("target")] + to)
        end = link.end("target")
    markdown = "".join(parts) + markdown[end:]
    pages_in_markdown[source] = HIDDEN.sub("", markdown)
    return markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Write the Markdown of the pages, and what language models read of it."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}."]
    whole = []
    for entry in config.nav or []:
        title, sources = ("Start", [entry]) if isinstance(entry, str) else next(iter(entry.items()))
        sources = [source for source in named_in(sources) if source in pages_in_markdown]
        if isinstance(entry, dict) or len(lines) == 3:
            lines += ["", f"## {title}", ""]
        for source in sources:
            text = pages_in_markdown[source]
            # What mkdocstrings makes is in the HTML alone.
            in_html = source.startswith("reference/") and "\n::: " in text
            lines.append(entry_for(source.removesuffix(".md") + ".html" if in_html else source, text))
            if not in_html:
                (site / source).parent.mkdir(parents=True, exist_ok=True)
                (site / source).write_text(text, encoding="utf-8")
                if not source.startswith("repository/"):
                    whole.append(text)
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (site / "llms-full.txt").write_text("\n\n".join(whole), encoding="utf-8")


def entry_for(address: str, text: str) -> str:
    """Return a page's line in ``llms.txt``: its title, its address and the first sentence of its text."""
    prose = [block for block in FENCED.sub("", text).split("\n\n") if re.match(r"[\w*`\[(\"]", block.strip())]
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    line = f"- [{title[1] if title else address}]({address})"
    if prose and "\n::: " not in text:
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(prose[0].split()))
        line += f": {re.split(r'(?<=[.!?]) ', words)[0].rstrip(':')}"
    return line
