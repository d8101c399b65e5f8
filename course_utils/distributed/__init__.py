"""Several processes: the worker that torchrun starts, and the launcher a notebook starts torchrun
with.

    results = distributed.launch("ring.py", "ddp.py", workers=2, settings={"steps": 8})
    results["ring"]  # [of rank 0, of rank 1]

A module given by its file has a function `run(settings)`, called on every worker after the process
group is up; what it returns (anything JSON can hold) comes back. The same worker runs on a cluster,
started there by torchrun itself:

    torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \\
        -m course_utils.distributed ring.py ddp.py --out results

Modules that come with the course (those in `jobs`) have the same form; `job("scaling")` is the file
of one.
"""

from course_utils.distributed.blocks import (
    Block,
    apart,
    batch,
    chain,
    flat_gradients,
    mine,
    seconds,
    step,
)
from course_utils.distributed.launcher import (
    FORKS,
    WorkerError,
    command,
    free_port,
    job,
    launch,
    results,
    shorten,
)
from course_utils.distributed.model import alpha_beta, sent, typical
from course_utils.distributed.nodes import launch_two_nodes
from course_utils.distributed.worker import Unreachable, alone, device, main

__all__ = [
    "FORKS",
    "Block",
    "Unreachable",
    "WorkerError",
    "alone",
    "alpha_beta",
    "apart",
    "batch",
    "chain",
    "command",
    "device",
    "flat_gradients",
    "free_port",
    "job",
    "launch",
    "launch_two_nodes",
    "main",
    "mine",
    "results",
    "seconds",
    "sent",
    "shorten",
    "step",
    "typical",
]
