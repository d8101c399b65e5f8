"""What chapter 08 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import contextlib
import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from course_utils import caching, footprint, measure, models


@pytest.fixture(scope="module")
def ch08():
    given = {"FakeTensorMode": FakeTensorMode, "checkpoint": checkpoint, "functools": functools}
    given |= {"contextlib": contextlib, "Path": Path, "measure": measure, "MIB": 2**20}
    dear = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    given |= {"keeping": functools.partial(create_selective_checkpoint_contexts, dear)}
    generator = torch.Generator().manual_seed(0)
    given |= {"sentences": torch.randn(8, 64, 32, dtype=torch.float64, generator=generator)}
    given |= {"SIZES": (300, 16, 3), "words": torch.arange(40), "labels": torch.arange(40) % 7}
    return taught("08", **given, SMOKE=True, caching=caching)


def mlp(*widths):
    pairs = zip(widths, widths[1:], strict=False)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_a_dry_run_saves_what_the_real_forward_pass_saves(ch08):
    widths = [random.randint(8, 40) for _ in range(5)]
    for make, shape in (
        (functools.partial(mlp, *widths), (50, widths[0])),
        (functools.partial(ch08.chain, 16, random.randint(1, 4)), (200, 16)),
        (functools.partial(models.mini_resnet, 8, seed=0), (16, 1, 28, 28)),
    ):
        model, x = make(), torch.randn(shape)
        y = torch.zeros(len(x), dtype=torch.long)
        own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
        kept = {}

        def pack(t, own=own, kept=kept):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = F.cross_entropy(model(x), y)
        saved, sizes, buffers = ch08.dry_run(make, shape)
        assert sum(new for _, new, _ in saved) == sum(kept.values())
        assert sizes == [p.nbytes for p in model.parameters()]
        assert sum(buffers) == sum(b.nbytes for b in model.buffers())
        del loss


def test_a_dry_run_takes_no_memory_worth_speaking_of(ch08):
    make = functools.partial(ch08.chain, 256, 4)
    real = measure.peak_memory(lambda: make()(torch.randn(512, 256)))
    assert measure.peak_memory(lambda: ch08.dry_run(make, (512, 256))) < real / 100


@pytest.mark.parametrize("adam", ["loop", "foreach", "fused"])
def test_the_predicted_peak_is_the_measured_one(ch08, adam):
    for rows in (4, 300):  # the optimizer's moment, and that of the activations
        for make in (functools.partial(ch08.chain, 32, 6), functools.partial(mlp, 32, 99, 32)):
            x, y = torch.randn(rows, 32), torch.randint(0, 32, (rows,))
            peak = measure.peak_memory(ch08.two_steps(make, x, y, adam))
            due = sum(ch08.predicted(ch08.dry_run(make, (rows, 32)), adam).values())
            assert due == pytest.approx(peak, rel=0.05)


def test_the_walk_finds_the_top_wherever_it_lies(ch08):
    saved = [(10, 10, 0), (0, 0, 100), (4, 4, 0), (0, 0, 1)]
    assert ch08.walk(saved) == {"activations": 10, "gradients": 101, "temporary": 20}
    assert ch08.walk([(8, 8, 0), (9, 9, 0), (1, 1, 0)])["activations"] == 17


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_checkpointed_gradients_are_the_plain_ones_bit_for_bit(ch08, length, one_thread):
    model = ch08.chain(24, 6, p=0.3)
    x, y = torch.randn(17, 24), torch.randint(0, 24, (17,))
    plain = ch08.gradients(model, model, x, y)
    after = torch.get_rng_state()
    for wrap in (ch08.Checkpoint.apply, ch08.library, ch08.selective):
        ours = ch08.gradients(model, ch08.through(wrap, ch08.segments(model, length)), x, y)
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert not ch08.equal_bits(model, ch08.FirstCheckpoint.apply, x, y), (
        "without the random state it must differ"
    )


def test_a_loss_in_pieces_is_the_loss_and_its_gradients(ch08):
    head, h = nn.Linear(16, 300).double(), torch.randn(50, 16, dtype=torch.float64)
    labels = torch.randint(0, 300, (50,))
    found = []
    for pieces in (1, 3, 8, 50):
        h.grad, head.weight.grad = None, None
        h.requires_grad_()
        loss = ch08.loss_in_pieces(head, h, labels, pieces)
        loss.backward()
        found.append((loss.detach(), h.grad, head.weight.grad))
    h.grad, head.weight.grad = None, None
    whole = F.cross_entropy(head(h), labels)
    whole.backward()
    for loss, own, weight in found:
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(own, h.grad, rtol=0, atol=1e-15)
        torch.testing.assert_close(weight, head.weight.grad, rtol=0, atol=1e-14)


def test_every_saving_but_adafactor_takes_the_same_steps(ch08, one_thread):
    plain, _ = ch08.trainer()
    losses = [plain() for _ in range(3)]
    savings = {"pieces": 4}, {"wrap": ch08.library}, {"early": True}
    for how in (*savings, {"pieces": 4, "wrap": ch08.library, "early": True}):
        one, owners = ch08.trainer(**how)
        assert [one() for _ in range(3)] == pytest.approx(losses, rel=1e-5), how
        assert all(p.grad is None for p in owners[0].parameters())


def test_the_tracker_and_the_profiler_agree_on_the_peak(ch08):
    for how in ({}, {"pieces": 4, "wrap": ch08.library}, {"early": True}):
        one, owners = ch08.trainer(**how)
        one()
        by_kind = footprint.by_kind(one, *owners)
        total = measure.peak_memory(lambda how=how: ch08.two_language_steps(how))
        assert sum(by_kind.values()) == pytest.approx(total, rel=0.12)


def test_accumulation_equals_the_full_batch_only_when_divided_by_all_tokens(ch08):
    model = ch08.chain(32, 2, p=0.0).double()
    for lengths, even in (([64] * 8, True), ([1, 64, 5, 9, 30, 2, 2, 60], False)):
        labels = ch08.targets(lengths)
        assert ch08.tokens_in(labels) == sum(lengths)
        full = ch08.accumulated(model, labels, 1, ch08.tokens_in)
        for pieces in (2, 4, 8):
            cured = ch08.accumulated(model, labels, pieces, lambda own, y=labels: ch08.tokens_in(y))
            assert ch08.apart(cured, full) < 1e-12
            recipe = ch08.accumulated(
                model, labels, pieces, lambda own, n=pieces: n * ch08.tokens_in(own)
            )
            assert (ch08.apart(recipe, full) < 1e-12) == even


def test_the_formula_for_segments_is_near_the_measured_peak(ch08):
    model, b = ch08.chain(64, 24), 256 * 64 * 4 / 2**20
    for s in (2, 4, 6, 12):
        due = 24 / s * b + 14 * s * b + 8 * b
        assert ch08.activation_peak(model, s) == pytest.approx(due, rel=0.08)


def test_carried_to_disk_the_gradients_are_the_plain_ones(ch08, tmp_path, one_thread):
    model, x = ch08.chain(64, 3, p=0.0), torch.randn(300, 64)
    y = torch.randint(0, 64, (300,))
    plain = ch08.gradients(model, model, x, y)

    def carried(x):
        with ch08.OnDisk(tmp_path, model.parameters()):
            return model(x)

    ours = ch08.gradients(model, carried, x, y)
    assert len(list(tmp_path.iterdir())) > 3
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_eight_bits_in_blocks_keep_small_numbers_and_even_steps_lose_them(ch08):
    t = torch.randn(4, 256) * 10.0 ** -torch.arange(4)[:, None]  # each block ten times smaller
    blocks, even = ch08.in_blocks(t), ch08.even_steps(t)
    for row in range(4):
        assert float((blocks[row] - t[row]).norm() / t[row].norm()) < 2**-4
    assert not even[3].any()
    for shape in ((1,), (3, 5), (256,), (300, 7)):
        exact = torch.ones(shape)
        torch.testing.assert_close(ch08.in_blocks(exact), exact)
        assert ch08.in_blocks(exact).shape == shape
    assert not ch08.in_blocks(torch.zeros(10)).any()


def test_the_adam_by_hand_is_torchs(ch08):
    p = nn.Parameter(torch.randn(7, 5))
    theirs = nn.Parameter(p.detach().clone())
    optimizer, state = torch.optim.Adam([theirs], lr=1e-3), (torch.zeros(7, 5), torch.zeros(7, 5))
    for t in range(1, 6):
        gradient = torch.randn(7, 5)
        p.grad, theirs.grad = gradient, gradient.clone()
        state = ch08.adam_step(p, state, t, lambda m, v: (m, v))
        optimizer.step()
    torch.testing.assert_close(p, theirs, rtol=0, atol=1e-6)


def test_a_snapshot_is_one_that_torchs_viewer_reads(ch08):
    from torch.cuda import _memory_viz as viewer

    gpu = caching.CachingAllocator(expandable=True)
    tensors = [gpu.malloc(size * 2**20) for size in (30, 5, 50)]
    gpu.free(tensors[1])
    text = viewer.segsum(ch08.snapshot(gpu))
    assert "total_allocated: 80.0MiB" in text
    assert f"total_reserved: {gpu.reserved / 2**20:.1f}MiB" in text


def test_a_real_device_takes_the_trace_that_the_paper_takes(ch08):
    assert caching.runs(ch08.Real("meta"), [64], layers=1) is True
    tensor = ch08.Real("cpu").malloc(1000)
    ch08.Real("cpu").free(tensor)
    assert tensor.untyped_storage().nbytes() == 0


def test_the_resident_set_grows_by_what_is_touched(ch08):
    import threading
    import time

    import psutil

    ch08.resident_growth.__globals__.update(threading=threading, time=time, psutil=psutil)
    assert ch08.resident_growth(lambda: np.ones(2**26)) > 2**26
    assert math.isfinite(ch08.resident_growth(lambda: None))
