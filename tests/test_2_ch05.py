"""What chapter 05 teaches, taken from its cells and tried on more inputs than a notebook has room
for.
"""

import heapq
import math
from collections import Counter
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import taught

from course_utils.onnx_node import onnx_reference


@pytest.fixture(scope="module")
def ch05() -> SimpleNamespace:
    return taught("05", heapq=heapq, Counter=Counter, E2M1=(2, 1, 6.0), E4M3=(4, 3, 448.0))


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


@pytest.mark.parametrize("multiplier", [2**-33, 2**-33 * 1.9, 2.0**29 * 0.999999])
def test_fixed_point_holds_in_64_bits_at_its_ends(ch05, multiplier):
    m0, shift = ch05.fixed_point(multiplier)
    sums = torch.tensor([-(2**31), -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    wanted = [min(max(math.floor(int(a) * multiplier + 0.5) + 7, 0), 255) for a in sums]
    assert ch05.requantize(sums, m0, shift, 7).tolist() == wanted


@pytest.mark.parametrize("multiplier", [0.0, 2**-34, 2.0**29, -1.0, float("nan"), float("inf")])
def test_fixed_point_refuses_what_it_cannot_hold(ch05, multiplier):
    with pytest.raises(ValueError, match="does not fit"):
        ch05.fixed_point(multiplier)


def test_huffman_wastes_no_string_and_is_near_the_entropy(ch05, seeded):
    rng = np.random.default_rng(seeded)
    for size in (1, 2, 3, 17):
        codes = rng.choice(size, 500, p=rng.dirichlet(np.ones(size) * 0.3)).tolist()
        count = Counter(codes)
        length = ch05.huffman_lengths(count)
        assert len(length) == 1 or sum(2.0**-n for n in length.values()) == 1  # Kraft
        p = np.array(list(count.values())) / 500
        entropy, mean = float(-(p * np.log2(p)).sum()), ch05.huffman_bits(codes) / 500
        assert entropy - 1e-9 <= mean < max(entropy, 0) + 1 + 1e-9


def test_gaps_say_where_the_survivors_stand(ch05, seeded):
    for share in (0.02, 0.3, 0.9):
        kept = torch.rand(40, 50, generator=torch.Generator().manual_seed(seeded)) < share
        places, at = [], -1
        for symbol in ch05.gaps_of(kept):
            at += symbol if symbol == 15 else symbol + 1
            places += [] if symbol == 15 else [at]
        assert places == kept.flatten().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("coded", [False, True])
def test_codes_come_back_from_their_bytes(ch05, bits, coded):
    for top in (1, 2**bits):  # one symbol only, and all of them
        codes = torch.randint(0, top, (5, 13))
        parts = ch05.to_file(codes, bits, coded)
        assert torch.equal(ch05.from_file(parts, bits, codes.shape), codes)
        assert all(t.dtype == torch.uint8 for t in parts.values())
        if not coded:
            assert parts["codes"].numel() == math.ceil(65 * bits / 8)


def test_huffman_strings_are_free_of_prefixes_and_as_long_as_told(ch05, seeded):
    codes = np.random.default_rng(seeded).geometric(0.4, 500).tolist()
    length, packed = ch05.huffman_encode(codes)
    strings = sorted(ch05.canonical(length).values())
    assert not any(b.startswith(a) for a, b in zip(strings, strings[1:], strict=False))
    assert len(packed) == math.ceil(ch05.huffman_bits(codes) / 8)
    assert ch05.huffman_decode(length, packed, 500) == codes


@pytest.mark.parametrize("parts", ["even_parts", "codebook_parts"])
def test_weights_come_out_of_the_files_bytes(ch05, parts):
    w = torch.randn(6, 40)
    for bits in (3, 4):
        (packed, plain), (coded, same) = (getattr(ch05, parts)(w, bits, c) for c in (False, True))
        assert torch.equal(plain, same)
        assert "length" in coded
        assert "length" not in packed
        step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        slack = 0.51 * step if parts == "even_parts" else w.abs().max()
        assert ((plain - w).abs() <= slack + 1e-2 * w.abs()).all()


def test_a_codebook_is_at_least_as_good_as_the_even_steps_it_starts_from(ch05):
    w = torch.randn(3000)
    even = torch.linspace(float(w.min()), float(w.max()), 8)
    codes, values = ch05.codebook(w, 3)
    nearest = (w[:, None] - even).abs().amin(1)
    assert (values[codes] - w).square().mean() <= nearest.square().mean()
    # the nearest, or as near: the values were rounded to fp32 after the choice
    apart = (w[:, None].double() - values.double()).abs()
    assert (apart.gather(1, codes[:, None])[:, 0] <= apart.amin(1) + 1e-6).all()


def test_stochastic_rounding_is_right_on_average_and_leaves_whole_numbers_alone(ch05):
    generator = torch.Generator().manual_seed(1)
    x = torch.full((40_000,), 2.3)
    assert float(ch05.stochastic_round(x, generator).mean()) == pytest.approx(2.3, abs=0.015)
    whole = torch.arange(-5.0, 5)
    assert torch.equal(ch05.stochastic_round(whole, generator), whole)


SMALL = {"e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0), "e2m1": (2, 1, 6.0)}


def every_fp16():
    """All finite fp16 numbers: ties, subnormals and zeros of every small format among them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    return bits[bits.isfinite()]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("e4m3", lambda x: x.to(torch.float8_e4m3fn).float()),
        ("e5m2", lambda x: x.to(torch.float8_e5m2).float()),
        ("e2m1", lambda x: torch.tensor(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype("f4"))),
    ],
)
def test_small_floats_are_bit_equal_inside_their_range(ch05, name, theirs):
    x = every_fp16()
    x = x[x.abs() <= SMALL[name][2]]
    ours = ch05.to_float(x, *SMALL[name])
    assert torch.equal(ours, theirs(x))
    assert torch.equal(ch05.to_float(-x, *SMALL[name]), -ours)


def test_small_floats_saturate(ch05):
    for form in SMALL.values():
        assert ch05.to_float(torch.tensor([1e9, -1e9]), *form).tolist() == [form[2], -form[2]]


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_mx_is_torchaos(ch05, name):
    formats = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    w = torch.randn(64, 256) * torch.logspace(-4, 4, 64)[:, None]
    w[0, :32] = 0
    dtype = {"e4m3": torch.float8_e4m3fn, "e2m1": torch.float4_e2m1fn_x2}[name]
    theirs = formats.MXTensor.to_mx(w, dtype, 32).dequantize(torch.float32)
    assert torch.equal(ch05.mx(w, SMALL[name]), theirs)


def test_nvfp4_is_torchaos(ch05):
    formats = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = torch.randn(64, 256) * torch.logspace(-2, 0, 64)[:, None]
    whole = formats.per_tensor_amax_to_scale(w.abs().max())
    theirs = formats.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=whole).dequantize(torch.float32)
    ours = ch05.nvfp4(w)
    # they multiply by reciprocals, we divide: a number next to a tie may fall to the other side
    same = (ours - theirs).abs() <= 1e-6 * theirs.abs()
    assert same.float().mean() > 0.999
    assert (ours - theirs).abs().max() <= w.abs().max() / 6 * 2.01


def test_nf4_has_the_published_values(ch05):
    published = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004]
    published += [
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.33791524,
        0.44070983,
        0.562617,
        0.72295684,
    ]
    published += [1.0]
    torch.testing.assert_close(ch05.nf4_values(), torch.tensor(published), atol=2e-7, rtol=0)
    w = torch.randn(8, 128)
    back = ch05.nf4(w).reshape(-1, 64) / w.reshape(-1, 64).abs().amax(1, keepdim=True)
    nearest = ch05.nf4_values()
    assert ((back[..., None] - nearest).abs().amin(-1) < 1e-6).all()


def test_clipped_even_steps_are_never_worse_than_the_whole_range(ch05):
    w = torch.randn(16, 64) ** 3
    grid = ch05.affine_grid(w, 4)
    whole = ch05.dequantize(ch05.quantize(w, *grid), *grid[:2])
    error = [(t - w).square().sum(1) for t in (ch05.even_clipped(w), whole)]
    assert (error[0] <= error[1] + 1e-6).all()
    assert error[0].sum() < 0.99 * error[1].sum()


def test_a_training_on_a_grid_stays_on_it(ch05):
    x, y = torch.rand(256, 128), torch.randint(0, 10, (256,))
    for rounding in (lambda v, _: torch.round(v), ch05.stochastic_round):
        w, small = ch05.train_on_grid(rounding, 0.1, 0, x, y)
        assert torch.equal(w * 128, (w * 128).round())
        assert 0 < small < 100
