"""Inside a learner's process: the cell is executed, and the answer is called as the judge asks."""

import contextlib
import copy
import io
import os
import pickle
import sys
import threading
import traceback
from socket import socket

import torch

from course_utils.course import check
from course_utils.course.grading import tampering, wire


def serve(channels: list[socket]) -> None:
    """Everything that an answer's process does, until the judge ends it."""
    first, *others = channels
    (job,) = _message(first, "job")
    space, wrong = check.defined([(cell, False) for cell in job["context"]])
    wrong = _defined(space, job["cell"])
    if wrong is None and job["answer"] not in space:
        wrong = f"the exercise's cell does not define {job['answer']}."
    if wrong is not None:
        wire.send(first, ["stopped", wrong], [])
        return
    answer = space[job["answer"]]
    if job["within"]:
        wire.send(first, ["verdict", *_within(answer, job)], [])
        return
    kept = _Kept()
    for channel in others:
        threading.Thread(target=_calls, args=(channel, kept), daemon=True).start()
    wire.send(first, ["ready", kept.number(answer)], [])
    wire.receive(first)  # until the judge goes


def _message(channel: socket, kind: str) -> tuple:
    message, _ = wire.receive(channel)
    if message[0] != kind:
        raise wire.Broken(f"{kind} was expected")
    return tuple(message[1:])


def _defined(space: dict, cell: str) -> str | None:
    """Execute the exercise's cell in `space`; what it stopped with, or None."""
    import linecache

    name = tampering.CELL
    linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
    try:
        exec(compile(cell, name, "exec"), space)
    except (Exception, SystemExit) as error:
        return f"the exercise's cell stops with {type(error).__name__}: {_text(error)}"
    return None


def _within(answer: object, job: dict) -> list:
    """The check beside the answer: (status, message), "tampering" where something was touched."""
    from course_utils import exercises

    watch = tampering.Watch()
    with contextlib.redirect_stdout(io.StringIO()):
        result = exercises.check(job["exercise"], answer, seed=job["seed"], seconds=job["seconds"])
    if touched := watch.touched():
        return ["tampering", f"the answer touched {', '.join(touched[:3])}."]
    return [result.status, result.message]


class _Kept:
    """Objects that stay in this process, by number."""

    def __init__(self) -> None:
        self.all: list[object] = []

    def number(self, value: object) -> int:
        self.all.append(value)
        return len(self.all) - 1


class _Back:
    """A function of the judge's, called from here."""

    def __init__(self, channel: socket, number: int, name: str, kept: _Kept) -> None:
        self._to, self.__name__ = (channel, number, kept), name

    def __call__(self, *args: object, **kwargs: object) -> object:
        channel, number, kept = self._to
        given, blobs = wire.pack((args, kwargs), kept.number)
        wire.send(channel, ["back", number, given], blobs)
        _, (reply,) = wire.receive(channel)
        kind, *rest = _Unpickler(io.BytesIO(reply), channel, kept).load()
        if kind == "value":
            return rest[0]
        error = rest[0](rest[1])
        error._course_which = rest[2]
        raise error

    def __deepcopy__(self, memo: dict) -> "_Back":
        return self


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, channel: socket, kept: _Kept) -> None:
        super().__init__(file)
        self.channel, self.kept = channel, kept

    def persistent_load(self, key: tuple) -> object:
        if key[0] == "own":
            return copy.deepcopy(self.kept.all[key[1]])  # as Probe copies what it hands over
        return _Back(self.channel, *key[1:], self.kept)


def _calls(channel: socket, kept: _Kept) -> None:
    """Serve one channel: call after call."""
    try:
        while True:
            _, (blob,) = wire.receive(channel)
            number, args, kwargs, modes, grad = _Unpickler(io.BytesIO(blob), channel, kept).load()
            wire.send(channel, *_called(kept, kept.all[number], args, kwargs, modes, grad))
    except wire.Broken:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(70)  # the judge hears at once that there is no answer


def _called(
    kept: _Kept, answer: object, args: tuple, kwargs: dict, modes: list, grad: bool
) -> tuple[list, list[bytes]]:
    """The message that tells how a call ended."""
    try:
        before = _given(args, kwargs)
        with torch.set_grad_enabled(grad), contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            value = answer(*args, **kwargs)
            value, blobs = wire.pack(value, kept.number)
        if _given(args, kwargs) != before:
            value, blobs = wire.pack(args, kept.number)
            return ["value", value, True], blobs
        return ["value", value, False], blobs
    except BaseException as error:
        which = getattr(error, "_course_which", -1)
        return ["raised", type(error).__name__, _text(error), which], []


def _given(args: tuple, kwargs: dict) -> tuple:
    return wire.pack((args, kwargs), lambda _: 0)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:
        return "(its text could not be made)"


def main(channels: list[socket]) -> None:
    """Serve, and leave without what `atexit` or a thread may have in mind."""
    try:
        serve(channels)
    except wire.Broken:
        pass
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(0)
