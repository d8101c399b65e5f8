"""What the chapter's modules train: a chain of blocks, rows for it, and one step."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.distributed.worker import device

__all__ = ["Block", "apart", "batch", "chain", "flat_gradients", "mine", "seconds", "step"]


class Block(nn.Module):
    """x + down(relu(up(x))): the block behind a transformer's attention, rows of `width` numbers,
    8·width² weights.

    >>> Block(8)(torch.zeros(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, width: int, norm: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (rows, width) → (rows, width)
        return x + self.down(F.relu(self.up(self.norm(x))))


def chain(width: int, depth: int, seed: int = 0, norm: bool = False) -> nn.Sequential:
    """`depth` blocks whose weights depend on `seed` alone: the same on every worker that asks for
    the same. On the worker's GPU, if it has one.

    >>> torch.equal(chain(8, 2)[0].up.weight, chain(8, 2)[0].up.weight)
    True
    """
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(width, norm) for _ in range(depth)]).to(device())


def batch(
    rows: int, width: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, width), the same on every worker that asks with the same seed.

    >>> x, y = batch(rows=4, width=8)
    >>> x.shape, y.shape
    (torch.Size([4, 8]), torch.Size([4, 8]))
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, width, generator=generator, dtype=dtype).to(device()).unbind(0)
    return x, y


def mine(*tensors: Tensor) -> tuple[Tensor, ...]:
    """This worker's rows of each tensor: every p-th one, from its rank on.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     mine(torch.arange(4))
    (tensor([0, 1, 2, 3]),)
    """
    return tuple(t[dist.get_rank() :: dist.get_world_size()] for t in tensors)


def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Forward and backward of the mean squared error; gradients add up in .grad.

    >>> model = chain(8, 1)
    >>> step(model, *batch(4, 8)).shape
    torch.Size([])
    >>> flat_gradients(model).shape
    torch.Size([552])
    """
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, its work on a GPU included.

    >>> 0.01 <= seconds(lambda: time.sleep(0.01)) < 1
    True
    """
    wait = torch.cuda.synchronize if device().type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def flat_gradients(model: nn.Module) -> Tensor:
    """All gradients of a model in one row.

    >>> layer = nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> flat_gradients(layer)
    tensor([1., 1., 1.])
    """
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def apart(got: Tensor, want: Tensor) -> float:
    """The largest gap between two tensors, as a share of the largest number in the second.

    >>> apart(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    return float((got - want).abs().max() / want.abs().max())
