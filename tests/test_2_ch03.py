"""Chapter 03: the surgery equals the mask, nothing pruned changes nothing, what must not be cut is
refused, what is stored comes back.
"""

import copy
import functools
import json
import math
import operator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import taught
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

from course_utils import measure, models, training
from course_utils.course import build
from course_utils.course.chapters import chapters


@pytest.fixture
def ch03(tmp_path):
    """The functions the chapter teaches."""
    given = {"folder": tmp_path, "SMOKE": True, "groups": {}, "images": torch.zeros(1)}
    given |= {"test_images": None, "test_labels": None, "json": json, "math": math}
    given |= {"functools": functools}
    given |= {"copy": copy, "training": training, "models": models, "safe_open": safe_open}
    given |= {"load_file": load_file, "save_file": save_file}
    given |= {"update_bn": update_bn, "PASSES_ON": passes_on()}
    return taught("03", **given)


def passes_on():
    """What the chapter lets a list of channels pass through."""
    space = {"nn": nn, "torch": torch, "F": F, "operator": operator}
    for cell in build.cells(chapters(["03"])[0]):
        if cell.cell_type == "code" and cell.source.startswith("PASSES_ON"):
            exec(cell.source, space)
    return space["PASSES_ON"]


@pytest.fixture
def net():
    """A small network whose BatchNorms have statistics of their own, in fp64."""
    net = models.mini_resnet(8, seed=1)
    generator = torch.Generator().manual_seed(2)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return net.double().eval()


X = torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def pruned(ch03, net, widths):
    return ch03.prune(net, widths, groups=ch03.channel_groups(net))


def masked(ch03, net, group, keep):
    return ch03.silenced(net, group, keep)


def test_pruning_nothing_is_the_identity(ch03, net):
    widths = {name: net.get_submodule(name).out_channels for name in ch03.channel_groups(net)}
    assert torch.equal(pruned(ch03, net, widths)(X), net(X))
    assert torch.equal(pruned(ch03, net, {})(X), net(X))


def test_surgery_equals_the_mask_in_every_group(ch03, net):
    for name, group in ch03.channel_groups(net).items():
        keep = torch.arange(1, net.get_submodule(name).out_channels, 2)
        small = copy.deepcopy(net)
        ch03.cut(small, group, keep)
        wanted = masked(ch03, net, group, keep)(X)
        # 20 layers of up to 288 products, rounded to 1.1e-16 of values below 100
        assert (small(X) - wanted).abs().max() <= 1e-10, name
        assert measure.macs(small, X[:1]) < measure.macs(net, X[:1])


def test_groups_are_right_for_a_network_the_chapter_never_saw(ch03):
    import torchvision

    net = torchvision.models.resnet18(num_classes=10).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    groups = ch03.channel_groups(net)
    assert sum(len(g["out"]) for g in groups.values()) == sum(
        isinstance(m, nn.Conv2d) for m in net.modules()
    )
    for name, group in groups.items():
        keep = torch.arange(0, net.get_submodule(name).out_channels, 2)
        small = copy.deepcopy(net)
        ch03.cut(small, group, keep)
        with torch.no_grad():
            wanted = masked(ch03, net, group, keep)(x)
            # 20 layers of up to 4608 products: 1e5 roundings to 1.1e-16, were all of one sign
            bound = 1e-10 * max(1.0, float(wanted.abs().max()))
            assert (small(x) - wanted).abs().max() <= bound, name


class Joined(nn.Module):
    """Two convolutions whose channels stand side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


class Twice(nn.Module):
    """One convolution, called two times; or two of them with one weight."""

    def __init__(self, tied):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1) if tied else self.a
        self.b.weight = self.a.weight
        self.c = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), "grouped"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)), "grouped"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 2)), "not cut"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 2, 3)), "not cut"),
        (Joined(), "cat"),
        (Twice(tied=False), "twice"),
        (Twice(tied=True), "twice"),
    ],
)
def test_what_must_not_be_cut_is_refused(ch03, net, why):
    with pytest.raises(ValueError, match=why):
        ch03.channel_groups(net)


class Flat(nn.Module):
    """A feature map of nine pixels, flattened by the function that the groups may pass through."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(36, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.conv(x), 1))


def test_a_linear_layer_that_reads_pixels_is_refused(ch03):
    with pytest.raises(ValueError, match="reads 36 numbers from 4 channels"):
        ch03.channel_groups(Flat())


def test_packed_weights_come_back(ch03):
    for shape in [(3, 5), (2, 1, 3, 3), (7,)]:
        weight = torch.randn(shape) * (torch.rand(shape) > 0.7)
        assert torch.equal(ch03.unpack(*ch03.pack(weight), shape), weight)


