"""What chapter 04 teaches, taken from its cells: the loss and its limit, paired students, resuming,
the real pair's path.
"""

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import mobilenet_v3_large, resnet18
from tqdm.auto import tqdm

from course_utils import data, machine, models

PIXELS, LABELS = (t[:192] for t in data.fashion_mnist("train"))


@pytest.fixture(scope="module")
def ch04():
    given = {
        "functools": functools,
        "shutil": shutil,
        "ThreadPoolExecutor": ThreadPoolExecutor,
        "tqdm": tqdm,
    }
    given |= {
        "load_file": load_file,
        "save_file": save_file,
        "models": models,
        "machine": machine,
        "data": data,
    }
    given |= {"train_x": models.normalise(PIXELS), "labels": LABELS, "SEEDS": range(3), "EPOCHS": 1}
    return taught("04", **given)


@pytest.mark.parametrize("T", [1.0, 3.0, 20.0])
def test_soft_loss_is_a_divergence_and_the_library_agrees(ch04, T):
    # in fp64: T² multiplies what fp32 rounds off
    z, v = (scale * torch.randn(7, 5, dtype=torch.float64) for scale in (1, 2))
    assert float(ch04.soft_loss(v, v, T)) == pytest.approx(0, abs=1e-12)
    assert float(ch04.soft_loss(z, v, T)) > 0
    y = torch.randint(0, 5, (7,))
    plain = 0.3 * T**2 * ch04.soft_loss(z, v, T) + 0.7 * F.cross_entropy(z, y)
    torch.testing.assert_close(
        plain, ch04.distilled(y, v, T, 0.3)(z, torch.arange(7)), atol=1e-9, rtol=1e-9
    )


def test_gradient_is_the_derived_one_and_ends_in_the_squared_error(ch04):
    z, v = torch.randn(6, 10), 3 * torch.randn(6, 10)
    for T in (1.0, 4.0):
        due = (F.softmax(z.double() / T, 1) - F.softmax(v.double() / T, 1)) / T
        torch.testing.assert_close(ch04.soft_gradient(z, v, T), due, atol=1e-9, rtol=0)
    limit = (ch04.centred(z) - ch04.centred(v)) / 10
    errors = [
        float((T**2 * ch04.soft_gradient(z, v, T) - limit).norm() / limit.norm())
        for T in (30, 300, 3000)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 0.01
    w = z.double().requires_grad_()
    ch04.squared(torch.zeros(6, dtype=torch.long), v.double(), alpha=1.0)(
        w, torch.arange(6)
    ).backward()
    torch.testing.assert_close(6 * w.grad, limit, atol=1e-9, rtol=0)


def test_students_of_one_seed_are_the_same_and_threads_come_back(ch04):
    before = torch.get_num_threads()
    first, second = (ch04.students(ch04.hard(LABELS), seeds=(3, 4, 5)) for _ in range(2))
    assert torch.get_num_threads() == before
    for a, b in zip(first, second, strict=True):
        assert all(
            torch.equal(x, y)
            for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )
    assert not torch.equal(first[0].fc.weight, first[1].fc.weight)


def test_threads_come_back_after_a_failed_run(ch04):
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        ch04.side_by_side([lambda: 1 / 0])
    assert torch.get_num_threads() == before


def test_attention_is_blind_to_scale_and_to_the_order_of_channels(ch04):
    f = torch.randn(4, 6, 5, 5)
    wanted = ch04.attention(f)
    torch.testing.assert_close(
        wanted, ch04.attention(-3 * f[:, torch.randperm(6)]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(4))


def test_features_are_what_the_network_computes(ch04):
    net, x = models.mini_resnet(8, seed=0).eval(), models.normalise(PIXELS[:8])
    last = ch04.features(net, x)[-1]
    torch.testing.assert_close(net.fc(net.pool(last).flatten(1)), net(x))


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_run_stopped_anywhere_ends_in_the_same_bits(ch04, tmp_path, stop):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        go = functools.partial(
            ch04.resumable, x=PIXELS[:128], loss=ch04.hard(LABELS), epochs=3, every=2
        )
        whole = go(models.mini_resnet(8, seed=1), folder=tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            go(models.mini_resnet(8, seed=1), folder=tmp_path / "broken", stop=stop)
        (tmp_path / "broken" / "step-0000099.part").mkdir(
            parents=True
        )  # a checkpoint that was being written
        again = go(models.mini_resnet(8, seed=2), folder=tmp_path / "broken") if stop > 1 else None
    finally:
        torch.set_num_threads(threads)
    if again is not None:
        pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert [p.name for p in (tmp_path / "broken").glob("step-" + "[0-9]" * 7)] == [
            "step-0000012"
        ]


def test_the_path_of_the_real_pair_runs_and_is_not_trained_twice(ch04, tmp_path):
    makers = (
        functools.partial(ch04.seeded, resnet18),
        functools.partial(ch04.seeded, mobilenet_v3_large),
    )
    arguments = (*makers, PIXELS[:16], LABELS[:16], PIXELS[16:24], tmp_path)
    found = ch04.train_pair(*arguments, epochs=1, size=8)
    assert {n: tuple(v.shape) for n, v in found.items()} == dict.fromkeys(
        ("teacher", "hard", "distilled"), (8, 10)
    )
    assert not torch.equal(found["hard"], found["distilled"])
    again = ch04.train_pair(*arguments, epochs=1, size=8)  # every run is found finished
    for name in found:
        torch.testing.assert_close(again[name], found[name], atol=1e-4, rtol=1e-4)


def test_colour_pads_with_black(ch04):
    x = ch04.colour(PIXELS[:4])
    assert x.shape == (4, 3, 32, 32)
    torch.testing.assert_close(x[:, 0, 2:-2, 2:-2], models.normalise(PIXELS[:4])[:, 0])
    assert float(x[:, :, 0].std()) < 1e-6
    assert float(x[0, 0, 0, 0]) == pytest.approx(-models.MEAN / models.STD)
    assert isinstance(ch04.seeded(mobilenet_v3_large), nn.Module)
