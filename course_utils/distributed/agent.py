"""torchrun with one import for all: its agent, and workers that are forked from it.

    python -m course_utils.distributed.agent OPTIONS -m course_utils.distributed ring.py --out …

The options are torchrun's. Started as usual, each worker imports torch anew, two seconds and 300 MB
of its own; a fork has both already. For Linux machines without a GPU, whose driver must not be
forked.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from course_utils.distributed import worker

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the agent, and wait for its workers.

    >>> main(["--nproc-per-node=2", "-m", "course_utils.distributed", "ring.py"])  # doctest: +SKIP
    """
    asked = run.parse_args(sys.argv[1:] if arguments is None else arguments)
    config, _, _ = run.config_from_args(asked)
    config.start_method = "fork"
    for name in asked.training_script_args:
        if name.startswith("--"):
            break
        with contextlib.suppress(Exception):  # a worker will say it with its own traceback
            worker.load(Path(name))
    elastic_launch(config, _work)(asked.training_script_args)


def _work(arguments: Sequence[str]) -> None:
    """In a session of its own, as torchrun's workers are: the scheduler shares among sessions."""
    os.setsid()
    worker.main(arguments)


if __name__ == "__main__":
    main()
