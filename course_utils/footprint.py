"""Where the bytes of a step go: by kind at its peak, over time, and drawn as bars.

`measure.peak_memory` gives the peak as one number, from the profiler's allocation events. Here two
more views: torch's own tracker, which sorts what lives at the peak into kinds, and the same events
in order.
"""

import functools
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from course_utils import models, plots

KINDS = {
    "PARAM": "parameters",
    "OPT": "optimizer's state",
    "GRAD": "gradients",
    "ACT": "activations",
    "TEMP": "temporary",
}
"""The tracker's kinds, in the words of chapter 08. It files the optimizer's temporary copies under
the optimizer, and the gradients of activations under temporary."""
MIB = 2**20


def by_kind(step: Callable[[], object], *owners: object) -> dict[str, int]:
    """Bytes of each kind at the peak of `step()` on the CPU, by torch's MemTracker.

    `owners` are the models and optimizers that live before the step; gradients that exist already
    should be set to None. MemTracker (torch.distributed._tools, a tool that its authors may still
    change) watches every operation and knows whose result each tensor is.

    >>> layer = torch.nn.Linear(250, 100, bias=False)
    >>> x = torch.ones(8, 250)
    >>> by_kind(lambda: layer(x).sum().backward(), layer)["parameters"]
    100000
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*owners)
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")  # it wonders at a hook that returns nothing
        step()
    peak = tracker.get_tracker_snapshot("peak").get(torch.device("cpu"), {})
    found = {str(getattr(kind, "name", kind)): size for kind, size in peak.items()}
    return {name: found.get(kind, 0) for kind, name in KINDS.items()}


def stacked(
    parts: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, float],
    *,
    xlabel: str,
    title: str,
    alt: str,
    mark: str = "measured",
) -> None:
    """One bar a row, made of parts, and a diamond at what was measured; the first row on top.

    >>> rows = {"small": {"weights": 1.0, "rest": 2.0}, "large": {"weights": 1.0, "rest": 8.0}}
    >>> stacked(rows, {"small": 3.1, "large": 9.2}, xlabel="MiB", title="It grows", alt="Two bars.")
    Figure: Two bars.
    """
    height = 0.34 * len(parts) + 1.7
    figure, ax = plots.axes(xlabel, "", title=title, height=height)
    left = np.zeros(len(parts))
    for i, part in enumerate(next(iter(parts.values()))):
        widths = np.array([row[part] for row in parts.values()])
        ax.barh(list(parts), widths, left=left, color=plots.COLOURS[i], label=part, height=0.62)
        left += widths
    ax.plot(list(marks.values()), list(marks), "D", color="black", label=mark, zorder=3, ms=5)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    plots.show(figure, alt)


def held_out(images: int, side: int) -> dict[str, tuple]:
    """Networks on which no rule of chapter 08 was made: name → (a function that makes one, the
    shape of its input, its type). Four of torchvision's with weights drawn at random, the course's
    own, and a GPT-2 of four layers; `images` of `side` pixels each way.

    >>> make, shape, dtype = held_out(2, 32)["SqueezeNet"]
    >>> make()(torch.zeros(shape, dtype=dtype)).shape
    torch.Size([2, 10])
    """
    from torchvision import models as zoo

    pixels, tokens = (images, 3, side, side), (max(1, images // 4), 128)
    small = functools.partial(models.mini_resnet, 32, seed=0)
    return {
        "ResNet-18": (functools.partial(zoo.resnet18, num_classes=10), pixels, torch.float32),
        "MobileNetV2": (functools.partial(zoo.mobilenet_v2, num_classes=10), pixels, torch.float32),
        "DenseNet-121": (functools.partial(zoo.densenet121, num_classes=10), pixels, torch.float32),
        "SqueezeNet": (functools.partial(zoo.squeezenet1_1, num_classes=10), pixels, torch.float32),
        "mini-ResNet": (small, (4 * images, 1, 28, 28), torch.float32),
        "GPT-2, small": (_Gpt2, tokens, torch.int64),
    }


class _Gpt2(nn.Module):
    """A GPT-2 that gives one row of scores for each token: (B, T) → (B T, vocabulary)."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 5000, "n_positions": 128}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits.flatten(0, 1)
