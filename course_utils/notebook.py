"""What a notebook's kernel gets and no other program: a hint after a NameError, and quiet.

`machine.card()`, which every chapter calls first, starts it. Importing the package changes nothing
of this.
"""

import functools
import logging
import os
import sys

__all__ = ["start"]
_NOISY = ("torch.utils.cpp_extension", "torch.utils._pytree")


def start() -> bool:
    """Set up the kernel that this runs in; whether there is one. A second call changes nothing.

    >>> start()  # not in a notebook
    False
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:  # IPython's own shell in a terminal has none
        return False
    _set_up(shell)
    return True


@functools.cache  # once a shell
def _set_up(shell: object) -> None:
    # torch's profiler and its benchmark module report what they look for on GPUs; on a CPU that is
    # noise in a notebook.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    shell.events.register("post_run_cell", _explain)


def _explain(result: object) -> None:
    """Say after a NameError what it mostly means: a cell further up has not been run."""
    error = result.error_in_exec
    if isinstance(error, NameError) and getattr(error, "name", None):
        print(
            f"{error.name!r} is not there yet. If a cell further up makes it, run the cells in"
            " order: menu Run, Run All Above Selected Cell; then this one again."
        )
