"""What torchrun starts: it opens the process group, runs the modules one after the other, and
writes what they return.

With `--fresh n` each module runs in n fresh processes a worker, forked from one that has imported
torch and computed nothing: what processes do not share is then in the results' spread.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from course_utils import processes

__all__ = ["Unreachable", "alone", "device", "load", "main"]

PATIENCE = timedelta(seconds=60)  # for the store that torchrun opened before it started us


class Unreachable(RuntimeError):
    """The machine where the workers are to meet cannot be found, or does not answer."""


def device() -> torch.device:
    """This worker's GPU, if its machine has one for each of its workers; the CPU otherwise.

    >>> device().type in ("cpu", "cuda")
    True
    """
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local and torch.cuda.is_available() and torch.cuda.device_count() >= int(local):
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this process alone: what runs on many workers runs on one.

    >>> with alone():
    ...     dist.get_world_size()
    1
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """What torchrun starts; it ends the process with 1 when a module raises.

    >>> main(["ring.py", "--out", "results"])  # doctest: +SKIP
    """
    parser = argparse.ArgumentParser(prog="course_utils.distributed")
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--fresh", type=int, default=0)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # a fork must not tidy up its parent's store: the threads behind it are not here
    if not asked.fresh:
        _life(asked, 0)
        return
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the children are asked, not this one
    for path in asked.modules:
        load(path)  # what the modules import is imported once
    _release()
    for life in range(asked.fresh):
        if pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code:
                _ended_by_signal(asked.out, code)
                os._exit(1)
        else:
            from course_utils.measure.fresh import scattered_holes

            held = scattered_holes()  # forks start from one heap; see measure.fresh
            _life(asked, life)
            del held
            os._exit(0)


def _ended_by_signal(folder: Path, code: int) -> None:
    """A process that was killed says nothing; its parent says it, and says it first."""
    rank = int(os.environ["RANK"])
    if code < 0:
        text = f"its process was ended by signal {signal.Signals(-code).name}"
        told = {"rank": rank, "when": 0.0, "traceback": text}
        (folder / f"failed.worker.{rank}").write_text(json.dumps(told))


def _life(asked: argparse.Namespace, life: int) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)  # here, once: after a fork autograd's threads would race to do it
    (asked.out / f"failed.worker.{rank}").unlink(missing_ok=True)  # of a life before a restart
    _watch(asked.out, rank)
    try:
        gpu = device().type == "cuda"
        if gpu:
            torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        group = _rendezvous(life)
        dist.init_process_group(backend, timeout=timedelta(seconds=300), **group)
        _release()  # importing torch leaves much behind
        for path in asked.modules:
            result = load(path).run(asked.settings | {"out": str(asked.out)})
            target = asked.out / f"{path.stem}.worker.{life}.{rank}.json"
            target.with_suffix(".part").write_text(json.dumps(result))
            target.with_suffix(".part").replace(target)
            del result
            _release()
            dist.barrier()
    except BaseException as error:
        told = {"rank": rank, "when": time.time(), "traceback": traceback.format_exc()}
        (asked.out / f"failed.worker.{rank}").write_text(json.dumps(told))
        print(f"worker {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)  # at once: a clean end would wait for peers that wait for this one
    dist.destroy_process_group()


def _release() -> None:
    """What one module needed must not count for the next: several workers share a small machine."""
    from course_utils.measure.resources import release

    release()


def _rendezvous(life: int) -> dict:
    """torchrun's store, with a part of its own for each restart and life: addresses of processes
    that are gone are still in it. Raises Unreachable with the remedy, in place of a long silence.
    """
    address = os.environ["MASTER_ADDR"]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        address = "127.0.0.1"  # torchrun tells the machine's own name; not every network knows it
    port, remedy = int(os.environ["MASTER_PORT"]), "start torchrun with --local-addr=ADDRESS"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise Unreachable(
            f"the workers meet at {address!r}, and this machine knows no such name ({error}). Its"
            f" network has no DNS, or the name is not in it: {remedy}, the number under which the"
            " others reach this machine."
        ) from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}  # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say all
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)
    except dist.DistError as error:
        raise Unreachable(
            f"{address}, port {port}, did not answer within {PATIENCE.seconds} s: {error}. A"
            f" firewall, or the wrong one of several networks? Then {remedy}."
        ) from None
    store.set_timeout(timedelta(seconds=300))
    part = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}, life {life}"
    return {
        "store": dist.PrefixStore(part, store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def load(path: Path) -> ModuleType:
    """The module in this file, under the file's name; what a parent of this process has loaded is
    taken as it is.

    >>> _ = Path("two.py").write_text("number = 2")
    >>> load(Path("two.py")).number
    2
    """
    there = sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) == str(path):
        return there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))  # a module may import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _watch(folder: Path, rank: int) -> None:
    """Say where this worker stands when asked, before it is stopped, and end when whoever started
    it is gone.
    """
    faulthandler.enable()  # a crash says where, on the error stream
    parent, launcher = os.getppid(), int(os.environ.get("COURSE_LAUNCHER", 0))
    if launcher and hasattr(faulthandler, "register") and hasattr(signal, "SIGUSR1"):
        faulthandler.register(
            signal.SIGUSR1, (folder / f"hang.worker.{rank}").open("w"), all_threads=False
        )

    def look() -> None:
        while os.getppid() == parent and (not launcher or processes.runs(launcher)):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
