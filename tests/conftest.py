"""Shared by the suite: the chapters, and how a source's cells are executed alone."""

import ast
import itertools
import linecache
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.course import build
from course_utils.course.chapters import chapters

CHAPTERS = chapters()
_count = itertools.count()


def names(chapter_list: list) -> list[str]:
    return [c.name for c in chapter_list]


@pytest.fixture
def run_cell():
    """Execute a cell's source with what every chapter has imported, and return its names.

    The source is put where `inspect` finds it, as IPython does for a notebook's cells.
    """

    def run(source: str, **given: object) -> dict:
        filename = f"<cell {next(_count)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        space = {
            "__name__": "__main__",
            "torch": torch,
            "np": np,
            "math": math,
            "nn": nn,
            "F": F,
            **given,
        }
        exec(compile(source, filename, "exec"), space)
        return space

    return run


def taught(number: str, **given: object) -> SimpleNamespace:
    """The functions and classes a chapter defines in its cells, without running what stands around
    them.

    `given` are names that they use and that the chapter computes or imports elsewhere.
    """
    space = {
        "__name__": "__main__",
        "torch": torch,
        "np": np,
        "math": math,
        "nn": nn,
        "F": F,
        **given,
    }
    for cell in build.cells(chapters([number])[0]):
        if cell.cell_type != "code" or {"exercise", "solution", "wrong"} & set(build.tags(cell)):
            continue
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
