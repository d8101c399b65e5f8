"""What chapter 06 teaches, taken from its cells: folding, rounding, observers, the straight-through
estimator.
"""

import copy

import pytest
import torch
from conftest import taught
from torch import nn

from course_utils import data, measure, models, training


@pytest.fixture(scope="module")
def ch06():
    layers: dict[str, nn.Module] = {}
    space = taught("06", copy=copy, training=training, layers=layers, measure=measure)
    space.net = space.folded(models.baseline())
    layers.update(
        {n: m for n, m in space.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    )
    return space


def test_folding_changes_no_output_and_leaves_no_batchnorm(ch06):
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    net = models.mini_resnet(8, seed=0).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):  # not the identity it starts as
            (
                m.running_mean.normal_(),
                m.running_var.uniform_(0.3, 3),
                m.weight.data.normal_(),
                m.bias.data.normal_(),
            )
    net.eval()
    folded = ch06.folded(net).double()
    for (_, a), (_, b) in zip(net.named_modules(), folded.named_modules(), strict=False):
        assert type(a).__name__ == "BatchNorm2d" or not isinstance(b, nn.BatchNorm2d)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(net(x), folded(x), atol=1e-10)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_stays_within_half_a_step_and_uses_no_more_levels(ch06, bits, per_channel):
    w = torch.randn(6, 5, 3, 3)
    rounded = ch06.round_to_bits(w, bits, per_channel)
    axes = (1, 2, 3) if per_channel else (0, 1, 2, 3)
    step = w.abs().amax(axes, keepdim=True) / (2 ** (bits - 1) - 1)
    # half a step, and five roundings of 2⁻²⁴ at up to 127 steps: 0.00004 of one
    assert ((rounded - w).abs() <= step * 0.5001).all()
    for row in rounded if per_channel else [rounded]:
        assert len(row.unique()) <= 2**bits
    again = ch06.round_to_bits(rounded, bits, per_channel)
    assert torch.allclose(again, rounded, atol=1e-6)
    assert ch06.round_to_bits(torch.zeros(2, 3), bits, per_channel).abs().sum() == 0


def test_only_the_named_layers_are_rounded(ch06):
    one = ch06.with_rounded_weights(ch06.net, 2, True, {"fc"})
    assert not torch.equal(one.fc.weight, ch06.net.fc.weight)
    assert torch.equal(one.stem[0].weight, ch06.net.stem[0].weight)
    none = ch06.with_rounded_weights(ch06.net, 2, True, set())
    assert all(
        torch.equal(a, b) for a, b in zip(none.parameters(), ch06.net.parameters(), strict=True)
    )


def test_the_gradient_goes_straight_through_to_the_stored_weight(ch06):
    layer = nn.Linear(5, 3)
    qat = ch06.qat(nn.Sequential(layer), 3)
    qat(torch.ones(1, 5)).sum().backward()
    stored = qat[0].parametrizations.weight.original
    assert torch.equal(stored.grad, torch.ones_like(stored))
    assert len(qat[0].weight.unique()) < stored.numel()


def test_static_int8_by_hand_keeps_the_accuracy_and_sees_the_relus(ch06):
    images, labels = data.fashion_mnist("validation")
    model, observers = ch06.static_int8(ch06.net, images[:128])
    assert (
        abs(
            training.accuracy(model, images[:600], labels[:600])
            - training.accuracy(ch06.net, images[:600], labels[:600])
        )
        < 0.01
    )
    assert observers["stem.0"].low < 0
    assert all(o.low == 0 for name, o in observers.items() if name != "stem.0")
