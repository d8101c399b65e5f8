"""Bytes that this worker's tensors and buffers take, counted where they are taken.

torch's profiler is blind here: what gloo's threads free, it does not see. Under FSDP2 it reported
9 to 14 bytes a parameter between steps, another number in each run; the C library says 8.1 each
time.
"""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils import measure
from course_utils.distributed.worker import device

__all__ = ["kept_and_peak"]

SMALL = 2**12  # bytes; after an operation that gives less, nobody looks


def kept_and_peak(call: Callable[[], object]) -> tuple[object, int, int]:
    """What `call()` returns; the bytes that stay taken for it; and the most that were taken during
    the call. On a GPU by its allocator, with glibc by the C library (the peak is looked at after
    each operation of torch's); elsewhere by the profiler, which may say too much.

    >>> result, kept, peak = kept_and_peak(lambda: torch.ones(500_000) + torch.ones(500_000))
    >>> 2_000_000 <= kept < 2_200_000, 6_000_000 <= peak < 6_300_000
    (True, True)
    """
    gc.collect()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), call()
        gc.collect()
        kept = torch.cuda.memory_allocated() - before
        return result, kept, torch.cuda.max_memory_allocated() - before
    if _in_use() is None:
        found = []
        series = measure.held(lambda: found.append(call()))
        return found[0], series[-1], max(series)
    before, look = _in_use(), _Peak()
    with look:
        result = call()
    gc.collect()
    return result, _in_use() - before, look.most - before


class _Info(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _in_use() -> int | None:
    """Bytes that malloc has handed out: in its arenas, and as mappings of their own."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    ask.restype = _Info
    info = ask()
    return info.uordblks + info.hblkhd


class _Peak(TorchDispatchMode):
    most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.nbytes >= SMALL:
            self.most = max(self.most, _in_use())
        return result
