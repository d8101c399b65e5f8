"""What chapter 06 teaches, taken from its cells: grids, scales, observers, training through the
rounding, bias correction; and its plumbing around ONNX Runtime.
"""

import copy

import pytest
import torch
from conftest import taught
from torch import nn

from course_utils import data, models, onnx_int8, training


@pytest.fixture(scope="module")
def ch06():
    space = taught("06", copy=copy, training=training, models=models)
    space.net = models.folded(models.baseline())
    return space


def shaken(width: int = 8) -> nn.Module:
    """A network whose BatchNorms are not the identity they start as."""
    net = models.mini_resnet(width, seed=0).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            m.weight.data.normal_()
            m.bias.data.normal_()
    return net.eval()


def test_folding_changes_no_output_and_leaves_no_batchnorm(ch06):
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    net = shaken()
    folded = models.folded(net)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(net(x), folded(x), atol=1e-10)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_with_a_scale_a_channel_folding_and_rounding_can_be_exchanged(ch06, bits):
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    net = shaken()
    one, other = models.folded(ch06.rounded(net, bits)), ch06.rounded(models.folded(net), bits)
    assert torch.allclose(one(x), other(x), atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_stays_within_half_a_step_and_uses_no_more_levels(ch06, bits):
    w = torch.randn(6, 5, 3, 3)
    scale = ch06.largest(w, bits)
    rounded = ch06.to_grid(w, scale, bits)
    # half a step, and five roundings of 2⁻²⁴ at up to 127 steps: 0.00004 of one
    assert ((rounded - w).abs() <= scale.view(-1, 1, 1, 1) * 0.5001).all()
    for row in rounded:
        assert len(row.unique()) < 2**bits
    assert torch.allclose(ch06.to_grid(rounded, scale, bits), rounded, atol=1e-6)
    zeros = torch.zeros(2, 3)
    for scale_of in (ch06.largest, ch06.least_squares):
        assert ch06.to_grid(zeros, scale_of(zeros, bits), bits).abs().sum() == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_least_squares_scale_is_never_worse_and_near_the_best(ch06, bits):
    w = torch.randn(5, 300)
    top = 2 ** (bits - 1) - 1

    def error(scale):
        return (ch06.to_grid(w, scale, bits) - w).square().sum(1)

    found = error(ch06.least_squares(w, bits))
    assert (found <= error(ch06.largest(w, bits)) * 1.0001).all()
    fine = torch.stack([error(s * w.abs().amax(1) / top) for s in torch.linspace(0.02, 1, 800)])
    assert (found <= 1.02 * fine.amin(0)).all()


def test_only_the_named_widths_are_used(ch06):
    names = [n for n, m in ch06.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    one = ch06.rounded(ch06.net, dict.fromkeys(names, 8) | {"fc": 2})
    assert max(len(row.unique()) for row in one.fc.weight) <= 3
    assert max(len(row.unique()) for row in one.stages[0].conv1.weight.flatten(1)) > 30


def test_batchnorm_anew_counts_what_the_images_give(ch06):
    images = data.fashion_mnist("validation")[0][:200]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    net[1].running_mean += 7
    ch06.batchnorm_anew(net, images)
    parts = [net[0](models.normalise(part)) for part in images.split(128)]
    means = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    assert torch.allclose(net[1].running_mean, means, atol=1e-4)
    assert not net.training


@pytest.mark.parametrize("steps", ["LargestSteps", "LearnedSteps"])
def test_the_gradient_goes_straight_through_to_the_stored_weight(ch06, steps):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    qat = ch06.qat(nn.Sequential(layer), 4, getattr(ch06, steps))
    qat(torch.ones(1, 5)).sum().backward()
    stored = qat[0].parametrizations.weight.original
    scale = ch06.least_squares(stored.detach(), 4)[:, None]
    inside = (stored / scale).abs() < 7 if steps == "LearnedSteps" else torch.ones(3, 5)
    assert torch.allclose(stored.grad, inside.float())
    assert max(len(row.unique()) for row in qat[0].weight) <= 15


def test_the_scale_learns_with_lsq_s_gradient(ch06):
    w = torch.randn(4, 30)
    see = ch06.LearnedSteps(w, 2)
    weights = torch.randn(4, 30)
    (see(w) * weights).sum().backward()
    steps = w / see.scale.detach()
    slope = torch.where(steps.abs() < 1, steps.round() - steps, steps.sign())  # Esser 2020, eq. 3
    due = (slope * weights).sum(1, keepdim=True) * 30**-0.5
    assert torch.allclose(see.scale.grad, due, rtol=1e-3, atol=1e-5)


def test_an_observer_of_zeros_keeps_zeros_and_a_percentile_cuts_its_share(ch06):
    observer = ch06.MinMaxObserver()
    assert observer(None, (torch.zeros(3, 4),)) is None
    observer.watching = False
    (seen,) = observer(None, (torch.zeros(3, 4),))
    assert torch.equal(seen, torch.zeros(3, 4))
    narrow = ch06.percentile(10.0)()
    narrow(None, (torch.arange(1001.0),))
    assert 940 < narrow.high < 960
    assert narrow.low == 0


def test_static_int8_by_hand_keeps_the_accuracy_and_sees_the_relus(ch06):
    images, labels = data.fashion_mnist("validation")
    model, watching = ch06.static_int8(ch06.net, models.normalise(images[:128]))
    before = training.accuracy(ch06.net, images[:600], labels[:600])
    assert abs(training.accuracy(model, images[:600], labels[:600]) - before) < 0.01
    assert watching["stem.0"].low < 0
    assert all(o.low == 0 for name, o in watching.items() if name != "stem.0")


def test_bias_correction_takes_the_mean_error_back_layer_by_layer(ch06):
    images = data.fashion_mnist("validation")[0][:300]
    plain = ch06.rounded(ch06.net, 3, ch06.least_squares)
    corrected = ch06.bias_corrected(ch06.net, 3, images)
    exact = training.predict(ch06.net, images).mean(0)
    error = (training.predict(corrected, images).mean(0) - exact).abs().max()
    assert error < 1e-3 < (training.predict(plain, images).mean(0) - exact).abs().max()


def test_saturating_pairs_are_those_beyond_16_bits(ch06):
    layer = nn.Conv2d(4, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.1, 0.1, 0.1, 0.1]]).view(2, 4, 1, 1)
    x = torch.ones(1, 4, 1, 1)  # every code is 255, every weight of the first row ±127
    assert ch06.saturating_pairs(layer, x, per_channel=False) == 0.25
    assert ch06.saturating_pairs(layer, x, per_channel=True) == 0.75
    assert ch06.saturating_pairs(layer, 0 * x, per_channel=True) == 0


def test_int8_files_compute_in_integers_and_say_so(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(8, 1, 12, 12)
    onnx_int8.export(net, (x,), tmp_path / "net.onnx")
    onnx_int8.to_int8(tmp_path / "net.onnx", tmp_path / "int8.onnx", x.split(4))
    onnx_int8.to_dynamic_int8(tmp_path / "net.onnx", tmp_path / "dynamic.onnx")
    kinds = {n: onnx_int8.look_inside(tmp_path / f"{n}.onnx", x, calls=2) for n in ("net", "int8")}
    assert kinds["net"][0]["Conv"] == 2
    assert kinds["net"][1]["Conv"] > 0
    assert kinds["int8"][0]["QLinearConv"] == 2
    assert not kinds["int8"][0]["Conv"]
    dynamic, _ = onnx_int8.look_inside(tmp_path / "dynamic.onnx", x, calls=2)
    assert dynamic["ConvInteger"] == 2
    with pytest.raises(KeyError, match="int7"):
        onnx_int8.to_int8(
            tmp_path / "net.onnx", tmp_path / "x.onnx", x.split(4), activations="int7"
        )
