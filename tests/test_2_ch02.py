"""What chapter 02 teaches, taken from its cells: equal batches, clocks, schedules, BatchNorm's
cure, the recipe.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from course_utils import data, models, training

IMAGES, LABELS = data.fashion_mnist("train")


@pytest.fixture(scope="module")
def ch02():
    given = {
        "Dataset": Dataset,
        "DataLoader": DataLoader,
        "Image": Image,
        "transforms": transforms,
        "models": models,
    }
    given |= {
        "time": __import__("time"),
        "images": IMAGES,
        "labels": LABELS,
        "unseen": IMAGES[:400],
        "truth": LABELS[:400],
    }
    return taught("02", STEPS=40, SMOKE=True, lambdas={}, **given)


def test_one_by_one_and_at_once_are_the_same_bits_in_any_order(ch02):
    seed = int(torch.randint(0, 2**31, ()))
    order = torch.cat(list(itertools.islice(ch02.shuffled(len(IMAGES), seed, 32), 5)))
    loader = DataLoader(ch02.OneByOne(IMAGES, LABELS), batch_size=32, sampler=order.tolist())
    for (x, y), (a, b) in zip(loader, ch02.in_memory(ch02.unit, seed, 32), strict=False):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@pytest.mark.wall_clock
def test_training_stops_at_the_target_and_counts_its_steps(ch02):
    net = models.mini_resnet(8, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    batches = ch02.in_memory(models.normalise)
    assert ch02.train(net, batches, optimizer, 7)[0] == 7
    steps, seconds = ch02.train(
        net, batches, optimizer, 50, prepare=models.normalise, target=1e-9, every=5
    )
    assert steps == 5
    assert 0 < seconds < 300
    assert net.training, "looking at the accuracy must not leave the network in eval mode"


@pytest.mark.parametrize("factor", [1e-2, 255.0])
def test_batchnorm_takes_a_scale_out_and_a_plain_network_does_not(ch02, factor):
    def gradient(net, first, scale):
        net.zero_grad()
        F.cross_entropy(net(scale * x), y).backward()
        return first.weight.grad.clone()

    x, y = models.normalise(IMAGES[:32]).double(), LABELS[:32]
    cured, bare = ch02.with_batchnorm(1).double().train(), ch02.plain(1).double()
    cured.stem[1].eps = 1e-14
    a, b = (gradient(cured, cured.stem[0], scale) for scale in (1.0, factor))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    a, b = (gradient(bare, bare[0], scale) for scale in (1.0, factor))
    assert not 0.5 < float(b.norm() / a.norm()) < 2


def test_schedules_start_and_end_where_they_should(ch02):
    assert ch02.cosine(0) == 1
    assert ch02.cosine(40) == pytest.approx(0, abs=1e-12)
    fallen = [ch02.cosine(step) for step in range(41)]
    assert all(b < a for a, b in zip(fallen, fallen[1:], strict=False))


def test_stepped_once_an_epoch_the_rate_stays_in_the_warm_up(ch02):
    assert max(ch02.rates_seen(1)) == pytest.approx(0.1, rel=1e-3)
    assert max(ch02.rates_seen(25)) < 0.01


def test_separable_layers_keep_shapes_and_save_arithmetic(ch02):
    x = torch.randn(2, 1, 28, 28)
    dense, light = models.mini_resnet(8, seed=0), ch02.separable(8)
    assert light(x).shape == dense(x).shape
    inner = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
    assert (
        ch02.Separable(inner)(torch.randn(1, 8, 14, 14)).shape
        == inner(torch.randn(1, 8, 14, 14)).shape
    )
    count = [sum(p.numel() for p in m.parameters()) for m in (dense, light)]
    assert count[1] < count[0] / 2


def test_the_recipe_is_training_fit_bit_for_bit(ch02, one_thread):
    seed = int(torch.randint(0, 1000, ()))
    recipe = training.Recipe(epochs=2, seed=seed, batch_size=50, warmup=0.4)
    ours, theirs = models.mini_resnet(8, seed=seed), models.mini_resnet(8, seed=seed)
    ch02.recipe_loop(ours, IMAGES[:330], LABELS[:330], recipe)
    training.fit(theirs, IMAGES[:330], LABELS[:330], recipe, progress=False)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_range_test_goes_through_all_rates(ch02):
    rates, losses = ch02.range_test(
        models.mini_resnet(8, seed=0), ch02.in_memory(models.normalise), 1e-3, 1.0, 12
    )
    assert (rates[0], rates[-1]) == pytest.approx((1e-3, 1.0))
    assert len(losses) == 12
    assert np.isfinite(losses).all()
