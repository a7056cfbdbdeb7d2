"""Import every module of an installed distribution: ``python -I scripts/import_all.py NAME``.

In an environment that holds nothing but the distribution and what it requires, an import that is not declared fails.
Its console scripts are loaded, too. A pytest plugin is left out: it is imported by pytest, so it may import that.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import distribution


def main(name: str) -> None:
    """Import all of the distribution `name`."""
    entry_points = distribution(name).entry_points
    plugins = {entry_point.module for entry_point in entry_points.select(group="pytest11")}
    package = importlib.import_module(name.replace("-", "_"))
    modules = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for module in modules:
        # `__main__` modules run when they are imported.
        if module not in plugins and not module.endswith(".__main__"):
            importlib.import_module(module)
    for entry_point in entry_points.select(group="console_scripts"):
        entry_point.load()
    print(f"{name}: {len(modules) + 1} modules import with what it declares")


if __name__ == "__main__":
    main(sys.argv[1])
