"""Signs that an answer reaches for what judges it.

`signs` reads the cell without running it. `Watch` looks, in the process where a check runs beside
its answer, whether the course's functions and those of the libraries are still the same objects.
"""

import ast
import sys
import types
from collections.abc import Iterator

CELL = "<the exercise's cell>"
_JUDGES = {"exercises", "claims", "probe", "checks", "ledger", "aside", "grading"}
_PLAIN = {  # what an answer may import where the check runs beside it
    *("torch", "numpy", "math", "itertools", "functools", "collections", "copy", "time", "heapq"),
    *("bisect", "random", "statistics", "fractions", "operator", "dataclasses", "typing"),
    *("asyncio", "contextlib", "abc", "enum", "cmath", "decimal", "string", "threading", "queue"),
    *("__future__", "course_utils", "onnx", "concurrent", "warnings", "numbers", "re"),
}
_REACHING = {"gc", "ctypes", "_ctypes", "inspect", "importlib", "builtins", "sys", "cffi"}
_FRAMES = {
    *("tb_frame", "f_back", "f_globals", "f_locals", "f_builtins", "gi_frame", "cr_frame"),
    *("ag_frame", "_getframe", "get_objects", "get_referrers", "get_referents", "settrace"),
    *("__globals__", "__builtins__", "__subclasses__", "__code__", "__closure__", "__traceback__"),
    *("__dict__", "__getattribute__", "attrgetter", "methodcaller", "__setattr__"),
    *("__mro__", "__bases__", "__base__", "__loader__", "__spec__", "__reduce__", "__reduce_ex__"),
}
_HIDDEN = {"os", "sys", "subprocess", "socket", "signal", "multiprocessing", "pickle", "posix"}
_CALLS = {
    "exec",
    "eval",
    "compile",
    "open",
    "__import__",
    "globals",
    "locals",
    "vars",
    "breakpoint",
}


def signs(cell: str, within: bool) -> list[str]:
    """What in this cell reaches for the judge, in words; with `within`, also what a cell must not
    do that runs beside its check. Empty for one that cannot be parsed.
    """
    try:
        return _signs(ast.parse(cell), within)
    except (SyntaxError, ValueError):
        return []
    except (RecursionError, MemoryError):
        return ["it is nested so deeply that it cannot be read"]


def _signs(tree: ast.AST, within: bool) -> list[str]:
    modules = set(_imported(tree)) | {"torch", "np", "nn", "F", "math", "time", *_JUDGES}
    found = []
    for node in ast.walk(tree):
        found += _always(node, modules)
        if within:
            found += _beside(node, modules)
    if within:
        found += _handed_on(tree)
    return sorted(set(found))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((a.asname or a.name).partition(".")[0] for a in node.names)


def _always(node: ast.AST, modules: set[str]) -> Iterator[str]:
    targets = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
            if isinstance(part, ast.Attribute) and _root(part) in modules:
                yield f"it sets {ast.unparse(part)}"
    sets = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
    if sets and node.args and _root(node.args[0]) in modules:
        yield f"it sets an attribute of {ast.unparse(node.args[0])}"
    for name in _named_modules(node):
        top, *rest = name.split(".")
        if top == "course_utils" and _JUDGES & set(rest):
            yield f"it imports {name}"
        if top in ("gc", "ctypes", "_ctypes", "cffi"):
            yield f"it imports {name}"
    if isinstance(node, ast.Attribute) and node.attr in ("_getframe", "f_back", "tb_frame"):
        yield f"it looks at frames ({node.attr})"


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _named_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
    return []


def _beside(node: ast.AST, modules: set[str]) -> Iterator[str]:
    for name in _named_modules(node):
        parts = name.split(".")
        if parts[0] not in _PLAIN or set(parts) & (_REACHING | _HIDDEN | _FRAMES):
            yield f"it imports {name}"
    if isinstance(node, ast.Attribute) and node.attr in _FRAMES | _HIDDEN | _REACHING:
        yield f"it reaches for .{node.attr}"
    if isinstance(node, ast.Name) and node.id in _CALLS | {"__builtins__", "__loader__"}:
        yield f"it uses {node.id}"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
        name = node.args[1]
        if isinstance(name, ast.Constant) and name.value in _FRAMES | _HIDDEN | _REACHING:
            yield f"it reaches for .{name.value}"
        if not isinstance(name, ast.Constant) and _root(node.args[0]) in modules:
            yield "it uses getattr with a name that is not written out"


def _handed_on(tree: ast.AST) -> Iterator[str]:
    """Modules under another name: what is then done with them is not seen."""
    modules = {"torch", "np", "nn", "F", "math"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    owners = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        used = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        first = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
        owners |= {id(a) for a in node.args[:1]} if first else set()
        if used and node.id in modules and id(node) not in owners:
            yield f"it hands on the module {node.id}"


class Watch:
    """Remembers what stands in the modules that a check relies on."""

    def __init__(self) -> None:
        self.modules = [n for n in sys.modules if n.partition(".")[0] == "course_utils"]
        self.before = _state(self.modules)

    def touched(self) -> list[str]:
        """What is another object now, by name; empty where nothing is."""
        after = _state(self.modules)
        names = self.before.keys() | after.keys()
        return sorted(n for n in names if self.before.get(n) != after.get(n))


def _state(names: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in [*names, "builtins", "math", "time", "copy", "numpy", "torch", "inspect"]:
        module = sys.modules.get(name)
        for key, value in list(vars(module).items()) if module else ():
            if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
                found[f"{name}.{key}"] = _print(value)
            own = isinstance(value, type) and value.__module__ == name
            if own and name.startswith("course_utils"):
                found |= {f"{name}.{key}.{k}": _print(v) for k, v in vars(value).items()}
    import torch

    for owner in (torch.Tensor, torch.nn.Module, torch.nn.functional):
        for key, value in list(vars(owner).items()):
            if callable(value):
                found[f"{owner.__name__}.{key}"] = id(value)
    return found


def _print(value: object) -> tuple:
    """Which object it is, and of a function, which code and which defaults it has."""
    code = getattr(value, "__code__", None)
    return id(value), id(code), repr(getattr(value, "__defaults__", None))[:200]
