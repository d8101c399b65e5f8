"""What chapter 12's builder works on: a network whose BatchNorms are folded, and the input that
reaches each of its convolutions.
"""

import copy

import torch
from torch import Tensor, nn

from course_utils.models import MiniResNet


def folded(model: MiniResNet) -> MiniResNet:
    """A copy of a mini-ResNet in eval mode with every BatchNorm inside its convolution, by torch's
    own `fuse_conv_bn_eval`.

    >>> from course_utils import models
    >>> sum(isinstance(m, nn.BatchNorm2d) for m in folded(models.mini_resnet(8)).modules())
    0
    """
    fold = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.stem = nn.Sequential(fold(model.stem[0], model.stem[1]), model.stem[2])
    for block in model.stages:
        block.conv1, block.bn1 = fold(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fold(block.conv2, block.bn2), nn.Identity()
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = fold(*block.shortcut)
    return model


def convolutions(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Each convolution of `model` by name, with the input that reaches it when the model gets `x`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
    >>> found = convolutions(net, torch.ones(1, 1, 9, 9))
    >>> {name: given.shape[1] for name, (_, given) in found.items()}
    {'0': 1, '1': 4}
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
            inputs[name] = given[0]

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (layers[name], inputs[name]) for name in layers}
