"""What chapter 10 teaches, taken from its cells: bytes counted, blocks, folds that are legal, tiles
of attention.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import googlenet, mobilenet_v2, resnet18


@pytest.fixture(scope="module")
def ch10():
    return taught(
        "10", TorchDispatchMode=TorchDispatchMode, Counter=Counter, copy=copy, fx=fx, best=64
    )


def test_traffic_counts_reads_and_writes_and_no_views(ch10):
    x = torch.randn(100)  # 400 bytes
    for call, trips in (
        (lambda: x + 1, 2),
        (lambda: x + x, 3),
        (lambda: x.view(10, 10).t(), 0),
        (
            lambda: torch.cat([x, x]).size(),
            0,
        ),  # a list of tensors is not among the plain arguments: only the result counts
        (lambda: x.clone().relu_(), 4),
    ):
        with ch10.Traffic() as seen:
            call()
        wanted = trips * x.nbytes
        assert seen.bytes == (2 * x.nbytes if "cat" in seen.calls else wanted), seen.calls


@pytest.mark.parametrize("numbers", [1, 7, 64, 65, 1000])
def test_blocks_give_the_same_bits_for_any_length(ch10, numbers):
    x, r = torch.randn(numbers), torch.randn(numbers)
    for size in (1, 64, 2000):
        assert torch.equal(ch10.by_blocks(x, r, size), ch10.chain(x, r))


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (resnet18, 0),
        (mobilenet_v2, 0),
        (lambda: googlenet(weights=None, init_weights=False, aux_logits=False), 0),
    ],
    ids=["resnet18", "mobilenet_v2", "googlenet"],
)
def test_whole_networks_fold_and_answer_as_before(ch10, make, left):
    torch.manual_seed(0)
    net = ch10.lived_in(make(), side=64).double()
    folded, refused = ch10.fold_all(net)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(folded(x), want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))
        merged = ch10.merge_relu(copy.deepcopy(folded))
        torch.testing.assert_close(merged(x), want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))
    assert ch10.batchnorms(folded) == left
    assert refused == {}
    assert ch10.batchnorms(net) > 0, "the model itself stays as it was"


@pytest.mark.parametrize("shared", [True, False])
def test_what_may_not_be_folded_is_refused_with_its_reason(ch10, shared):
    net = ch10.lived_in(ch10.Twice(shared))
    folded, refused = ch10.fold_all(net)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))
        assert not torch.allclose(ch10.fold_blindly(net)(x), net(x), atol=1e-3), (
            "the myth must still be wrong"
        )
    assert list(refused) == ["bn"]
    with pytest.raises(ValueError, match=r"eval\(\)"):
        ch10.fold_all(net.train())
    nothing_before = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval()
    assert "no convolution" in ch10.fold_all(nothing_before)[1]["1"]
    no_statistics = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
    ).eval()
    assert "batch" in ch10.fold_all(no_statistics)[1]["1"]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_tiles_equal_the_whole_softmax_also_for_huge_scores(ch10, length):
    q, k, v = torch.randn(3, 2, length, 8, dtype=torch.float64).unbind(0)
    for factor in (1.0, 300.0):
        want = F.scaled_dot_product_attention(factor * q, k, v)
        # tiles of one number are slow, and 65 rows of them show what 200 do
        for shape in ((64, 64), (30, 7)) if length > 65 else ((64, 64), (1, 1), (30, 7)):
            torch.testing.assert_close(
                ch10.tiled(factor * q, k, v, *shape), want, atol=1e-10, rtol=0
            )


def test_the_mended_function_is_the_broken_one(ch10):
    for x in (torch.zeros(8), torch.full((8,), 50.0), torch.randn(8)):
        assert torch.equal(ch10.broken(x), ch10.mended(x))


def test_the_circulating_transformer_folds_nothing(ch10):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert ch10.batchnorms(ch10.Circulating(fx.symbolic_trace(net)).transform()) == 1
