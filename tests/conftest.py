"""Shared by the suite: the chapters, how a source's cells are executed alone, and the seeds.

Every random draw follows from one base seed, the environment's COURSE_SEED or 0, and from the
test's own name: a failure repeats, alone or in company.
"""

import ast
import itertools
import linecache
import math
import os
import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.course import build
from course_utils.course.chapters import chapters

CHAPTERS = chapters()
SEED = int(os.environ.get("COURSE_SEED", "0"))
_count = itertools.count()
_default_rng = np.random.default_rng


def seed_of(name: str) -> int:
    """A seed for this name, the same wherever and whenever it is asked for."""
    return zlib.crc32(f"{SEED} {name}".encode())


def sow(seed: int) -> None:
    """Seed what draws without a generator of its own, `np.random.default_rng()` included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the legacy generator is seeded, not used
    torch.manual_seed(seed)
    count, make = itertools.count(), _default_rng

    def default_rng(seed: object = None, _own: int = seed) -> np.random.Generator:
        return make([_own, next(count)] if seed is None else seed)

    np.random.default_rng = default_rng


sow(seed_of("import"))  # what a test module draws when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """What a module's fixture draws does not depend on the test that asks for it first."""
    if fixturedef.scope != "function":
        sow(seed_of(f"{request.node.nodeid} {fixturedef.argname}"))


@pytest.fixture(autouse=True)
def seeded(request) -> int:
    """The test's seed; `random`, NumPy and torch have been seeded with it."""
    seed = seed_of(request.node.nodeid)
    sow(seed)
    return seed


@pytest.fixture
def one_thread():
    """For bits that must be equal: sums do not depend on how many cores are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "wall_clock: reads the clock; its budget is one that a busy machine keeps"
    )
    config.addinivalue_line(
        "markers", "settled: draws nothing and reads no clock; once is enough for `make soak`"
    )


def pytest_report_header(config):
    return f"seed: {SEED}; repeat these draws with COURSE_SEED={SEED}"


def pytest_terminal_summary(terminalreporter):
    """With -q there is no header: say it where it is needed."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"seed: {SEED}; repeat these draws with COURSE_SEED={SEED}")


def names(chapter_list: list) -> list[str]:
    return [c.name for c in chapter_list]


IMPORTED = {"__name__": "__main__", "torch": torch, "np": np, "math": math, "nn": nn, "F": F}
"""What every chapter has imported when a cell runs alone."""


def execute(source: str, **given: object) -> dict:
    """Execute a cell's source with what every chapter has imported, and return its names.

    The source is put where `inspect` finds it, as IPython does for a notebook's cells.
    """
    filename = f"<cell {next(_count)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space = IMPORTED | given
    exec(compile(source, filename, "exec"), space)
    return space


@pytest.fixture
def run_cell():
    """`execute`, as a fixture."""
    return execute


def taught(number: str, **given: object) -> SimpleNamespace:
    """The functions and classes a chapter defines in its cells, without running what stands around
    them.

    `given` are names that they use and that the chapter computes or imports elsewhere.
    """
    space = IMPORTED | given
    for cell in build.cells(chapters([number])[0]):
        if cell.cell_type != "code" or {"exercise", "solution", "wrong"} & set(build.tags(cell)):
            continue
        if cell.source.startswith("%%"):
            continue  # another program
        for node in ast.parse(cell.source).body:
            if isinstance(
                node, ast.FunctionDef
            ):  # a default that the chapter computes is not there
                node.args.defaults = [
                    d for d in node.args.defaults if not isinstance(d, ast.Name) or d.id in space
                ]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                exec(compile(ast.Module([node], []), f"<chapter {number}>", "exec"), space)
    return SimpleNamespace(**space)
