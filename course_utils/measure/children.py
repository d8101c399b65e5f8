"""Processes of their own: for another instruction set, another runtime, or a peak memory that
nothing else shares.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from course_utils import ROOT
from course_utils.measure.resources import release


@dataclass(frozen=True)
class Child:
    """What a child process gave: its last line as JSON, its peak memory, and what it wrote to the
    error stream.

    >>> Child({"a": 1}, peak_bytes=30_000_000, stderr="").result["a"]
    1
    """

    result: object
    peak_bytes: int
    stderr: str


def child(code: str, *, env: dict[str, str] | None = None, timeout: float = 120.0) -> Child:
    """Run Python source in a process of its own and read the last line it prints as JSON.

    For what cannot share a process: another ISA cap (`env={"ONEDNN_MAX_CPU_ISA": "AVX2"}`), another
    runtime, a peak memory. Raises RuntimeError with the child's own traceback if it fails,
    TimeoutError after `timeout` seconds.

    >>> child("print('noise'); print([1, 2])").result
    [1, 2]
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=err, env=_environment(env or {})
        )
        try:
            peak = _wait(process, timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0), err.seek(0)
        printed, errors = out.read().strip(), err.read()
    if process.returncode != 0:
        raise RuntimeError(f"the child process ended with {process.returncode}:\n{errors[-3000:]}")
    last = printed.splitlines()[-1] if printed else ""
    try:
        return Child(json.loads(last), peak, errors)
    except json.JSONDecodeError:
        raise RuntimeError(
            f"the child's last line must be JSON; it printed {last[:200]!r}."
        ) from None


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """What a child gets: this process's environment, `own` over it, and the course on its path,
    also where `own` brings a path and the course is a clone that nobody installed (Colab).
    """
    env = os.environ | own
    path = filter(None, [env.get("PYTHONPATH"), str(ROOT)])
    return env | {"PYTHONPATH": os.pathsep.join(path)}


def _wait(process: subprocess.Popen, timeout: float) -> int:
    """Wait for the process; return its peak resident memory in bytes, as last seen before it ended
    (read every 5 ms).
    """
    peak, end = 0, time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(
                f"the child process did not end within {timeout:.0f} s and was stopped."
            )
        peak = max(peak, _resident_peak(process.pid))
        time.sleep(0.005)
    return peak


def _resident_peak(pid: int) -> int:
    """Linux keeps the high-water mark itself; elsewhere the present size has to do."""
    import psutil

    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        try:
            return psutil.Process(pid).memory_info().rss
        except psutil.Error:
            return 0


def turns(
    code: str,
    arms: Mapping[str, dict[str, str]],
    *,
    rounds: int,
    starts: int = 1,
    timeout: float = 120.0,
) -> dict[str, list[object]]:
    """One child an arm, all alive at once and asked in turn: `rounds` results of each, the k-th
    ones of one round.

    `code` defines `sample()`, which returns what JSON can hold; an arm is the environment its child
    gets. For arms that can't share a process (`{"ONEDNN_MAX_CPU_ISA": "AVX2"}`) and must share the
    machine's moods: two children that run one after the other are as bad a comparison as two loops.
    The order changes every round, the first answer is thrown away.

    One child an arm is one sample of a process. For a verdict ask for five `starts` at least: the
    children are ended and started anew, and each list holds `starts` times `rounds` results, start
    by start; `over_processes` takes one number from each start. Raises RuntimeError with a child's
    own traceback if it fails, TimeoutError after `timeout` seconds; no child outlives the call.

    >>> turns("sample = lambda: 7", {"a": {}, "b": {}}, rounds=2)
    {'a': [7, 7], 'b': [7, 7]}
    """
    results: dict[str, list[object]] = {name: [] for name in arms}
    release()  # the children are about to need what this process holds free
    end = time.monotonic() + timeout
    for _ in range(starts):
        _one_start(code, arms, rounds, end, timeout, results)
    return results


def _one_start(
    code: str,
    arms: Mapping[str, dict[str, str]],
    rounds: int,
    end: float,
    timeout: float,
    results: dict[str, list[object]],
) -> None:
    with contextlib.ExitStack() as stack:
        late = threading.Event()
        children = {name: stack.enter_context(_Turn(name, code, env)) for name, env in arms.items()}

        def stop() -> None:
            late.set()
            for one in children.values():
                one.process.kill()

        clock = threading.Timer(max(end - time.monotonic(), 0.0), stop)
        stack.callback(clock.cancel)
        clock.start()
        try:
            for k in range(rounds + 1):
                for name in random.sample(list(arms), len(arms)):
                    answer = children[name].ask()
                    if k:
                        results[name].append(answer)
        except RuntimeError:
            if late.is_set():
                raise TimeoutError(
                    f"the children did not end within {timeout:g} s and were stopped."
                ) from None
            raise


_TURN = """
import json as _json, os as _os, sys as _sys
import course_utils as _course  # the allocator as in every other process that is timed
_answers = _os.fdopen(_os.dup(1), "w")
_os.dup2(2, 1)  # what libraries print must not be taken for an answer
{code}
for _ in _sys.stdin:
    _answers.write(_json.dumps(sample()) + "\\n")
    _answers.flush()
"""


class _Turn:
    """A child that answers one line on its output for one line on its input."""

    def __init__(self, name: str, code: str, env: dict[str, str]) -> None:
        self.name, self.code, self.env = name, code, env

    def __enter__(self) -> "_Turn":
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-c", _TURN.replace("{code}", self.code)]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.errors,
            "text": True,
        }
        self.process = subprocess.Popen(command, env=_environment(self.env), **pipes)
        return self

    def ask(self) -> object:
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(
                f"the child {self.name!r} ended with"
                f" {self.process.returncode}:\n{self.errors.read()[-3000:]}"
            )
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()
