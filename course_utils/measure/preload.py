"""What the first process of a comparison had to import, the server imports before it forks the
next one: a second for torch's timer, several for its compiler.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterable


def imported_since(before: Iterable[str]) -> list[str]:
    """Names of the libraries' modules that this process has loaded since, in their order. What lies
    elsewhere, in the reader's folder say, may change before the next comparison and is left out.

    >>> imported_since(sys.modules)
    []
    """
    known = set(before)
    return [name for name in list(sys.modules) if name not in known and _installed(name)]


def load(names: Iterable[str]) -> None:
    """Import what can be imported by its name; who needs the rest will say so."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _installed(name: str) -> bool:
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    spec = getattr(sys.modules[name], "__spec__", None)
    origin = str(getattr(spec, "origin", ""))
    return "site-packages" in origin or "dist-packages" in origin
