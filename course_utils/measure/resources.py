"""What a model costs besides time: bytes, multiply–accumulates, memory, energy; and what this
machine could do at best.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from course_utils import machine
from course_utils.measure.arms import now, torch_threads
from course_utils.measure.stats import Interval, median_interval


def parameters(model: nn.Module) -> int:
    """Numbers the model learns (buffers such as BatchNorm's running mean are not counted).

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())


def saved_bytes(model: nn.Module | dict[str, Tensor]) -> int:
    """Bytes of the file that safetensors writes for the model's state, buffers and header
    included.

    >>> saved_bytes({"w": torch.zeros(250)}) > 1000
    True
    """
    from safetensors.torch import save_file

    state = model if isinstance(model, dict) else model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, path)
        return path.stat().st_size


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply–accumulates of `model(x)`, counted by torch's FlopCounterMode (two floating-point
    operations each).

    It counts matrix products, convolutions and attention only; additions, activations and
    normalisation are free to it, and so is a fused operator it does not know:
    nn.TransformerEncoderLayer's fast path counts 0.

    >>> macs(nn.Linear(10, 5), torch.zeros(2, 10))
    100
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def held(call: Callable[[], object]) -> list[int]:
    """Bytes that torch holds on the CPU beyond those before, after each allocation and each release
    during `call()`, in order.

    Summed from the profiler's allocation events: exact for torch's tensors and blind to every other
    library.

    >>> held(lambda: [torch.zeros(1000) for _ in range(2)])[:2]
    [4000, 8000]
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = call()
    del kept
    changes = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    ordered = sorted(changes, key=lambda change: change[0])
    return list(itertools.accumulate(size for _, size in ordered))


def peak_memory(call: Callable[[], object]) -> int:
    """Most bytes torch held at once during `call()` on the CPU, beyond what it held before.
    For another runtime use `child`, which reads a process's peak.

    >>> peak_memory(lambda: torch.zeros(1000))
    4000
    """
    return max([0, *held(call)])


def release() -> None:
    """Hand memory that is free inside this process back to the system (glibc keeps it otherwise):
    for small machines.

    >>> release()
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Roofline:
    """The two ceilings of this machine: operations a second, and bytes a second from memory
    (Williams et al. 2009).

    >>> Roofline(gflops=80, gbytes=20, threads=1).bound(0.25)
    5.0
    """

    gflops: float  # 10⁹ floating-point operations a second, a multiply–accumulate being two
    gbytes: float  # 10⁹ bytes a second
    threads: int

    def bound(self, intensity: float) -> float:
        """Highest attainable GFLOP/s at `intensity` operations a byte: min(compute, bandwidth ·
        intensity).
        """
        return min(self.gflops, self.gbytes * intensity)

    @property
    def ridge(self) -> float:
        """Operations a byte at which the two ceilings meet: below, memory limits; above, arithmetic
        does.
        """
        return self.gflops / self.gbytes


@functools.cache
def roofline(threads: int | None = None) -> Roofline:
    """Measure both ceilings in fp32, about one second: a 1024³ matrix product, and a copy far
    larger than the caches.

    >>> roofline(1).ridge > 1
    True
    """
    threads = threads or torch.get_num_threads()
    n = 1024
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    source = torch.zeros(64 * 2**20 // 4 * 4)  # 256 MiB: beyond any laptop's last cache
    target = torch.zeros_like(source)
    with torch_threads(threads):
        compute = _best(lambda: torch.mm(a, b, out=out))
        copy = _best(lambda: target.copy_(source))
    return Roofline(2 * n**3 / compute / 1e9, 2 * source.nbytes / copy / 1e9, threads)


def _best(call: Callable[[], object], repeat: int = 9) -> float:
    """A ceiling is a best case, so the fastest of several calls is the right summary here, and only
    here.
    """
    call()
    times = []
    for _ in range(repeat):
        start = now()
        call()
        times.append(now() - start)
    return min(times)


def energy(call: Callable[[], object], *, seconds: float = 2.0) -> "Interval | machine.Skip":
    """Joules a call, from the processor's own counter (RAPL): the whole package, idle power
    included. A Skip elsewhere.

    >>> isinstance(energy(lambda: sum(range(1000)), seconds=0.1), Interval | machine.Skip)
    True
    """
    answer = machine.can("energy")
    if answer is not True:
        return answer
    counter = machine.rapl_file()
    wrap = int((counter.parent / "max_energy_range_uj").read_text())
    joules: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(joules) < 12 or time.perf_counter() < end:
        before, calls, start = int(counter.read_text()), 0, time.perf_counter()
        while time.perf_counter() - start < max(
            seconds / 24, 0.05
        ):  # the counter moves once a millisecond
            call()
            calls += 1
        joules.append((int(counter.read_text()) - before) % wrap / 1e6 / calls)
    m = median_interval(joules)
    return Interval(m.value, m.low, m.high, "J")
