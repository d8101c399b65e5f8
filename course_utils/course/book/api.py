"""The reference of the instruments, from their docstrings: a page a module, and one that lists
them.
"""

import importlib
import pkgutil
from pathlib import Path

import course_utils

MAKERS = ("checks", "course", "programs")
INDEX = """\
# Instruments

What notebooks import, from the package's own docstrings: the suite runs every example.

{table}

```{{toctree}}
:hidden:

{contents}
```
"""
MODULE = """\
# {title}

```{{eval-rst}}
.. automodule:: {name}
   :members:{more}
```
"""


def modules() -> list[str]:
    """The instruments that a chapter may import. The parts of a package that hands on their names
    stand on the package's own page.
    """
    found: list[str] = []
    for info in pkgutil.walk_packages(course_utils.__path__, "course_utils."):
        parent = info.name.rpartition(".")[0]
        if info.name.split(".")[1] in MAKERS or (parent in found and _hands_on(parent)):
            continue
        found.append(info.name)
    return found


def _hands_on(name: str) -> bool:
    return bool(getattr(importlib.import_module(name), "__all__", []))


def write(folder: Path) -> None:
    """api/index.md and a page a module."""
    folder.mkdir()
    rows, names = ["| module | what it holds |", "|---|---|"], modules()
    for name in names:
        title = name.removeprefix("course_utils.")
        said = (importlib.import_module(name).__doc__ or "").strip().partition("\n\n")[0]
        rows.append(f"| [{title}]({name}.md) | {' '.join(said.split())} |")
        more = "\n   :imported-members:" if _hands_on(name) else ""
        text = MODULE.format(title=title, name=name, more=more)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    page = INDEX.format(table="\n".join(rows), contents="\n".join(names))
    (folder / "index.md").write_text(page, encoding="utf-8")
