"""The fork server: imports everything once, and forks a judge for each exercise.

It is handed one end of a socket and never reads from it: a fork holds nothing of another learner.
`python -m course_utils.course.grading.server FD` is started by `grade`.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import warnings

from course_utils.course.grading import wire

_ALWAYS = (
    *("torch._dynamo", "torch.export", "torch.fx", "torch.utils.checkpoint", "asyncio", "onnx"),
    *("scipy.optimize", "statistics", "heapq", "fractions", "decimal", "queue", "pdb", "cmath"),
    *("concurrent.futures", "onnx.reference", "torch.testing", "pandas", "inspect", "psutil"),
    *("encodings.cp437", "encodings.idna", "encodings.latin_1", "torch._numpy", "torch.ao"),
)


def warm(names: list[str]) -> None:
    """Import all of this once, and keep torch to one thread: threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    from course_utils import exercises

    exercises.registry()
    for name in (*_ALWAYS, *names):
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    from course_utils import data

    data.fashion_mnist("validation")  # and what else is imported on the way, by whoever may read it


def main(fd: int) -> None:
    """Serve until the other end is closed: each message brings a socket, for which a judge is
    forked.
    """
    from course_utils.course.grading import judge

    control = socket.socket(fileno=fd)
    names, _ = wire.receive(control)
    warm(names)
    wire.send(control, ["warm"], [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `grade` decides when to end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a judge
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            try:
                judge.main(socket.socket(fileno=fds[0]))
            finally:
                os._exit(0)
        os.close(fds[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
