"""How much faster do p workers train? Times of one step, with the arms in random order.

Settings: width; cases, a list of [blocks, rows of one worker]; the first also has the two arms of
one process; rounds.
"""

import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, seconds, step

__all__ = ["run"]


def run(settings: dict) -> dict:
    """Seconds of a step by arm, for each case "blocks x rows", a list over rounds:

    - alone: worker 0 computes its rows, the others wait in a barrier and leave their cores free;
    - threads: worker 0 computes the rows of all p workers with p threads;
    - silent: every worker computes its own rows, and nothing is sent;
    - ddp: the same, and the gradients are averaged.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     list(run({"width": 8, "cases": [[1, 4]], "rounds": 2})["1 x 4"])
    ['alone', 'threads', 'silent', 'ddp']
    """
    width, order, times = settings["width"], random.Random(0), {}
    for depth, rows in settings["cases"]:
        arms = _arms(width, depth, rows)
        if times:  # the first case alone is compared with one process
            del arms["alone"], arms["threads"]
        found = {name: [] for name in arms}
        for k in range(settings["rounds"] + 1):
            for name in order.sample(list(arms), len(arms)):  # the same order on all workers
                dist.barrier()
                took = seconds(arms[name])
                dist.barrier()
                if k:
                    found[name].append(took)
        times[f"{depth} x {rows}"] = found
    return times


def _arms(width: int, depth: int, rows: int) -> dict[str, Callable[[], None]]:
    rank, p = dist.get_rank(), dist.get_world_size()
    single = chain(width, depth)
    together = DDP(chain(width, depth), gradient_as_bucket_view=True)
    x, y = batch(p * rows, width)
    own = slice(rank * rows, (rank + 1) * rows)

    def fresh_step(model: torch.nn.Module, rows: slice) -> None:
        model.zero_grad(set_to_none=True)  # as DDP begins: adding into old gradients costs more
        step(model, x[rows], y[rows])

    def with_threads() -> None:
        torch.set_num_threads(p)
        fresh_step(single, slice(None))
        torch.set_num_threads(1)

    def silent() -> None:
        fresh_step(single, own)

    nothing = lambda: None  # noqa: E731
    return {
        "alone": silent if rank == 0 else nothing,
        "threads": with_threads if rank == 0 else nothing,
        "silent": silent,
        "ddp": lambda: fresh_step(together, own),
    }
