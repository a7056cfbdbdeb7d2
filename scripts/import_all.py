"""Import every module of an installed distribution: ``python -I scripts/import_all.py NAME [EXTRA ...]``.

In an environment that holds nothing but the distribution and what it requires, an import that is not declared fails.
Its console scripts are loaded, too. A pytest plugin is left out: it is imported by pytest, so it may import that. A
module with the name of an extra, such as ``ctxdb_core.otel``, is imported where that extra is named.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import distribution


def main(name: str, *extras: str) -> None:
    """Import all of the distribution `name`, with what is for the `extras` that are installed."""
    left_out = set(distribution(name).metadata.get_all("Provides-Extra") or ()) - set(extras)
    entry_points = distribution(name).entry_points
    plugins = {entry_point.module for entry_point in entry_points.select(group="pytest11")}
    package = importlib.import_module(name.replace("-", "_"))
    modules = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    imported = 1
    for module in modules:
        if module in plugins or module.removeprefix(f"{package.__name__}.") in left_out:
            continue
        # `__main__` modules run when they are imported.
        if not module.endswith(".__main__"):
            importlib.import_module(module)
            imported += 1
    for entry_point in entry_points.select(group="console_scripts"):
        entry_point.load()
    beside = f", with the extras {', '.join(extras)}" if extras else ""
    print(f"{name}: {imported} modules import with what it declares{beside}")


if __name__ == "__main__":
    main(*sys.argv[1:])
