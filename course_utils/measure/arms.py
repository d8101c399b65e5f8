"""One side of a comparison: what is called, under which conditions, and how it is timed."""

import concurrent.futures
import inspect
import math
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from course_utils import machine

try:
    import resource
except ImportError:  # Windows
    resource = None

BLOCK_SECONDS = 0.005  # inner calls are repeated until a block lasts this long
_EMPTY_CALLS = 4  # a callable that costs less than this many empty calls has computed nothing
GRAPH, NO_GRAPH = "a graph for backward", "no graph for backward"


def now() -> float:
    """Seconds on the wall clock, read when the accelerator, if there is one, has finished.

    >>> now() < now()
    True
    """
    from torch.utils import benchmark  # late: it warns of a missing GPU before a notebook is ready

    return benchmark.timer()


def torch_threads(threads: int) -> AbstractContextManager:
    """A `with` block in which torch uses so many threads.

    >>> with torch_threads(1):
    ...     torch.get_num_threads()
    1
    """
    from torch.utils import benchmark

    return benchmark.set_torch_threads(threads)


class MeasurementError(RuntimeError):
    """The measurement would mean nothing: the message says why and what to do."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: what is called, and the conditions under which it runs.

    `threads` is None for a torch arm (the comparison sets them). A runtime with threads of its own
    (ONNX Runtime, OpenVINO) must say how many it was given, because torch's setting does not reach
    it.

    >>> Arm(lambda: sum(range(1000)), "a sum", threads=1, batch=8).conditions()
    'batch 8'
    """

    call: Callable[[], object]
    label: str = ""
    threads: int | None = None
    dtype: str = ""
    batch: int | None = None
    memory_format: str = ""

    def conditions(self) -> str:
        """Type, batch and memory format in words, as far as they are known."""
        parts = [self.dtype, f"batch {self.batch}" if self.batch else "", self.memory_format]
        return ", ".join(p for p in parts if p)

    def spent(self) -> "Arm":
        """The arm without its callable: a result that is kept must not keep the model alive."""
        return replace(self, call=_no_call)


class Inference:
    """`model(x)` in inference mode as a function without arguments, one that can be sent to another
    process.

    >>> Inference(torch.nn.Identity(), torch.ones(2))()
    tensor([1., 1.])
    """

    def __init__(self, model: Callable[[Tensor], object], x: Tensor) -> None:
        self.model, self.x = model, x

    def __call__(self) -> object:
        with torch.inference_mode():
            return self.model(self.x)


def arm(model: Callable[[Tensor], object], x: Tensor, label: str = "") -> Arm:
    """`model(x)` in inference mode as an Arm; dtype, batch and memory format are read from `x`.

    >>> arm(torch.nn.Linear(4, 2), torch.zeros(8, 4)).conditions()
    'float32, batch 8, contiguous'
    """
    channels_last = (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )
    layout = "channels_last" if channels_last else "contiguous"
    dtype = str(x.dtype).removeprefix("torch.")
    return Arm(Inference(model, x), label or type(model).__name__, None, dtype, len(x), layout)


def as_arm(value: Callable[[], object] | Arm, name: str) -> Arm:
    """`value` as an Arm with a label. Raises TypeError for something that is no function."""
    if isinstance(value, Arm):
        return value if value.label else replace(value, label=name)
    if not callable(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}, already computed; pass a function without"
            " arguments, or measure.arm(model, x)."
        )
    return Arm(value, name)


def agreed_threads(a: Arm, b: Arm, threads: int | None, clock: str) -> int:
    """The number of threads both arms run with. Raises MeasurementError where they differ or are
    more than this process may use, ValueError for an impossible number or clock.
    """
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock is {clock!r}; it must be 'wall' or 'cpu'.")
    own = {x for x in (a.threads, b.threads, threads) if x is not None}
    if len(own) > 1:
        raise MeasurementError(
            f"the arms do not have the same threads: {a.label} {a.threads or 'torch'}, {b.label}"
            f" {b.threads or 'torch'}, asked for {threads}. A runtime's threads are set when it is"
            " made (intra_op_num_threads, INFERENCE_NUM_THREADS): give both the same."
        )
    cores = machine.usable_cores()
    chosen = own.pop() if own else (1 if clock == "cpu" else min(torch.get_num_threads(), cores))
    if chosen < 1 or (clock == "cpu" and chosen != 1):
        raise ValueError(f"threads is {chosen}; it must be at least 1, and 1 with clock='cpu'.")
    if chosen > cores:
        raise MeasurementError(
            f"{chosen} threads on {cores} usable core{'s' if cores > 1 else ''} take turns, and a"
            f" turn's end is noise. Ask for at most {cores}."
        )
    return chosen


