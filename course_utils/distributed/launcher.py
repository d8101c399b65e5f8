"""Several processes: the worker that torchrun starts, and the launcher a notebook starts torchrun
with.

    results = distributed.launch("ring.py", "ddp.py", workers=2, settings={"steps": 8})
    results["ring"]  # [of rank 0, of rank 1]

A module given by its file has a function `run(settings)`, called on every worker after the process
group is up; what it returns (anything JSON can hold) comes back. The same worker runs on a cluster,
started there by torchrun itself:

    torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \\
        -m course_utils.distributed ring.py ddp.py --out results
"""

import argparse
import faulthandler
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils import ROOT, processes

_BUSY = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


class WorkerError(RuntimeError):
    """A worker failed. The message holds the traceback of the one that failed first, as it was
    raised in its process.
    """


def launch(
    *modules: str | Path,
    workers: int = 2,
    settings: dict | None = None,
    out: Path | None = None,
    timeout: float = 120.0,
    restarts: int = 0,
    port: int | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, list]:
    """Start `workers` processes by torchrun, call each module's `run(settings)` in them, return the
    results by module.

    `out` keeps what the workers write (a temporary folder otherwise). A busy `port` (a free one by
    default) is retried with another. Raises WorkerError with the worker's own traceback,
    TimeoutError with the place where each worker hung. However the call ends (error, timeout,
    Ctrl-C), no process outlives it.

    >>> launch("ring.py", workers=2)
    Traceback (most recent call last):
    FileNotFoundError: no such module: ring.py
    >>> launch("ring.py", workers=2, settings={"steps": 8})["ring"]  # doctest: +SKIP
    [{'rank': 0, …}, {'rank': 1, …}]
    """
    missing = [str(m) for m in modules if not Path(m).is_file()]
    if missing:
        raise FileNotFoundError(f"no such module: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="course-workers-") as temporary:
        folder = Path(out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tail = ["-m", "course_utils.distributed", *map(str, modules), "--out", str(folder)]
        tail += ["--settings", json.dumps(settings or {})]
        for attempt in range(4):
            for old in folder.glob("*.worker.*"):
                old.unlink()
            code, text = _torchrun(
                tail, workers, restarts, port or free_port(), timeout, env or {}, folder
            )
            if code == 0:
                return {Path(m).stem: results(folder, Path(m).stem, workers) for m in modules}
            if not _BUSY.search(text) or attempt == 3:
                break
            port = None  # somebody else took it: another one
        raise WorkerError(_first_failure(folder, text))


def free_port() -> int:
    """A port that nothing listens on at this moment.

    >>> 1024 <= free_port() < 65536
    True
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(tail: Sequence[str], workers: int, restarts: int, port: int) -> list[str]:
    """torchrun's command line for one machine.

    >>> command(["ring.py"], workers=2, restarts=0, port=29400)[-1]
    'ring.py'
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={workers}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        "--rdzv-conf=is_host=1",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id={port}",
        *tail,
    ]


def _torchrun(
    tail: list[str], workers: int, restarts: int, port: int, timeout: float, env: dict, folder: Path
) -> tuple:
    from course_utils import measure

    measure.release()  # the workers are about to need what this process holds free
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(tail, workers, restarts, port),
            stdout=log,
            stderr=log,
            env=os.environ | _environment() | env,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            _ask_where(process.pid)
            raise TimeoutError(
                f"the workers did not end within {timeout:g} s and were"
                f" stopped.\n{_hanging(folder)}"
            ) from None
        finally:
            processes.end(process.pid)
            process.wait()
        log.seek(0)
        return code, log.read()


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        # threads that wait for work leave their core to the other worker
        "GOMP_SPINCOUNT": "10000",
        # glibc keeps freed memory in each arena; workers have many threads
        "MALLOC_ARENA_MAX": "2",
        "GLOO_SOCKET_IFNAME": _loopback(),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": (
            os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        ),
        "COURSE_LAUNCHER": str(os.getpid()),
    }


