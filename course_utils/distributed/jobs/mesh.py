"""A mesh of two dimensions: rows of the batch along one, columns of each layer along the other.

Settings: width, depth, rows.
"""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from course_utils.distributed import apart, batch, chain, device, step

__all__ = ["grid", "run"]


def grid(p: int) -> tuple[int, int]:
    """p workers as a rectangle: two columns where p is even, one row otherwise.

    >>> grid(4), grid(2), grid(7), grid(1)
    ((2, 2), (1, 2), (1, 7), (1, 1))
    """
    return (p // 2, 2) if p % 2 == 0 else (1, p)


def run(settings: dict) -> dict:
    """The mesh; the part of `up`'s weight that this worker stores; collectives of a forward pass by
    name; the gap to one process's results after one step.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     run({"width": 8, "depth": 1, "rows": 4})["apart"] < 1e-5
    True
    """
    data, tensor = grid(dist.get_world_size())
    mesh = dist.init_device_mesh(device().type, (data, tensor), mesh_dim_names=("data", "tensor"))
    alone = chain(settings["width"] // tensor * tensor, settings["depth"])
    split = chain(settings["width"] // tensor * tensor, settings["depth"])
    for block in split:  # first the layers are cut, then what is left is sharded
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    x, y = batch(settings["rows"], settings["width"] // tensor * tensor)
    at = mesh["data"].get_local_rank()
    step(alone, x, y)
    with CommDebugMode() as counter:
        out = split(x[at::data])
    step(split, x[at::data], y[at::data])
    gradient = split[0].up.weight.grad
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return {
        "mesh": [data, tensor],
        "part": list(split[0].up.weight.to_local().shape),
        "collectives": {str(k): n for k, n in counter.get_comm_counts().items()},
        "apart": max(
            apart(out.detach(), alone(x)[at::data].detach()), apart(whole, alone[0].up.weight.grad)
        ),
    }
