"""What chapter 02 teaches, taken from its cells: equal batches, schedules, BatchNorm's cure, Muon,
the recipe.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
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
    given |= {
        "test_images": IMAGES[:100],
        "test_labels": LABELS[:100],
        "training": training,
        "itertools": itertools,
        "update_bn": update_bn,
    }
    return taught("02", STEPS=40, SMOKE=True, **given)


def test_one_by_one_and_at_once_are_the_same_bits_in_any_order(ch02):
    seed = int(torch.randint(0, 2**31, ()))
    order = torch.cat(list(itertools.islice(ch02.shuffled(len(IMAGES), seed, 32), 5)))
    loader = DataLoader(ch02.OneByOne(IMAGES, LABELS), batch_size=32, sampler=order.tolist())
    for (x, y), (a, b) in zip(loader, ch02.in_memory(ch02.unit, seed, 32), strict=False):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_training_takes_its_steps_and_rates_and_no_more(ch02):
    net, seen = models.mini_resnet(8, seed=0), []
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    batches = ch02.in_memory(models.normalise)
    assert ch02.train(net, batches, optimizer, 4, factor=lambda u: u) is net
    assert seen == pytest.approx([0.5 / 8, 0.5 * 3 / 8, 0.5 * 5 / 8, 0.5 * 7 / 8])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not net.training
    later = list(itertools.islice(ch02.in_memory(models.normalise), 5))[-1]
    assert torch.equal(next(batches)[0], later[0]), "four batches were taken"


def test_an_average_follows_every_step(ch02):
    net = models.mini_resnet(8, seed=0)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    by_hand, optimizer = None, torch.optim.SGD(net.parameters(), 0.1)

    def follow(*_):
        nonlocal by_hand
        now = net.fc.weight.detach().clone()
        by_hand = now if by_hand is None else 0.5 * by_hand + 0.5 * now

    optimizer.register_step_post_hook(follow)
    ch02.train(net, ch02.in_memory(models.normalise), optimizer, 5, average=average)
    torch.testing.assert_close(average.module.fc.weight.detach(), by_hand)


def test_averages_taken_anew_change_no_weight_and_forget_what_they_held(ch02):
    net, spoiled = ch02.resnet(8), ch02.resnet(8)
    for buffer in spoiled.buffers():
        buffer.fill_(7)
    before = [p.clone() for p in net.parameters()]
    assert ch02.anew(net) == ch02.anew(spoiled)
    torch.testing.assert_close(net.stem[1].running_mean, spoiled.stem[1].running_mean)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("factor", [1e-2, 255.0])
def test_batchnorm_takes_a_scale_out_and_a_plain_network_does_not(ch02, factor):
    def gradient(net, first, scale):
        net.zero_grad()
        F.cross_entropy(net(scale * x), y).backward()
        return first.weight.grad.clone()

    x, y = models.normalise(IMAGES[:32]).double(), LABELS[:32]
    cured, bare = models.mini_resnet(8, seed=1).double().train(), ch02.plain(1).double()
    cured.stem[1].eps = 1e-14
    a, b = (gradient(cured, cured.stem[0], scale) for scale in (1.0, factor))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    a, b = (gradient(bare, bare[0], scale) for scale in (1.0, factor))
    assert not 0.5 < float(b.norm() / a.norm()) < 2


def test_he_keeps_the_deviation_and_the_default_shrinks_it(ch02):
    x = models.normalise(IMAGES[:500])
    default, he = (
        [net(x).std().item() for net in nets]
        for nets in [[ch02.plain(seed, he) for seed in range(5)] for he in (False, True)]
    )
    assert max(default) < 0.2
    assert min(he) > 0.5


@pytest.mark.settled
def test_the_falling_rate_rises_for_a_tenth_and_ends_at_zero(ch02):
    assert ch02.falling(0) == 0
    assert ch02.falling(0.1) == pytest.approx(1)
    assert ch02.falling(1) == 0
    fallen = [ch02.falling(u) for u in np.linspace(0.1, 1, 50)]
    assert all(b < a for a, b in zip(fallen, fallen[1:], strict=False))


@pytest.mark.settled
@pytest.mark.parametrize("shape", [(16, 144), (16, 1, 3, 3), (64, 32, 1, 1), (10, 64)])
def test_muon_keeps_the_directions_and_levels_their_strength(ch02, shape):
    torch.manual_seed(0)
    update = torch.randn(shape).double()
    u, strength, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
    update = (u * strength.clamp(min=strength.max() / 20) @ v).view(shape)
    level = u.T @ ch02.orthogonal(update).flatten(1) @ v.T
    assert ch02.orthogonal(update).shape == update.shape
    assert level.diagonal().min() > 0.6
    assert level.diagonal().max() < 1.25
    assert (level - level.diagonal().diag()).abs().max() < 1e-6


@pytest.mark.settled
def test_where_a_weight_has_one_dimension_muon_is_sgd_with_momentum(ch02):
    a, b = (torch.nn.Parameter(torch.linspace(0.1, 1, 5)) for _ in range(2))
    ours = ch02.Muon([a], 0.1, momentum=0.7)
    theirs = torch.optim.SGD([b], 0.1, momentum=0.7, nesterov=True)
    for _ in range(4):
        for weight, optimizer in ((a, ours), (b, theirs)):
            optimizer.zero_grad()
            (weight**2 / (1 + weight)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(a, b)


def test_stepped_once_an_epoch_the_rate_stays_in_the_warm_up(ch02):
    assert max(ch02.rates_seen(1)) == pytest.approx(0.1, rel=1e-3)
    assert max(ch02.rates_seen(25)) < 0.01


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
