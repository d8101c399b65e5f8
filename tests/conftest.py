"""Shared by the suite: the chapters, and how a source's cells are executed alone."""

import itertools
import linecache
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
        space = {"__name__": "__main__", "torch": torch, "np": np, "math": math, "nn": nn, "F": F, **given}
        exec(compile(source, filename, "exec"), space)
        return space

    return run
