"""What chapter 07 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import contextlib
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from torch import nn
from torch.overrides import TorchFunctionMode

from course_utils import data, measure, models


@pytest.fixture(scope="module")
def ch07():
    images, labels = data.fashion_mnist("train")
    given = {"images": images[:500], "labels": labels[:500], "STEPS": 10, "MIB": 2**20}
    given |= {"TorchFunctionMode": TorchFunctionMode, "measure": measure, "models": models}
    return taught("07", **given)


@pytest.mark.parametrize(("e", "m", "dtype"), [(8, 7, torch.bfloat16), (5, 10, torch.float16)])
def test_decoding_the_stored_bits_gives_the_number_back(ch07, e, m, dtype):
    x = torch.randn(20_000) * torch.exp2(torch.randint(-40, 30, (20_000,)).float())
    words = x.to(dtype).view(torch.int16).long() & 0xFFFF
    ours = ch07.decode(words, e, m)
    torch.testing.assert_close(ours, x.to(dtype).double(), rtol=0, atol=0)


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


def test_the_order_of_unscale_and_clip_is_what_the_text_says(ch07, monkeypatch):
    one = [(torch.randn(8, 784), torch.arange(8))]
    monkeypatch.setitem(ch07.first_update.__globals__, "batches", lambda *_: iter(one))
    assert ch07.first_update("unscale, clip") == pytest.approx(1, abs=1e-3)
    assert ch07.first_update("clip") == pytest.approx(1 / 1024, rel=1e-2)
    assert np.isfinite(ch07.first_update("clip"))


def test_emulated_fp16_is_close_to_real_fp16_and_rounds_both_ways(ch07, one_thread):
    model, x, y = ch07.mlp(2), torch.randn(32, 784), torch.randint(0, 10, (32,))
    fp16 = ch07.Emulated(ch07.to_fp16, ch07.to_fp16)
    emulated = ch07.step_gradients(model, fp16, x, y)[1:]
    real = ch07.step_gradients(model, torch.autocast("cpu", dtype=torch.float16), x, y)[1:]
    for a, b in zip(emulated, real, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-3
    weight = emulated[0]  # a gradient of a weight leaves through its rounding
    assert torch.equal(weight, weight.half().float())
    tiny = ch07.step_gradients(model, ch07.Emulated(lambda t: t, lambda t: t * 0), x, y)[1:]
    assert all(float(g.abs().max()) == 0 for g in tiny[:1])


def test_emulation_leaves_other_functions_alone(ch07):
    seen = []
    mode = ch07.Emulated(lambda t: seen.append(t.shape) or t, lambda t: t)
    with mode:
        F.relu(F.linear(torch.randn(3, 4), torch.randn(5, 4)))
    assert seen == [(3, 4), (5, 4), (3, 5)]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_rounding_uses_its_range_when_it_is_scaled(ch07, dtype):
    t = torch.randn(1000) * 1e-6
    assert float((ch07.fp8(dtype, False)(t) - t).norm() / t.norm()) > 0.9  # underflow
    relative = (ch07.fp8(dtype, True)(t) - t).abs() / t.abs().clamp(min=1e-8)
    assert float(relative.median()) < 2 ** -(3 if dtype == torch.float8_e4m3fn else 2)
    big = torch.tensor([1e6, -1e6])
    largest = torch.finfo(dtype).max
    assert ch07.fp8(dtype, False)(big).tolist() == [largest, -largest]


def test_a_rounded_optimizer_leaves_bf16_numbers(ch07):
    for how in ("nearest", "stochastic"):
        model = ch07.mlp(0)
        optimizer = ch07.RoundedSGD(model.parameters(), 0.001, how)
        F.cross_entropy(model(torch.randn(16, 784)), torch.randint(0, 10, (16,))).backward()
        optimizer.step()
        for p in model.parameters():
            assert torch.equal(p, p.bfloat16().float())
        assert 0 < np.mean(optimizer.idle) < 1


def test_a_scale_that_changes_between_small_batches_spoils_the_sum(ch07):
    parts = list(ch07.batches(5, 4, size=16))
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = ch07.step_gradients(ch07.mlp(0), contextlib.nullcontext(), x, y)[1:]
    whole = torch.cat([g.flatten() for g in whole])
    right, wrong = (
        float((ch07.accumulated(ch07.mlp(0), each) - whole).norm() / whole.norm())
        for each in (False, True)
    )
    assert right < 0.01 < 0.2 < wrong
