"""Worker 0 has a batch more than the others, and waits for them in an all-reduce."""

from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["run"]


def run(settings: dict) -> dict:
    """What worker 0 is told, by the collective in which it waits, and by a barrier that looks who
    is there. The others end as usual.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     run({})
    {}
    """
    soon = timedelta(seconds=1)
    groups = [dist.new_group(backend="gloo", timeout=soon) for _ in "12"]
    try:
        for _ in range(5 if dist.get_rank() == 0 else 4):
            dist.all_reduce(torch.ones(4), group=groups[0])
    except RuntimeError as error:
        said = str(error).split("] ")[-1]
        try:
            dist.monitored_barrier(groups[1], soon)
        except RuntimeError as told:
            return {"all_reduce": said, "monitored_barrier": str(told).splitlines()[0]}
    return {}