class Sampler:
    """Times one arm: checks it, finds how many calls fill a block, then gives seconds a call, block
    by block.

    After some samples, `cores` is how many cores were busy on average (a compiled arm that claims
    two threads and keeps one busy shows it here), and `faults` how many page faults a call made.
    """

    def __init__(self, a: Arm, threads: int, clock: str, block: float = BLOCK_SECONDS) -> None:
        self.threads, self.arm = threads, a
        self.mode = NO_GRAPH
        self._wall = self._cpu = 0.0
        self._calls = self._faults = 0
        self._timer = timeit.Timer(a.call, timer=time.thread_time if clock == "cpu" else now)
        once = self._first_calls()
        self.number = max(1, math.ceil(block / once)) if block else 1

    def sample(self) -> float:
        """Seconds a call, from one block of calls."""
        with torch_threads(self.threads):
            wall, cpu, faults = time.perf_counter(), time.process_time(), _page_faults()
            taken = self._timer.timeit(self.number)
            self._wall += time.perf_counter() - wall
            self._cpu += time.process_time() - cpu
            self._faults += _page_faults() - faults
            self._calls += self.number
        return max(taken / self.number, 1e-9)

    @property
    def cores(self) -> float:
        return self._cpu / self._wall if self._wall else 0.0

    @property
    def faults(self) -> float:
        """Page faults a call: pages that the system had to hand out while the clock ran."""
        return self._faults / self._calls if self._calls else 0.0

    def _first_calls(self) -> float:
        """Warm up, find out whether a graph is built, and return about how long a call takes."""
        try:
            with torch_threads(self.threads):
                value = self.arm.call()  # warms up memory and caches
                _refuse_lazy(value, self.arm.label)
                builds = _requires_grad(value)
                del value
                start = now()  # waits for an accelerator: launching is not computing
                builds |= self._saves()
                once = now() - start
                self.mode = GRAPH if builds else NO_GRAPH
                if once < 2e-3:
                    once = min(timeit.Timer(self.arm.call, timer=now).repeat(3, 1))
                if once < 20e-6:  # short: look again, without the clock's own cost
                    once = self._short()
        except MeasurementError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"{self.arm.label} raised {type(error).__name__}: {error}"
            ) from error
        return max(once, 1e-9)

    def _saves(self) -> bool:
        """Call once more: whether it keeps tensors for a backward pass, also if it returns none."""
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(1)
            return tensor

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # selective checkpointing warns of hooks around it
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.arm.call()
        return bool(kept)

    def _short(self) -> float:
        once = min(timeit.Timer(self.arm.call).repeat(3, 1000)) / 1000
        empty = min(timeit.Timer(lambda: None).repeat(3, 1000)) / 1000
        if once < _EMPTY_CALLS * empty:
            raise MeasurementError(
                f"{self.arm.label} returns after {pretty(once)}, an empty function after"
                f" {pretty(empty)}: nothing is computed in it. Let the callable do the work"
                " itself; a value computed before the clock started costs nothing."
            )
        return once


def refuse_compilation(before: int, *arms: Arm) -> None:
    """Raise MeasurementError if torch.compile made a graph since there were `before` of them."""
    if graphs_compiled() != before:
        raise MeasurementError(
            f"torch.compile was at work while {' and '.join(a.label for a in arms)} were timed: an"
            " input changes shape, or the warm-up ran at another size. Time it at the size it was"
            " warmed at."
        )


def refuse_two_modes(a: Sampler, b: Sampler) -> None:
    """Raise MeasurementError where one arm prepares a backward pass and the other does not."""
    if a.mode != b.mode:
        raise MeasurementError(
            f"the arms run in two modes: {a.arm.label} makes {a.mode}, {b.arm.label} {b.mode}, and"
            " that costs time of its own. Give both the same: measure.arm(model, x), or"
            " torch.inference_mode() inside the function. If the backward pass is what you ask"
            " about, say across_modes=True."
        )


def pretty(seconds: float) -> str:
    """A duration for people.

    >>> pretty(0.0123), pretty(4e-7)
    ('12.3 ms', '400 ns')
    """
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _requires_grad(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, list | tuple):
        return any(map(_requires_grad, value))
    if isinstance(value, dict):  # transformers' outputs are dicts, too
        return any(map(_requires_grad, value.values()))
    return False


def _refuse_lazy(value: object, label: str) -> None:
    lazy = (
        inspect.isgenerator(value)
        or inspect.isawaitable(value)
        or isinstance(value, map | filter | zip)
    )
    if lazy or isinstance(value, concurrent.futures.Future):
        if inspect.iscoroutine(value):
            value.close()
        raise MeasurementError(
            f"{label} returned a {type(value).__name__}: work that is promised, not done. Consume"
            " it inside the callable: list(generator), future.result(), asyncio.run(coroutine)."
        )


def _page_faults() -> int:
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def _no_call() -> object:
    raise MeasurementError(
        "a Comparison keeps its arms' conditions, not what they called; measure again with new"
        " arms."
    )