def launch_two_nodes(
    *modules: str | Path, settings: dict | None = None, timeout: float = 120.0
) -> dict[str, list]:
    """As `launch`, on two machines made of network namespaces: one torchrun and one worker in each,
    joined by a cable.

    Needs root, Linux and the program `ip`. The namespaces, and with them the cable, are removed
    however the call ends.

    >>> launch_two_nodes("ring.py", settings={"steps": 8})["ring"]  # doctest: +SKIP
    [{'rank': 0, …}, {'rank': 1, …}]
    """
    names = [f"course-{os.getpid()}-{side}" for side in "ab"]
    cable, addresses = [f"cv{os.getpid()}{side}" for side in "ab"], ["10.213.77.1", "10.213.77.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with (
        tempfile.TemporaryDirectory(prefix="course-nodes-") as temporary,
        tempfile.TemporaryFile("w+") as log,
    ):
        folder, nodes = Path(temporary), []
        tail = ["-m", "course_utils.distributed", *map(str, modules), "--out", temporary]
        tail += ["--settings", json.dumps(settings or {})]
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                cable[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cable[1],
                "netns",
                names[1],
            )
            for name, end_of, address in zip(names, cable, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end_of)
                ip("-n", name, "link", "set", end_of, "up")
                ip("-n", name, "link", "set", "lo", "up")
            for node, name in enumerate(names):
                torchrun = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc-per-node=1",
                ]
                torchrun += [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={addresses[0]}:29400",
                    "--rdzv-id=course",
                ]
                torchrun += [
                    f"--rdzv-conf=is_host={1 - node}",
                    f"--local-addr={addresses[node]}",
                    *tail,
                ]
                env = os.environ | _environment() | {"GLOO_SOCKET_IFNAME": cable[node]}
                command_line = ["ip", "netns", "exec", name, *torchrun]
                nodes.append(
                    subprocess.Popen(
                        command_line, stdout=log, stderr=log, env=env, start_new_session=True
                    )
                )
            stop = time.monotonic() + timeout
            codes = [process.wait(max(stop - time.monotonic(), 0.1)) for process in nodes]
        except subprocess.TimeoutExpired:
            for process in nodes:
                _ask_where(process.pid)
            raise TimeoutError(
                f"the two nodes did not end within {timeout:g} s.\n{_hanging(folder)}"
            ) from None
        finally:
            for process in nodes:
                processes.end(process.pid)
                process.wait()
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        log.seek(0)
        if any(codes):
            raise WorkerError(_first_failure(folder, log.read()))
        return {Path(m).stem: results(folder, Path(m).stem, 2) for m in modules}


def results(folder: Path, stem: str, workers: int) -> list:
    """What module `stem` returned on each worker: also from a launch that failed in a later
    module.

    >>> for rank in range(2):
    ...     _ = Path(f"ring.worker.{rank}.json").write_text(json.dumps({"rank": rank}))
    >>> results(Path(), "ring", workers=2)
    [{'rank': 0}, {'rank': 1}]
    """
    return [
        json.loads((folder / f"{stem}.worker.{rank}.json").read_text()) for rank in range(workers)
    ]


def _first_failure(folder: Path, text: str) -> str:
    """The worker that failed first says why; one that lost its peer fails later, and says only
    that.
    """
    failures = sorted(
        (json.loads(p.read_text()) for p in folder.glob("failed.worker.*")), key=lambda f: f["when"]
    )
    if failures:
        return f"worker {failures[0]['rank']} raised\n{shorten(failures[0]['traceback'])}"
    return f"a worker ended without a traceback; torchrun's last words:\n{shorten(text[-2000:])}"


def _ask_where(pid: int) -> None:
    """Have every worker below `pid` write where it stands: each has told faulthandler to answer
    SIGUSR1. Windows has no such signal; there `_hanging` says so.
    """
    import psutil

    if not hasattr(signal, "SIGUSR1"):
        return
    try:
        for process in psutil.Process(pid).children(recursive=True):
            process.send_signal(signal.SIGUSR1)
    except psutil.Error:
        pass
    time.sleep(0.5)


