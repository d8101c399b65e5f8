"""What chapter 08 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import ast
import functools
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import machine, measure, models
from course_utils.course import build
from course_utils.course.chapters import chapters

KEPT = ("KEEPS", "WORKER", "protocol", "library", "COUNT", "own")


@pytest.fixture(scope="module")
def ch08(tmp_path_factory) -> SimpleNamespace:
    """The functions and classes that the chapter defines, and the few names they need, without
    running what is around.
    """
    space = {
        "torch": torch,
        "np": np,
        "nn": nn,
        "F": F,
        "math": math,
        "functools": functools,
        "machine": machine,
    }
    space |= {
        "__name__": "chapter08",
        "MIB": 2**20,
        "SMOKE": True,
        "measure": measure,
        "models": models,
    }
    for cell in build.cells(chapters(["08"])[0]):
        if cell.cell_type != "code" or {"exercise", "solution", "wrong", "parameters"} & set(
            build.tags(cell)
        ):
            continue
        for node in ast.parse(cell.source).body:
            names = [ast.unparse(t) for t in getattr(node, "targets", [])]
            if isinstance(
                node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
            ) or set(names) & set(KEPT):
                exec(compile(ast.Module([node], []), "<chapter 08>", "exec"), space)
            if "WORKER" in names:
                space["worker_file"] = tmp_path_factory.mktemp("08") / "worker.py"
                space["worker_file"].write_text(space["WORKER"], encoding="utf-8")
    return SimpleNamespace(**space)


def test_the_table_of_rules_agrees_with_what_autograd_keeps(ch08):
    widths = [random.randint(8, 40) for _ in range(5)]
    layers = [
        layer
        for a, b in zip(widths, widths[1:], strict=False)
        for layer in (nn.Linear(a, b), nn.ReLU())
    ]
    for model, x in (
        (nn.Sequential(*layers[:-1]), torch.randn(50, widths[0])),
        (ch08.chain(16, random.randint(1, 4)), torch.randn(200, 16)),
        (models.mini_resnet(8, seed=0), torch.randn(16, 1, 28, 28)),
    ):
        y = torch.zeros(len(x), dtype=torch.long)
        kept = sum(ch08.saved_tensors(lambda m=model, x=x, y=y: F.cross_entropy(m(x), y)).values())
        assert ch08.activation_bytes(model, x)[0] == pytest.approx(kept, rel=0.03)


def test_predicted_peak_is_within_a_tenth_of_the_measured_one(ch08):
    for rows in (4, 300):  # the optimizer's moment, and that of the activations
        x, y = torch.randn(rows, 32), torch.randint(0, 32, (rows,))
        make = functools.partial(ch08.chain, 32, 6)
        peak = measure.peak_memory(ch08.training_steps(make, x, y))
        assert sum(ch08.predicted_parts(make(), x).values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_checkpointed_gradients_are_the_plain_ones_bit_for_bit(ch08, length, one_thread):
    model = ch08.chain(24, 6, p=0.3)
    x, y = torch.randn(17, 24), torch.randint(0, 24, (17,))
    plain = ch08.gradients(model, model, x, y)
    after = torch.get_rng_state()
    ours = ch08.gradients(
        model, ch08.through(ch08.Checkpoint.apply, ch08.segments(model, length)), x, y
    )
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert not ch08.equal_bits(model, ch08.FirstCheckpoint.apply, x, y), (
        "without the random state it must differ"
    )


def test_accumulation_does_not_depend_on_the_pieces(ch08):
    model = ch08.chain(16, 2, p=0.0).double()
    x, y = torch.randn(37, 16, dtype=torch.float64), torch.randint(0, 16, (37,))
    whole = ch08.accumulated(model, x, y, 37)
    for size in (1, 5, 36):
        # at most 37 more roundings to 1.1e-16 of gradients below 10
        assert ch08.apart(whole, ch08.accumulated(model, x, y, size)) < 1e-13


def test_blocked_attention_equals_the_naive_one_for_lengths_that_do_not_divide(ch08):
    for length in (1, 63, 64, 65, 130):
        q, k, v = torch.randn(3, 2, length, 8, dtype=torch.float64).unbind(0)
        torch.testing.assert_close(ch08.blocked(q, k, v), ch08.naive(q, k, v), atol=1e-12, rtol=0)


def test_allocator_never_overlaps_and_emptying_changes_nothing_for_its_own_process(ch08, seeded):
    rng = random.Random(seeded)
    for _ in range(10):
        twins = [ch08.CachingAllocator(300 * 2**20) for _ in range(2)]
        live: list[tuple] = []
        for _ in range(60):
            if live and rng.random() < 0.45:
                for allocator, piece in zip(twins, live.pop(rng.randrange(len(live))), strict=True):
                    allocator.free(piece)
            else:
                size = rng.choice([100, 2**19, 3 * 2**20, 7 * 2**20, 25 * 2**20])
                try:
                    pieces = twins[0].malloc(size), twins[1].malloc(size)
                except MemoryError:
                    continue
                assert all(p.size >= size for p in pieces)
                live.append(pieces)
            used = [p for s in twins[0].segments for p in s if p.used]
            assert len(used) == len(live)
            assert {id(p) for p in used} == {id(pair[0]) for pair in live}
            assert twins[0].allocated <= twins[0].reserved <= twins[0].capacity
            assert not any(
                a.used == b.used is False
                for s in twins[0].segments
                for a, b in zip(s, s[1:], strict=False)
            )
        before = twins[1].allocated
        twins[1].empty_cache()
        assert twins[1].allocated == before
        assert all(any(p.used for p in s) for s in twins[1].segments)
        assert ch08.largest_request(twins[0]) == ch08.largest_request(twins[1])
        for pair in live:
            twins[0].free(pair[0])
        twins[0].empty_cache()
        assert twins[0].reserved == 0


def test_a_killed_worker_leaves_no_segment_and_no_zombie(ch08):
    with ch08.Segment() as segment:
        name = segment.memory.name
        with ch08.Worker() as worker:
            worker.ask("attach", (name, ch08.COUNT))
            worker.ask("index", 3)
            assert segment.array[3] == 1
            worker.tell("sleep", 60)
            worker.process.kill()
            with pytest.raises(EOFError):
                worker.answer()
    assert not psutil.pid_exists(worker.process.pid)
    assert not ch08.exists(name)


@pytest.mark.wall_clock
def test_a_worker_that_ends_by_itself_does_not_remove_the_owners_segment(ch08):
    with ch08.Segment() as segment:
        with ch08.Worker() as worker:
            worker.ask("attach", (segment.memory.name, ch08.COUNT))
            worker.process.stdin.close()  # the end of its input
            assert worker.process.wait(120) == 0
        time.sleep(0.2)  # what a resource tracker would need
        assert ch08.exists(segment.memory.name)
