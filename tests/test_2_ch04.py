"""What chapter 04 teaches, taken from its cells: the loss and its limit, paired students, choices,
calibration, resuming, the real pair's path, the toy of two letters.
"""

import collections
import functools
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small, resnet18

from course_utils import data, models, training

PIXELS, LABELS = (t[:192] for t in data.fashion_mnist("train"))


def log_probabilities():
    """The toy's teacher, (before last, last, next), counted from the novel in another way."""
    letters = "abcdefghijklmnopqrstuvwxyz "
    text = re.sub("[^a-z]+", " ", data.austen().lower())[:200_000]
    counts = collections.Counter(zip(text, text[1:], text[2:], strict=False))
    table = torch.tensor([[[counts[a, b, c] for c in letters] for b in letters] for a in letters])
    return (table + 0.1).log().log_softmax(-1)


LOG_P = log_probabilities()


@pytest.fixture(scope="module")
def ch04():
    given = {"functools": functools, "shutil": shutil, "math": math, "models": models}
    given |= {"batch": training.batch, "predict": training.predict, "accuracy": training.accuracy}
    given |= {"side_by_side": training.side_by_side, "load_file": load_file, "save_file": save_file}
    given |= {"images": PIXELS, "labels": LABELS, "judge_x": PIXELS, "judge_y": LABELS}
    given |= {"test_x": PIXELS, "test_y": LABELS, "SEEDS": range(3), "TRIALS": (5,)}
    return taught("04", **given, EPOCHS=1, FEW=192, SMOKE=True, log_p=LOG_P)


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


def test_without_the_factor_the_teacher_weighs_a_sixteenth(ch04):
    y, v, i = LABELS[:9], torch.randn(9, 10), torch.arange(9)
    z = torch.randn(9, 10)
    whole, part = (ch04.distilled(y, v, 4.0, 1.0, square=s)(z, i) for s in (True, False))
    torch.testing.assert_close(whole, 16 * part)
    torch.testing.assert_close(ch04.hard(y, scale=0.1)(z, i), 0.1 * F.cross_entropy(z, y))


def test_students_of_one_seed_are_the_same_and_seeds_differ(ch04):
    loss = ch04.hard(LABELS)
    first, second = (
        ch04.together({"a": ch04.runs(loss, (3, 4)), "b": ch04.runs(loss, (3,), rate=0.01)})
        for _ in range(2)
    )
    assert [len(nets) for nets in first.values()] == [2, 1]
    for a, b in zip(first["a"], second["a"], strict=True):
        pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    weights = [net[1].fc.weight for net in (*first["a"], *first["b"])]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])  # the rate arrived


def test_threads_come_back_after_a_failed_run():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        training.side_by_side([lambda: 1 / 0])
    assert torch.get_num_threads() == before


def test_choices_are_made_by_the_judge(ch04):
    """Settings that differ in the rate alone, one of which can't learn anything."""
    loss = ch04.hard(LABELS)
    settings = {("still", 1e-9): loss, ("moves", 0.1): loss}
    assert ch04.tuned(settings, epochs=6) == ("moves", 0.1)
    assert ch04.tuned(settings, judge=PIXELS.flip(2), x=PIXELS.flip(2), epochs=6)[0] == "moves"
    assert {(1.0, 0.1), (4.0, 0.3)} < set(ch04.taught(torch.randn(192, 10)))


def test_calibration_error_of_the_sure_and_the_honest(ch04):
    sure = torch.full((100, 2), 0.0)
    sure[:, 0] = 50.0  # all confidence on class 0
    y = torch.tensor([0] * 70 + [1] * 30)
    assert ch04.calibration_error(sure, y) == pytest.approx(30, abs=1e-4)
    honest = torch.tensor([0.7, 0.3]).log().expand(100, 2)
    assert ch04.calibration_error(honest, y) == pytest.approx(0, abs=1e-4)
    # errors of opposite signs in two bins don't cancel
    two = torch.cat([sure, torch.tensor([0.6, 0.4]).log().expand(100, 2)])
    assert ch04.calibration_error(two, torch.cat([y, torch.zeros(100, dtype=torch.long)])) == (
        pytest.approx(35, abs=1e-4)
    )


