"""What does a worker hold under plain data parallel, and with everything sharded? Counted where
memory is taken, so that buffers are in.

Settings: width, depth, rows (of all workers).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils import measure
from course_utils.distributed import apart, batch, chain, device, mine, step
from course_utils.distributed.heap import kept_and_peak

__all__ = ["WAYS", "build", "run"]

WAYS = ("DDP, plain", "DDP, views", "FSDP2")


def build(way: str, width: int, depth: int) -> nn.Module:
    """The chain under DDP, with or without gradients that are views of its buckets, or sharded
    block by block.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     build("DDP, views", 8, 1).gradient_as_bucket_view
    True
    """
    model = chain(width, depth)
    if way != "FSDP2":
        return DDP(model, gradient_as_bucket_view=way == "DDP, views")
    mesh = dist.init_device_mesh(device().type, (dist.get_world_size(),))
    for block in model:  # collected and given back block by block
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(settings: dict) -> dict:
    """By way: bytes a parameter between steps and at the peak of two steps, and the gap of the
    weights to those of plain DDP.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     run({"width": 8, "depth": 1, "rows": 4})["FSDP2"]["apart"] < 1e-5
    True
    """
    result, reference = {}, None
    _train(WAYS[-1], settings | {"width": 8})  # what is made once and stays is made before
    for way in WAYS:
        model, kept, peak = kept_and_peak(lambda way=way: _train(way, settings))
        now = _weights(model["model"])
        reference = now if reference is None else reference
        result[way] = {"kept": kept / now.numel(), "peak": peak / now.numel()}
        result[way]["apart"] = apart(now, reference)
        del model, now
        measure.release()  # the next way starts from nothing
    return result


def _train(way: str, settings: dict) -> dict:
    model = build(way, settings["width"], settings["depth"])
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    x, y = mine(*batch(settings["rows"], settings["width"]))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        step(model, x, y)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def _weights(model: nn.Module) -> torch.Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])
