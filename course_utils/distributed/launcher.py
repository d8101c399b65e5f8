"""Start workers by torchrun, wait for them as long as told, and say whose mistake it was."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from course_utils import ROOT, processes

__all__ = [
    "FORKS",
    "WorkerError",
    "command",
    "free_port",
    "job",
    "launch",
    "results",
    "shorten",
]

FORKS = sys.platform == "linux"
STARTS = 5  # where there is no safe fork, fresh processes are started, so many at most
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
    timeout: float = 300.0,
    restarts: int = 0,
    port: int | None = None,
    env: dict[str, str] | None = None,
    fresh: int = 0,
) -> dict[str, list]:
    """Start `workers` processes by torchrun, call each module's `run(settings)` in them, return the
    results by module, one a rank.

    With `fresh`, every worker forks so many processes one after the other, and each runs the
    modules anew: the results are a list of lives, each with one result a rank. (Where there is no
    safe fork, five starts at most take their place.)

    `out` keeps what the workers write (a temporary folder otherwise). A busy `port` (a free one by
    default) is retried with another. Raises WorkerError with the worker's own traceback,
    TimeoutError after `timeout` seconds with the place where each worker hung. However the call
    ends (error, timeout, Ctrl-C), no process outlives it.

    >>> launch("ring.py", workers=2)
    Traceback (most recent call last):
    FileNotFoundError: no such module: ring.py
    >>> launch("ring.py", workers=2, settings={"steps": 8})["ring"]  # doctest: +SKIP
    [{'rank': 0, …}, {'rank': 1, …}]
    """
    missing = [str(m) for m in modules if not Path(m).is_file()]
    if missing:
        raise FileNotFoundError(f"no such module: {', '.join(missing)}")
    stems = [Path(m).stem for m in modules]
    if fresh and not FORKS:
        same = {"workers": workers, "settings": settings, "timeout": timeout, "env": env}
        lives = [launch(*modules, **same) for _ in range(min(fresh, STARTS))]
        return {stem: [life[stem] for life in lives] for stem in stems}
    with tempfile.TemporaryDirectory(prefix="course-workers-") as temporary:
        folder = Path(out or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tail = ["-m", "course_utils.distributed", *map(str, modules), "--out", str(folder)]
        tail += ["--settings", json.dumps(settings or {}), "--fresh", str(fresh)]
        for attempt in range(4):
            for old in folder.glob("*.worker.*"):
                old.unlink()
            code, text = _torchrun(
                tail, workers, restarts, port or free_port(), timeout, env or {}, folder
            )
            if code == 0:
                return {stem: results(folder, stem, workers, fresh) for stem in stems}
            if not _BUSY.search(text) or attempt == 3:
                break
            port = None  # somebody else took it: another one
        raise WorkerError(first_failure(folder, text))


def job(name: str) -> Path:
    """The file of a module that comes with the course.

    >>> job("scaling").is_file()
    True
    """
    return Path(__file__).parent / "jobs" / f"{name}.py"


def free_port() -> int:
    """A port that nothing listens on at this moment.

    >>> 1024 <= free_port() < 65536
    True
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(tail: Sequence[str], workers: int, restarts: int, port: int) -> list[str]:
    """torchrun's command line for one machine; where forks are safe, that of the agent which takes
    the same options and forks its workers.

    >>> command(["ring.py"], workers=2, restarts=0, port=29400)[-1]
    'ring.py'
    """
    return [
        sys.executable,
        "-m",
        "course_utils.distributed.agent" if _may_fork() else "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={workers}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        "--rdzv-conf=is_host=1",
        "--local-addr=127.0.0.1",  # not the machine's name, which nobody may know
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id={port}",
        *tail,
    ]


def _may_fork() -> bool:
    """Linux, and no GPU whose driver would be forked with the rest."""
    import torch

    return FORKS and not torch.cuda.is_available()


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
            env=os.environ | environment() | env,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            ask_where(process.pid)
            raise TimeoutError(
                f"the workers did not end within {timeout:g} s and were stopped.\n{hanging(folder)}"
            ) from None
        finally:
            processes.end(process.pid)
            process.wait()
        log.seek(0)
        return code, log.read()


def environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        # threads that wait for work leave their core to the other worker
        "GOMP_SPINCOUNT": "10000",
        # glibc keeps freed memory in each arena; workers have many threads
        "MALLOC_ARENA_MAX": "2",
        "GLOO_SOCKET_IFNAME": _loopback(),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a GPU must not spoil the forks
        "PYTHONPATH": (
            os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        ),
        "COURSE_LAUNCHER": str(os.getpid()),
    }


def results(folder: Path, stem: str, workers: int, fresh: int = 0) -> list:
    """What module `stem` returned on each worker: also from a launch that failed in a later
    module. With `fresh`, a list of that for each life.

    >>> for rank in range(2):
    ...     _ = Path(f"ring.worker.0.{rank}.json").write_text(json.dumps({"rank": rank}))
    >>> results(Path(), "ring", workers=2)
    [{'rank': 0}, {'rank': 1}]
    """
    lives = [
        [
            json.loads((folder / f"{stem}.worker.{life}.{rank}.json").read_text())
            for rank in range(workers)
        ]
        for life in range(fresh or 1)
    ]
    return lives if fresh else lives[0]


def first_failure(folder: Path, text: str) -> str:
    """The worker that failed first says why; one that lost its peer fails later, and says only
    that.
    """
    failures = sorted(
        (json.loads(p.read_text()) for p in folder.glob("failed.worker.*")), key=lambda f: f["when"]
    )
    if failures:
        return f"worker {failures[0]['rank']} raised\n{shorten(failures[0]['traceback'])}"
    return f"a worker ended without a traceback; torchrun's last words:\n{shorten(text[-2000:])}"


def ask_where(pid: int) -> None:
    """Have every worker below `pid` write where it stands: each has told faulthandler to answer
    SIGUSR1. Windows has no such signal; there `hanging` says so.
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


def hanging(folder: Path) -> str:
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