def test_two_four_keeps_exactly_two_of_four_even_on_ties(ch03):
    for weight in (torch.randn(6, 16), torch.ones(6, 16)):
        assert ((ch03.two_four(weight) != 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_zeroed_zeroes_exactly_the_share_even_on_ties(ch03, net, share):
    scores = {name: torch.ones_like(w) for name, w in ch03.prunable(net).items()}
    weights = ch03.prunable(ch03.zeroed(net, scores, share)).values()
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == round(share * total)


def test_recalibration_finds_the_statistics_of_the_data(ch03):
    images = torch.randint(0, 256, (500, 1, 28, 28), dtype=torch.uint8)
    stack = ch03.recalibrate(nn.Sequential(nn.BatchNorm2d(1, momentum=0.3)), images)
    x = models.normalise(images)
    assert float(stack[0].running_mean) == pytest.approx(float(x.mean()), abs=1e-3)
    assert float(stack[0].running_var) == pytest.approx(float(x.var()), rel=1e-2)
    assert stack[0].momentum == 0.3
    assert not stack.training


def test_a_pruned_network_is_stored_without_pickle_and_comes_back(tmp_path, ch03):
    traced = ch03.channel_groups(models.baseline())
    small = ch03.prune(models.baseline(), {"stages.0.conv1": 5, "stages.1.conv2": 9}, groups=traced)
    for function in (ch03.save, ch03.load):
        function.__globals__["traced"] = traced
    written = ch03.save(small, "small.safetensors")
    again, widths = ch03.load("small.safetensors")
    assert widths["stages.0.conv1"] == 5
    assert written == (tmp_path / "small.safetensors").stat().st_size
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())


def test_half_zero_leaves_half_of_each_row_or_of_every_four(ch03):
    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))

    bert, loud = Bert(), {"0": torch.ones(8), "1": torch.ones(6)}
    for inputs in (None, loud):
        for layer in ch03.linears(ch03.half_zero(bert, inputs)).values():
            assert ((layer.weight != 0).sum(1) == layer.in_features // 2).all()
    quiet = loud | {"0": torch.tensor([1.0] * 4 + [0.0] * 4)}
    kept = ch03.linears(ch03.half_zero(bert, quiet))["0"].weight != 0
    assert kept[:, :4].all()
    assert not kept[:, 4:].any()
    fours = ch03.linears(ch03.half_zero(bert, {"0": torch.ones(8), "1": torch.ones(6)}, 2))
    assert all(((m.weight != 0).view(-1, 2).sum(1) == 1).all() for m in fours.values())


def test_taylor_scores_are_each_images_own_first_order_change(ch03):
    names = ["stages.0.conv1", "stages.1.conv1", "stages.2.conv1"]
    net = models.mini_resnet(8, seed=1).eval()
    pixels = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    told = {"INNER": names, "images": pixels, "labels": torch.tensor([1, 0, 7])}
    ch03.taylor_scores.__globals__.update(told)
    found = ch03.taylor_scores(net, count=3)
    for name in names:
        due = torch.zeros(len(found[name]))
        for i in range(3):  # the same change, by letting each channel fade a little
            scale = torch.ones(len(due), requires_grad=True)
            layer = net.get_submodule(name)
            hook = layer.register_forward_hook(lambda m, x, y, s=scale: y * s.view(1, -1, 1, 1))
            F.cross_entropy(
                net(models.normalise(pixels[i : i + 1])), told["labels"][[i]]
            ).backward()
            hook.remove()
            due += scale.grad.abs() / 3
        torch.testing.assert_close(found[name], due, rtol=1e-3, atol=1e-6)


class Layer(nn.Module):
    """A transformer's layer as far as the cuts look into it: two heads of two, six neurons."""

    def __init__(self):
        super().__init__()
        self.intermediate, self.output, self.attention = nn.Module(), nn.Module(), nn.Module()
        self.intermediate.dense, self.output.dense = nn.Linear(4, 6), nn.Linear(6, 4)
        self.attention.output = nn.Module()
        self.attention.output.dense = nn.Linear(4, 4)


@pytest.fixture
def small_bert():
    bert = nn.Module()
    bert.config = SimpleNamespace(num_attention_heads=2)
    bert.encoder = nn.Module()
    bert.encoder.layer = nn.ModuleList(Layer() for _ in range(3))
    return bert


def test_cut_neurons_compute_what_the_mask_computes(ch03, small_bert):
    for layer in small_bert.encoder.layer:
        nn.init.ones_(layer.output.dense.weight)  # so the inputs alone decide
    loud = {f"layer.{i}.output.dense": torch.tensor([3.0, 0, 2, 0, 0, 1]) for i in range(3)}
    thin = ch03.without_neurons(small_bert, loud)
    x = torch.randn(5, 4)
    for old, new in zip(small_bert.encoder.layer, thin.encoder.layer, strict=True):
        hidden = torch.relu(old.intermediate.dense(x)) * torch.tensor([1.0, 0, 1, 0, 0, 1])
        small = new.output.dense(torch.relu(new.intermediate.dense(x)))
        torch.testing.assert_close(small, old.output.dense(hidden))
        assert old.intermediate.dense.weight.shape == (6, 4)


def test_a_head_that_goes_adds_nothing_and_the_louder_one_stays(ch03, small_bert):
    key = "layer.{}.attention.output.dense"
    loud = {key.format(i): torch.tensor([0.1, 0.1, 9.0, 9.0]) for i in range(3)}
    thin = ch03.without_heads(small_bert, loud)
    for old, new in zip(small_bert.encoder.layer, thin.encoder.layer, strict=True):
        before, after = (layer.attention.output.dense.weight for layer in (old, new))
        assert not after[:, :2].any()
        assert torch.equal(after[:, 2:], before[:, 2:])


def test_the_named_layers_stay_in_their_order(ch03, small_bert):
    thin = ch03.without_layers(small_bert, (0, 2))
    weights = [layer.output.dense.weight for layer in thin.encoder.layer]
    due = [small_bert.encoder.layer[i].output.dense.weight for i in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(weights, due, strict=True))
    assert len(small_bert.encoder.layer) == 3


def test_fine_tuning_takes_as_many_steps_as_it_says(ch03, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "fit", lambda net, x, y, recipe, **_: seen.append((len(x), recipe))
    )
    told = {"images": torch.zeros(900, 1, 28, 28, dtype=torch.uint8)}
    told["labels"] = torch.zeros(900, dtype=torch.long)
    ch03.fine_tune.__globals__.update(told | {"recalibrate": lambda net: net})
    ch03.fine_tune(None, seed=3, steps=5, rate=0.07)
    count, recipe = seen[0]
    assert (-(-count // recipe.batch_size) * recipe.epochs, recipe.max_lr) == (5, 0.07)
