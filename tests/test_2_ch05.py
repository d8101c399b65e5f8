"""What chapter 05 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import heapq
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import taught

from course_utils.checks.ch05 import onnx_reference


@pytest.fixture(scope="module")
def ch05() -> SimpleNamespace:
    return taught("05", heapq=heapq, Counter=Counter)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["affine_grid", "symmetric_grid"])
def test_inside_the_range_the_error_is_at_most_half_a_step_and_zero_is_exact(ch05, bits, scheme):
    x = torch.cat(
        [torch.randn(50, 40) * 10 ** torch.empty(50, 1).uniform_(-3, 3), torch.zeros(50, 1)], 1
    )
    x[:10] = x[:10].abs()
    grid = getattr(ch05, scheme)(x, bits)
    back = ch05.dequantize(ch05.quantize(x, *grid), *grid[:2])
    # half a step, and five roundings of 2⁻²⁴ at up to 255 steps: 0.00008 of one
    assert ((back - x).abs() <= grid[0] * 0.5001).all()
    assert (back[x == 0] == 0).all()


def test_a_power_of_two_changes_the_scale_and_no_code(ch05):
    x = torch.randn(5, 100)
    a, b = ch05.affine_grid(x, 8), ch05.affine_grid(8 * x, 8)
    assert torch.equal(8 * a[0], b[0])
    assert torch.equal(ch05.quantize(x, *a), ch05.quantize(8 * x, *b))


def test_quantizing_twice_is_quantizing_once(ch05):
    x = torch.randn(4, 200)
    grid = ch05.symmetric_grid(x, 5)
    once = ch05.dequantize(ch05.quantize(x, *grid), *grid[:2])
    assert torch.equal(ch05.dequantize(ch05.quantize(once, *grid), *grid[:2]), once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_no_code_stands_for_is_refused(ch05, bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        ch05.quantize(torch.tensor([0.0, bad]), torch.tensor(1.0), 0, 0, 255)


def test_edges(ch05):
    for x in (
        torch.zeros(3, 0),
        torch.zeros(3, 5),
        torch.full((3, 5), 0.7),
        torch.full((3, 5), -0.7),
    ):
        scale, zero_point, low, high = ch05.affine_grid(x, 8)
        assert (scale > 0).all()
        assert ((zero_point >= low) & (zero_point <= high)).all()
        back = ch05.dequantize(ch05.quantize(x, scale, zero_point, low, high), scale, zero_point)
        assert torch.allclose(back, x, atol=1e-6)


def test_bit_equal_to_torch_and_to_onnx_for_many_grids(ch05):
    for _ in range(40):
        scale, zero = torch.empty(()).uniform_(1e-3, 1), int(torch.randint(0, 256, ()))
        x = torch.cat([torch.randn(2000) * 300 * scale, (torch.arange(-300, 300) + 0.5) * scale])
        ours = ch05.dequantize(ch05.quantize(x, scale, zero, 0, 255, divide=False), scale, zero)
        assert torch.equal(
            ours, torch.fake_quantize_per_tensor_affine(x, float(scale), zero, 0, 255)
        )
        theirs = onnx_reference(
            "QuantizeLinear", x.numpy(), scale.numpy(), np.array(zero, np.uint8)
        )[0]
        assert np.array_equal(ch05.quantize(x, scale, zero, 0, 255).numpy(), theirs)


def test_finer_granularity_never_loses_and_one_scale_a_row_permutes(ch05):
    w = torch.randn(16, 8, 3, 3) * torch.logspace(-2, 0, 16)[:, None, None, None]
    errors = {}
    for granularity in ("tensor", "channel"):
        rows = ch05.rows_of(w, granularity)
        grid = ch05.symmetric_grid(rows, 4)
        errors[granularity] = float(
            (ch05.dequantize(ch05.quantize(rows, *grid), *grid[:2]) - rows).square().mean()
        )
    assert errors["channel"] < errors["tensor"]
    order = torch.randperm(16)
    rows = ch05.rows_of(w, "channel")
    codes, moved = (ch05.quantize(r, *ch05.symmetric_grid(r, 4)) for r in (rows, rows[order]))
    assert torch.equal(codes[order], moved)


def test_requantization_is_exact_rounding(ch05):
    for multiplier in (1e-6, 0.0123, 0.25, 0.5, 0.999999999999, 1.0, 3.7):
        m0, shift = ch05.fixed_point(multiplier)
        assert 2**30 <= m0 < 2**31
        assert abs(m0 / 2**shift / multiplier - 1) <= 2**-31 + 1e-15
        sums = torch.randint(-(2**31), 2**31 - 1, (1000,)).to(torch.int32)
        wanted = [
            min(max((int(a) * m0 + (1 << (shift - 1))) // (1 << shift) + 7, 0), 255) for a in sums
        ]
        assert ch05.requantize(sums, m0, shift, 7).tolist() == wanted


def test_huffman_is_prefix_free_lossless_and_near_the_entropy(ch05, seeded):
    rng = np.random.default_rng(seeded)
    for size in (1, 2, 3, 17):
        codes = torch.from_numpy(rng.choice(size, 500, p=rng.dirichlet(np.ones(size) * 0.3)))
        length, packed = ch05.huffman_encode(codes)
        strings = sorted(ch05.canonical(length).values())
        assert not any(b.startswith(a) for a, b in zip(strings, strings[1:], strict=False))
        assert (
            len(length) == 1 or sum(2.0**-n for n in length.values()) == 1
        )  # Kraft: no string is wasted
        assert torch.equal(ch05.huffman_decode(length, packed, 500), codes)
        p = np.array(list(Counter(codes.tolist()).values())) / 500
        mean = sum(length[s] * n for s, n in Counter(codes.tolist()).items()) / 500
        assert mean < max(float(-(p * np.log2(p)).sum()), 0) + 1 + 1e-9


def test_a_codebook_is_at_least_as_good_as_the_even_steps_it_starts_from(ch05):
    w = torch.randn(3000)
    even = torch.linspace(float(w.min()), float(w.max()), 8)
    codes, values = ch05.codebook(w, 3)
    nearest = (w[:, None] - even).abs().amin(1)
    assert (values[codes] - w).square().mean() <= nearest.square().mean()
    # the nearest, or as near: the values were rounded to fp32 after the choice
    apart = (w[:, None].double() - values.double()).abs()
    assert (apart.gather(1, codes[:, None])[:, 0] <= apart.amin(1) + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_loses_nothing(ch05, bits):
    codes = torch.randint(0, 2**bits, (64,))
    packed = ch05.pack(codes, bits)
    assert packed.numel() == 64 * bits // 8
    table = np.unpackbits(packed.numpy()).reshape(64, bits)
    assert (table @ (1 << np.arange(bits)[::-1])).tolist() == codes.tolist()


def test_stochastic_rounding_is_right_on_average_and_leaves_whole_numbers_alone(ch05):
    generator = torch.Generator().manual_seed(1)
    x = torch.full((40_000,), 2.3)
    assert float(ch05.stochastic_round(x, generator).mean()) == pytest.approx(2.3, abs=0.015)
    whole = torch.arange(-5.0, 5)
    assert torch.equal(ch05.stochastic_round(whole, generator), whole)