def _hanging(folder: Path) -> str:
    parts = []
    for path in sorted(folder.glob("hang.worker.*")):
        stack = path.read_text().strip().splitlines()[1:]
        parts.append(
            "\n".join([f"worker {path.suffix[1:]} was here, the innermost call first:", *stack])
        )
    if not hasattr(signal, "SIGUSR1"):
        return "Where they hung is not known: this system has no signal to ask them (SIGUSR1)."
    return shorten("\n".join(parts))


def shorten(text: str) -> str:
    """Files by their names alone: where things lie on this machine is nobody's business.

    >>> shorten('  File "/home/ann/course/ring.py", line 3')
    'File "ring.py", line 3'
    """
    return re.sub(r'File "[^"]*[/\\]', 'File "', text).strip()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    return next((n for n in ("lo", "lo0") if n in names), "")


# --- for the modules that run in workers ---


class Block(nn.Module):
    """x + down(relu(up(x))): the block behind a transformer's attention, rows of `width` numbers,
    8·width² weights.

    >>> Block(8)(torch.zeros(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, width: int, norm: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (rows, width) → (rows, width)
        return x + self.down(F.relu(self.up(self.norm(x))))


def chain(width: int, depth: int, seed: int = 0, norm: bool = False) -> nn.Sequential:
    """`depth` blocks whose weights depend on `seed` alone: the same on every worker that asks for
    the same.

    >>> torch.equal(chain(8, 2)[0].up.weight, chain(8, 2)[0].up.weight)
    True
    """
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(width, norm) for _ in range(depth)])


def batch(
    rows: int, width: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same on every worker that asks with the same seed.

    >>> x, y = batch(rows=4, width=8)
    >>> x.shape, y.shape
    (torch.Size([4, 8]), torch.Size([4, 8]))
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, width, generator=generator, dtype=dtype).unbind(0)
    return x, y


def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Forward and backward of the mean squared error; gradients add up in .grad.

    >>> model = chain(8, 1)
    >>> step(model, *batch(4, 8)).shape
    torch.Size([])
    >>> flat_gradients(model).shape
    torch.Size([552])
    """
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call.

    >>> 0.01 <= seconds(lambda: time.sleep(0.01)) < 1
    True
    """
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flat_gradients(model: nn.Module) -> Tensor:
    """All gradients of a model in one row.

    >>> layer = nn.Linear(2, 1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> flat_gradients(layer)
    tensor([1., 1., 1.])
    """
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --- in a worker ---


def main(arguments: Sequence[str] | None = None) -> None:
    """What torchrun starts: open the process group, run the modules one after the other, write what
    they return.

    >>> main(["ring.py", "--out", "results"])  # doctest: +SKIP
    """
    parser = argparse.ArgumentParser(prog="course_utils.distributed")
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    asked = parser.parse_args(arguments)
    rank = int(os.environ["RANK"])
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"failed.worker.{rank}").unlink(missing_ok=True)  # of a life before a restart
    _watch(asked.out, rank)

    torch.set_num_threads(1)
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ["LOCAL_WORLD_SIZE"]
    )
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=300), **_rendezvous())
        _release()  # importing torch leaves much behind
        for path in map(Path, asked.modules):
            result = _load(path).run(asked.settings | {"out": str(asked.out)})
            target = asked.out / f"{path.stem}.worker.{rank}.json"
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


def _rendezvous() -> dict:
    """torchrun's store, with a part of its own for each restart: addresses of killed workers are
    still in it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}  # RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say all
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    part = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {
        "store": part,
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def _load(path: Path) -> object:
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))  # a module may import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _watch(folder: Path, rank: int) -> None:
    """Say where this worker stands when asked, before it is stopped, and end when whoever started
    it is gone.
    """
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


if __name__ == "__main__":
    main()
