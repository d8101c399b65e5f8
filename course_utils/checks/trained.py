"""For checks that judge a trained network: images that nobody has seen elsewhere, and one image
alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from course_utils.checks.accept import said
from course_utils.exercises import Wrong


def turning(rng: np.random.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    """One of the eight ways to turn or mirror images, drawn: the same for all that it gets."""
    quarters, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    return lambda images: torch.rot90(
        images.flip(-1) if mirrored else images, quarters, (-2, -1)
    ).contiguous()


def judge_alone(net: nn.Module, x: torch.Tensor) -> None:
    """Wrong unless each image's ten logits are the same alone and in company."""
    with torch.no_grad():
        together = net(x)
        alone = torch.cat([net(x[i : i + 1]) for i in range(len(x))])
    if not isinstance(together, torch.Tensor) or tuple(together.shape) != (len(x), 10):
        raise Wrong(
            f"for {len(x)} images logits of shape ({len(x)}, 10) are due, not {said(together)}."
        )
    if not torch.allclose(together, alone, atol=1e-3, rtol=1e-3):
        raise Wrong(
            "an image alone gets other logits than the same image among eight: in eval mode it must"
            " not depend on its neighbours."
        )
