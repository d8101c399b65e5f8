"""A reader's code run aside, in a thread: stopped where Python can stop it, its prints kept."""

import contextlib
import ctypes
import io
import sys
import threading
from collections.abc import Callable
from typing import TextIO

ENDED, STOPPED, RUNNING = "ended", "stopped", "still running"

__all__ = ["run"]


def run(work: Callable[[], object], seconds: float) -> tuple[str, BaseException | None]:
    """Call `work` and wait for it, `seconds` at most: how it ended, and what it raised or None.

    ENDED is in time; STOPPED, by an exception thrown into it; RUNNING, it could not be stopped: it
    sits in C code (a sleep), or catches everything. What it prints is shown when the wait is over,
    its first 40 lines or 4,000 characters; what other threads print goes its way.

    >>> run(lambda: print("hello"), seconds=5)
    Your code printed:
    hello
    ('ended', None)
    >>> run(lambda: 1 / 0, seconds=5)
    ('ended', ZeroDivisionError('division by zero'))
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    printed = _Printed(thread)
    try:
        with (
            contextlib.redirect_stdout(_Split(sys.stdout, printed)),
            contextlib.redirect_stderr(_Split(sys.stderr, printed)),
        ):
            thread.start()
            thread.join(seconds)
            if thread.is_alive():
                return (STOPPED if _stop(thread) else RUNNING), None
    except KeyboardInterrupt:
        _stop(thread)
        raise
    finally:
        printed.show()
    return ENDED, next(iter(raised), None)


class _Stopped(BaseException):
    """Thrown into an answer that runs too long. A BaseException, so that `except Exception` does
    not swallow it.
    """


def _stop(thread: threading.Thread) -> bool:
    """Raise _Stopped inside the thread until it ends; whether it did. What sits in C code, or
    catches everything, cannot be reached and is left behind.
    """
    for _ in range(20):
        if not thread.is_alive():
            return True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped)
        )
        thread.join(0.05)
    return not thread.is_alive()


class _Printed:
    """What an answer's thread prints, kept until the check is over: its first lines."""

    LINES, CHARACTERS = 40, 4000

    def __init__(self, thread: threading.Thread) -> None:
        self.thread, self.text = thread, ""

    def add(self, text: str) -> None:
        room = self.CHARACTERS + 1 - len(self.text)  # one more: it shows that there was more
        self.text += text[: max(room, 0)]

    def show(self) -> None:
        lines = self.text[: self.CHARACTERS].splitlines()
        more = len(self.text) > self.CHARACTERS or len(lines) > self.LINES
        if lines:
            print("\n".join(["Your code printed:", *lines[: self.LINES], *["…"] * more]))


class _Split(io.TextIOBase):
    """A stream that keeps what one thread writes; what others write goes where it would have
    gone.
    """

    def __init__(self, stream: TextIO, printed: _Printed) -> None:
        self._stream, self._printed = stream, printed

    def write(self, text: str) -> int:
        if threading.current_thread() is not self._printed.thread:
            return self._stream.write(text)
        self._printed.add(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding
