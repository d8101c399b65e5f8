"""Time for checks that judge it: it passes as the check says, never as a busy machine has it."""

import asyncio
import contextlib
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("perf_counter", "monotonic", "time", "process_time", "thread_time")
_REAL = {n: getattr(time, n) for name in _NAMES for n in (name, f"{name}_ns")}


class Clock:
    """Seconds since the check began. `now` is moved by whoever keeps this clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """The time; a look takes a microsecond, so that a loop that only looks comes to its end."""
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.0)


@contextlib.contextmanager
def told_to(answer: object, clock: Clock) -> Iterator[None]:
    """Inside, this thread's `time` tells the clock's time, also to an answer that has imported
    `perf_counter` and its like by name. Other threads see the true time.
    """
    me = threading.get_ident()

    def here(ours: Callable, real: Callable) -> Callable:
        return lambda *given: (ours if threading.get_ident() == me else real)(*given)

    fakes = {"sleep": here(clock.sleep, time.sleep)}
    for name, real in _REAL.items():
        whole = name.endswith("_ns")
        fakes[name] = here(lambda w=whole: int(1e9 * clock.read()) if w else clock.read(), real)
    known = {id(real): fakes[name] for name, real in _REAL.items()} | {
        id(time.sleep): fakes["sleep"]
    }
    function = getattr(answer, "func", answer)  # of a functools.partial, of a called object
    function = function if hasattr(function, "__globals__") else type(function).__call__
    space = getattr(function, "__globals__", {})
    named = {name: value for name, value in space.items() if id(value) in known}
    with mock.patch.multiple(time, **fakes):
        space.update({name: known[id(value)] for name, value in named.items()})
        try:
            yield
        finally:
            space.update(named)  # these alone: what the answer has set for itself stays


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: the same sums, however many cores are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


aten = torch.ops.aten
_OPERATIONS = {  # of the result and the operator's arguments
    aten.mm: lambda y, a, b: 2 * y.numel() * len(b),
    aten.addmm: lambda y, bias, a, b, **_: 2 * y.numel() * len(b),
    aten.bmm: lambda y, a, b: 2 * y.numel() * b.shape[1],
    aten.convolution: lambda y, x, w, *_: 2 * y.numel() * w.numel() // len(w),
    aten.convolution_backward: lambda _, y, x, w, *__: 4 * y.numel() * w.numel() // len(w),
}


class Work(TorchDispatchMode):
    """Moves a clock by what torch computes in this thread: 10 µs an operator, 1 ns a number that
    it makes, 20 ps an operation of a convolution or a matrix product.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(
        self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        count = _OPERATIONS.get(func.overloadpacket)
        operations = count(out, *args, **(kwargs or {})) if count else 0
        made = out if isinstance(out, tuple | list) else [out]
        numbers = sum(t.numel() for t in made if isinstance(t, torch.Tensor))
        self.clock.now += 1e-5 + 1e-9 * numbers + 2e-11 * operations
        return out


class _Turns(selectors.SelectSelector):
    """Instead of waiting for a timer it moves the clock; one turn of the loop takes 10 µs."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:  # no timer is set: only a file or another thread can go on
            return super().select(None)
        self.clock.now += max(timeout, 1e-5)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose timers run on a clock of ours: it never waits, and is never late."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        super().__init__(_Turns(clock))

    def time(self) -> float:
        return self.clock.now