def test_attention_is_blind_to_scale_and_to_the_order_of_channels(ch04):
    f = torch.randn(4, 6, 5, 5)
    wanted = ch04.attention(f)
    torch.testing.assert_close(
        wanted, ch04.attention(-3 * f[:, torch.randperm(6)]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(4))


def test_a_watched_student_computes_what_the_plain_one_does(ch04):
    watched, x = ch04.Watched(3, 128).eval(), models.normalise(PIXELS[:8])
    plain = ch04.coarse(models.mini_resnet(8, seed=3)).eval()
    torch.testing.assert_close(watched(x), plain(x))
    assert watched.translate(watched.map).shape[:2] == (8, 128)


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_run_with_dropout_stopped_anywhere_ends_in_the_same_bits(ch04, tmp_path, stop):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def go(name, seed, **how):
        torch.manual_seed(seed)
        net = mobilenet_v3_small(weights=None, num_classes=10)
        how = {"epochs": 3, "every": 2, "size": 16, "rate": 0.05} | how
        return ch04.resumable(net, PIXELS[:64], ch04.hard(LABELS), tmp_path / name, **how)

    try:
        whole = go("whole", 1)
        with pytest.raises(KeyboardInterrupt):
            go("broken", 1, stop=stop)
        half = tmp_path / "broken" / "step-0000099.part"  # a checkpoint that was being written
        half.mkdir(parents=True)
        again = go("broken", 2) if stop > 1 else None
    finally:
        torch.set_num_threads(threads)
    if again is not None:
        pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        left = [p.name for p in (tmp_path / "broken").glob("step-" + "[0-9]" * 7)]
        assert left == ["step-0000012"]


def test_the_path_of_the_real_pair_runs_and_is_not_trained_twice(ch04, tmp_path):
    makers = [functools.partial(ch04.seeded, m) for m in (resnet18, mobilenet_v3_large)]
    looks = PIXELS[16:20], PIXELS[20:28]
    arguments = (*makers, PIXELS[:16], LABELS[:16], looks, tmp_path)
    found = ch04.train_pair(*arguments, rates=(0.01, 0.1), epochs=1, size=8)
    assert {name for name, _ in found} == {"teacher", "hard", "distilled"}
    assert [tuple(z.shape) for z in found["hard", 0.1]] == [(4, 10), (8, 10)]
    assert not torch.equal(found["hard", 0.1][1], found["distilled", 0.1][1])
    again = ch04.train_pair(*arguments, rates=(0.01, 0.1), epochs=1, size=8)  # found finished
    for name, logits in found.items():
        torch.testing.assert_close(again[name], logits, atol=1e-4, rtol=1e-4)


def test_each_arm_of_the_pair_enters_with_its_better_rate(ch04):
    y = torch.tensor([0, 1, 1])
    good, bad = torch.eye(2)[y], torch.eye(2)[1 - y]
    found = {("a", 1): [bad, good], ("a", 2): [good, bad], ("b", 1): [good, good]}
    assert ch04.chosen(found, y, y) == {"a": [False] * 3, "b": [True] * 3}


def test_colour_pads_with_black(ch04):
    x = ch04.colour(PIXELS[:4])
    assert x.shape == (4, 3, 32, 32)
    torch.testing.assert_close(x[:, 0, 2:-2, 2:-2], models.normalise(PIXELS[:4])[:, 0])
    assert float(x[:, :, 0].std()) < 1e-6
    assert float(x[0, 0, 0, 0]) == pytest.approx(-models.MEAN / models.STD)
    assert isinstance(ch04.seeded(mobilenet_v3_large), nn.Module)


def test_the_rate_rises_shortly_and_ends_near_zero(ch04):
    rates = [ch04.schedule(step, 100, 0.1) for step in range(100)]
    assert 5 <= int(np.argmax(rates)) <= 12
    assert 0 < rates[-1] < 1e-3 < max(rates) <= 0.1


def test_texts_follow_their_author(ch04):
    texts = ch04.write(ch04.teacher_next, 4000, torch.Generator().manual_seed(1))
    assert texts.shape == (4000, 18)
    first = torch.bincount(texts[:, 2], minlength=27) / 4000
    assert float((first - LOG_P[26, 26].exp()).abs().max()) < 0.05


def test_forward_learns_the_mean_and_reversed_keeps_to_what_is_sure(ch04):
    forward, backward = (ch04.learn(False, d, 0, steps=300) for d in ("forward", "reverse"))
    judged = [ch04.surprise(q, torch.Generator().manual_seed(2)) for q in (forward, backward)]
    assert judged[0][0] < judged[1][0] - 0.05  # it covers more
    assert judged[0][1] > judged[1][1] + 0.05  # and is less plausible
    entropy = [-(q.exp() * q).sum(1).mean() for q in (forward, backward)]
    assert entropy[0] > entropy[1]
