"""What does an all-reduce cost? Times for vectors of several sizes.

Settings: sizes, numbers (of 4 bytes) in a vector; rounds.
"""

import sys

import torch
import torch.distributed as dist

from course_utils.distributed import device, seconds

__all__ = ["run"]


def run(settings: dict) -> dict:
    """Seconds of torch's all-reduce by bytes, a list over rounds; where a module `ring` was loaded
    before this one, also those of its `ring_all_reduce`, turn by turn.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     list(run({"sizes": [4, 8], "rounds": 2})["torch"])
    ['16', '32']
    """
    kinds = {"torch": dist.all_reduce}
    if "ring" in sys.modules:
        kinds["ring"] = sys.modules["ring"].ring_all_reduce
    times = {kind: {} for kind in kinds}
    for size in settings["sizes"]:
        x = torch.zeros(size // dist.get_world_size() * dist.get_world_size(), device=device())
        found = {kind: [] for kind in kinds}
        for k in range(settings["rounds"] + 1):
            for kind, call in kinds.items():
                dist.barrier()
                took = seconds(lambda call=call, x=x: call(x))
                if k:
                    found[kind].append(took)
        for kind in kinds:
            times[kind][str(x.nbytes)] = found[kind]
    return times
