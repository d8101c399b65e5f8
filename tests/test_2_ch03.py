"""Chapter 03: the surgery equals the mask, nothing pruned changes nothing, what is stored comes
back.
"""

import contextlib
import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from course_utils import measure, models, training
from course_utils.course import build
from course_utils.course.chapters import chapters


@pytest.fixture
def taught(run_cell, tmp_path):
    """The functions the chapter teaches, from its own cells (the definitions alone)."""
    import ast

    wanted = ("prunable", "pack", "two_four", "channel_groups", "cut", "masked", "recalibrate")
    source = build.cells(chapters(["03"])[0])
    space = {
        "contextlib": contextlib,
        "copy": copy,
        "json": json,
        "math": math,
        "models": models,
        "measure": measure,
        "training": training,
        "folder": tmp_path,
        "safe_open": safe_open,
        "load_file": load_file,
        "save_file": save_file,
    }
    for cell in source:
        if cell.cell_type != "code" or {"exercise", "solution", "wrong"} & set(build.tags(cell)):
            continue
        tree = ast.parse(cell.source)
        names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        if names & {*wanted, "save"}:
            definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
            space |= run_cell("\n\n".join(ast.unparse(n) for n in definitions), **space)
    return space


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


def test_pruning_nothing_is_the_identity(taught, net):
    widths = {name: net.get_submodule(name).out_channels for name in taught["channel_groups"](net)}
    assert torch.equal(taught["prune"](net, widths)(X), net(X))
    assert torch.equal(taught["prune"](net, {})(X), net(X))


def test_surgery_equals_the_mask_in_every_group(taught, net):
    for name, group in taught["channel_groups"](net).items():
        keep = torch.arange(1, net.get_submodule(name).out_channels, 2)
        small = copy.deepcopy(net)
        taught["cut"](small, group, keep)
        with taught["masked"](net, group, keep):
            wanted = net(X)
        # 20 layers of up to 288 products, rounded to 1.1e-16 of values below 100
        assert (small(X) - wanted).abs().max() <= 1e-10, name
        assert measure.macs(small, X[:1]) < measure.macs(net, X[:1])


def test_groups_are_right_for_a_network_the_chapter_never_saw(taught):
    import torchvision

    net = torchvision.models.resnet18(num_classes=10).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    groups = taught["channel_groups"](net)
    assert sum(len(g["out"]) for g in groups.values()) == sum(
        isinstance(m, nn.Conv2d) for m in net.modules()
    )
    for name, group in groups.items():
        keep = torch.arange(0, net.get_submodule(name).out_channels, 2)
        small = copy.deepcopy(net)
        taught["cut"](small, group, keep)
        with taught["masked"](net, group, keep), torch.no_grad():
            wanted = net(x)
            # 20 layers of up to 4608 products: 1e5 roundings to 1.1e-16, were all of one sign
            bound = 1e-10 * max(1.0, float(wanted.abs().max()))
            assert (small(x) - wanted).abs().max() <= bound, name


def test_a_grouped_convolution_is_refused(taught):
    with pytest.raises(ValueError, match="grouped"):
        taught["channel_groups"](nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)))


def test_packed_weights_come_back(taught):
    for shape in [(3, 5), (2, 1, 3, 3), (7,)]:
        weight = torch.randn(shape) * (torch.rand(shape) > 0.7)
        assert torch.equal(taught["unpack"](*taught["pack"](weight), shape), weight)


def test_two_four_keeps_exactly_two_of_four_even_on_ties(taught):
    for weight in (torch.randn(6, 16), torch.ones(6, 16)):
        assert ((taught["two_four"](weight) != 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_sparsify_zeroes_exactly_the_share_even_on_ties(taught, net, share):
    for weight in taught["prunable"](net).values():
        weight.data.fill_(1.0)
    weights = taught["prunable"](taught["sparsify"](net, share)).values()
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == round(share * total)


def test_recalibration_finds_the_statistics_of_the_data(taught):
    images = torch.randint(0, 256, (500, 1, 28, 28), dtype=torch.uint8)
    stack = taught["recalibrate"](nn.Sequential(nn.BatchNorm2d(1, momentum=0.3)), images)
    x = models.normalise(images)
    assert float(stack[0].running_mean) == pytest.approx(float(x.mean()), abs=1e-3)
    assert float(stack[0].running_var) == pytest.approx(float(x.var()), rel=1e-2)
    assert stack[0].momentum == 0.3
    assert not stack.training


def test_a_pruned_network_is_stored_without_pickle_and_comes_back(taught):
    small = taught["prune"](models.baseline(), {"stages.0.conv1": 5, "stages.1.conv2": 9})
    written = taught["save"](small, "small.safetensors")
    again, widths = taught["load"]("small.safetensors")
    assert widths["stages.0.conv1"] == 5
    assert written == (taught["folder"] / "small.safetensors").stat().st_size
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())
