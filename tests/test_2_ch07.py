"""What chapter 07 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import ast
import itertools
import math
import os
import random
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from course_utils import measure, models
from course_utils.course import build
from course_utils.course.chapters import chapters


def constants(*names: str) -> dict:
    """Plain values that the chapter assigns to these names."""
    found = {}
    for cell in build.cells(chapters(["07"])[0]):
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
                    found[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return found


@pytest.fixture(scope="module")
def ch07():
    import contextlib
    import json

    modules = {
        "os": os,
        "sys": sys,
        "json": json,
        "contextlib": contextlib,
        "subprocess": subprocess,
    }
    modules |= {
        "threading": threading,
        "TorchFunctionMode": TorchFunctionMode,
        "tree_map": tree_map,
        "STEPS": 10,
    }
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return taught(
        "07",
        measure=measure,
        models=models,
        MIB=2**20,
        WORD=words,
        **modules,
        **constants("WORLD", "FORMATS"),
    )


@pytest.mark.parametrize(("e", "m", "dtype"), [(8, 7, torch.bfloat16), (5, 10, torch.float16)])
def test_decoding_the_stored_bits_gives_the_number_back(ch07, e, m, dtype):
    x = torch.randn(20_000) * torch.exp2(torch.randint(-40, 30, (20_000,)).float())
    words = x.to(dtype).view(torch.int16).long() & 0xFFFF
    ours = ch07.decode(words, e, m)
    torch.testing.assert_close(ours, x.to(dtype).double(), rtol=0, atol=0)
    torch.testing.assert_close(ours, ch07.stored(x, e, m), rtol=0, atol=0)


def test_storing_is_idempotent_and_its_text_decodes(ch07):
    for e, m in itertools.product(range(2, 9), (1, 3, 7, 10)):
        bias = 2 ** (e - 1) - 1
        for value in (
            0.1,
            -3.7,
            1.0,
            2.0 ** (1 - bias),
            2.0 ** (1 - bias - m),
            0.3 * 2.0 ** (1 - bias),
        ):
            once = ch07.stored(value, e, m)
            assert torch.equal(ch07.stored(once, e, m), once)
            text = ch07.bits_text(value, e, m)
            assert len(text) == 1 + e + m
            if math.isfinite(once):
                assert ch07.decode(torch.tensor([int(text, 2)]), e, m).item() == once.item()


def test_experiment_agrees_with_finfo(ch07):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        small, large, gap = ch07.experiment(dtype)
        info = torch.finfo(dtype)
        assert 2.0**gap == info.eps
        assert large == math.frexp(info.max)[1] - 1
        assert 2.0**small == info.smallest_normal * info.eps


def test_stochastic_rounding_keeps_what_bf16_holds_and_is_right_on_average(ch07):
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(ch07.to_bf16(exact, "stochastic"), exact)
    between = torch.full((200_000,), -1.001)
    rounded = ch07.to_bf16(between, "stochastic")
    assert set(rounded.unique().tolist()) == {-1.0, -1.0078125}
    # 34 standard deviations of the mean of 200,000 draws between the two values
    assert rounded.mean().item() == pytest.approx(-1.001, abs=2e-4)
    assert ch07.to_bf16(between, "nearest").unique().tolist() == [-1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_our_autocast_is_torchs_bit_by_bit(ch07, dtype, one_thread):
    makes = (
        lambda: ch07.mlp(1),
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 24), nn.LayerNorm(24), nn.Linear(24, 10)
        ),
    )
    for make in makes:
        model, x, y = make(), torch.randn(9, 784), torch.randint(0, 10, (9,))
        ours = ch07.step_gradients(model, ch07.MyAutocast(dtype), x, y)
        theirs = ch07.step_gradients(model, torch.autocast("cpu", dtype=dtype), x, y)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        plain = ch07.step_gradients(model, torch.autocast("cpu", enabled=False), x, y)
        assert not torch.equal(ours[1], plain[1])


def test_our_scaler_is_gradscaler_on_random_losses(ch07):
    for _ in range(20):
        interval = random.randint(1, 4)
        factors = [random.choice([0.0, 1.0, 0.1, -2.0, math.inf, math.nan]) for _ in range(30)]
        (ours, a), (theirs, b) = (
            ch07.on_losses(kind(64.0, 2.0, 0.5, interval), factors)
            for kind in (ch07.LossScaler, ch07.Torch)
        )
        assert ours == theirs, (interval, factors)
        assert torch.equal(a, b)


def test_scaling_brings_an_underflown_gradient_back():
    weight = nn.Parameter(torch.full((1, 4), 0.5))
    x = torch.full((1, 4), 1e-4)
    grads = []
    for scale in (1.0, 2.0**14):
        weight.grad = None
        with torch.autocast("cpu", dtype=torch.float16):
            y = F.linear(x, weight)
        (y.float().sum() * 2.0**-12 * scale).backward()
        grads.append(weight.grad / scale)
    assert grads[0].abs().max() < 0.5e-4 * 2.0**-12 or grads[0].eq(0).all()
    torch.testing.assert_close(grads[1], torch.full((1, 4), 1e-4 * 2.0**-12), rtol=1e-3, atol=0)


def test_running_sum_rounds_as_the_formats_do(ch07):
    terms = torch.rand(300).half()
    by_hand = torch.zeros((), dtype=torch.float16)
    for value in terms:
        by_hand = by_hand + value
    assert ch07.running_sum(terms.double(), 5, 10)[-1] == by_hand.item()
    assert ch07.running_sum(torch.ones(600, dtype=torch.float64), 8, 7)[-1] == 256


def test_kept_bytes_shrink_where_activations_outweigh_parameters(ch07):
    layers = ch07.chain(32, 4)
    for rows, fewer in ((2, False), (512, True)):
        x, y = torch.randn(rows, 32), torch.zeros(rows, dtype=torch.long)
        with_it, without = (ch07.kept_bytes(layers, x, y, on) for on in (True, False))
        assert (with_it < without) == fewer


def test_worlds_are_those_the_instruction_sets_allow(ch07):
    assert ch07.worlds_of(()) == {"as it is": None}
    assert list(ch07.worlds_of(("avx2",)).values()) == [None, "SSE41"]
    assert list(ch07.worlds_of(("avx2", "avx512_f", "avx512_vnni")).values()) == [None, "AVX2"]
    assert list(ch07.worlds_of(("avx2", "avx512_f", "avx512_bf16")).values()) == [
        None,
        "AVX512_CORE_VNNI",
        "AVX2",
    ]


def test_a_world_answers_ends_after_an_error_and_gives_up_when_it_takes_too_long(ch07):
    world = ch07.World(None, 8, 2)
    with pytest.raises(KeyError), world:
        raise KeyError(f"{world.round()}")
    assert not psutil.pid_exists(world.process.pid)
    with ch07.World(None, 8, 2) as slow:
        assert slow.round(patience=0.01) is None  # torch alone takes longer to import


def test_the_order_of_unscale_and_clip_is_what_the_text_says(ch07):
    ch07.first_update.__globals__["batches"] = lambda seed, steps: iter(
        [(torch.randn(8, 784), torch.arange(8))]
    )
    assert ch07.first_update("unscale, clip") == pytest.approx(1, abs=1e-3)
    assert ch07.first_update("clip") == pytest.approx(1 / 1024, rel=1e-2)
    assert np.isfinite(ch07.first_update("clip"))
