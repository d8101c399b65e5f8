"""The two networks the chapters share: a small residual network and the baseline trained with the
course's recipe.
"""

import copy
import threading

import torch
from torch import Tensor, nn

from course_utils import data

MEAN, STD = 0.2860, 0.3530
"""Mean and standard deviation of a Fashion-MNIST pixel on the 0–1 scale, over the 55,000 training
images.
"""
_drawing = threading.Lock()


class Block(nn.Module):
    """Two 3×3 convolutions with a residual path; a 1×1 convolution where the shape changes (He et
    al. 2016, §3.3).

    >>> Block(8, 16, stride=2)(torch.zeros(1, 8, 14, 14)).shape
    torch.Size([1, 16, 7, 7])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = (
            nn.ReLU(),
            nn.ReLU(),
        )  # two modules: quantizers refuse one that is used twice
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) → (B, outputs, H/stride, W/stride)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class MiniResNet(nn.Module):
    """A stride-2 stem, three residual stages of `width`, 2·`width` and 4·`width` channels, pooling,
    one linear layer.

    >>> MiniResNet(width=8)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 28, 28) → logits (B, classes)
        x = self.stages(self.stem(x))
        return self.fc(self.pool(x).flatten(1))


def mini_resnet(width: int = 32, *, seed: int | None = None) -> MiniResNet:
    """An untrained network; `seed` fixes its weights without touching torch's global generator.

    width 32: 308 thousand parameters, 10 million multiply–accumulates an image; width 16: a quarter
    of both. Train widths from 8 on: with 4 channels in channels_last, torch 2.14's AVX2 kernels
    write past their buffers.

    >>> sum(p.numel() for p in mini_resnet(32).parameters())
    308074
    >>> torch.equal(mini_resnet(8, seed=1).fc.weight, mini_resnet(8, seed=1).fc.weight)
    True
    """
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1.")
    if seed is None:
        return MiniResNet(width)
    with _drawing, torch.random.fork_rng(devices=[]):  # threads share one generator
        torch.manual_seed(seed)
        return MiniResNet(width)


def baseline() -> MiniResNet:
    """The shipped network (width 32) in eval mode. It has never seen a validation or test image:
    datasets/README.md.

    >>> images, labels = data.fashion_mnist("test")
    >>> with torch.inference_mode():
    ...     right = baseline()(normalise(images[:500])).argmax(1) == labels[:500]
    >>> bool(right.float().mean() > 0.85)
    True
    """
    from safetensors.torch import load_file

    model = mini_resnet(32)
    model.load_state_dict(load_file(data.dataset_file("baseline.safetensors")))
    return model.eval()


def folded(model: MiniResNet) -> MiniResNet:
    """A copy of a network in eval mode, with every BatchNorm folded into its convolution by torch's
    own `fuse_conv_bn_eval`: the same function, for inference.

    >>> sum(isinstance(m, nn.BatchNorm2d) for m in folded(mini_resnet(8)).modules())
    0
    """
    fold = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = copy.deepcopy(model).eval()
    model.stem = nn.Sequential(fold(*model.stem[:2]), model.stem[2])
    for block in model.stages:
        block.conv1, block.bn1 = fold(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fold(block.conv2, block.bn2), nn.Identity()
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = fold(*block.shortcut)
    return model


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels (N, 1, 28, 28) → float32 with mean 0 and standard deviation 1, what every
    network here expects.

    >>> x = normalise(torch.full((1, 1, 28, 28), 255, dtype=torch.uint8))
    >>> x.dtype, round(float(x.mean()), 3)
    (torch.float32, 2.023)
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"normalise takes the uint8 images of data.fashion_mnist, not {images.dtype}: they are"
            " normalised once."
        )
    return images.float().div_(255).sub_(MEAN).div_(STD)
