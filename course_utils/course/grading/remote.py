"""The judge's side of the border: a learner's answer, called in the process where it lives.

The check gets a `RemoteAnswer`. Its arguments travel pickled, since the judge is to be trusted;
functions among them stay here and are called back; results come as `wire` rebuilds them.
"""

import builtins
import io
import pickle
import queue
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from course_utils.course.grading import wire
from course_utils.probe import Wrong, shown

CHANNELS = 8


class Gone(BaseException):
    """The answer's process has ended, or speaks as it should not: nothing can be judged any more.

    A BaseException: no check takes it for an error of the answer.
    """


class RemoteAnswer:
    """Called like the answer; what the answer raises is raised here."""

    def __init__(self, line: "Line", number: int, name: str) -> None:
        self._line, self._number, self.__name__ = line, number, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._line.call(self._number, args, kwargs)

    def __deepcopy__(self, memo: dict) -> "RemoteAnswer":
        return self


class Line:
    """Channels to an answer's process: one for each call that is under way, since some answers are
    called from several threads.
    """

    def __init__(self, channels: list[socket]) -> None:
        self.first = channels[0]
        self.free: queue.Queue[socket] = queue.Queue()
        for channel in channels[1:]:
            self.free.put(channel)
        self.reason = ""

    @contextmanager
    def _channel(self) -> Iterator[socket]:
        channel = self.free.get()
        try:
            yield channel
        finally:
            self.free.put(channel)

    def call(self, number: int, args: tuple, kwargs: dict) -> object:
        """One call, with the calls back that it makes. Raises Gone, or what the answer raised."""
        calls = _Calls()
        modes = [m for m in _get_current_dispatch_mode_stack() if _ours(m)]
        pickled = _paused_pickle(calls, (number, args, kwargs, modes, torch.is_grad_enabled()))
        with self._channel() as channel:
            try:
                wire.send(channel, ["call"], [pickled])
                while True:
                    message, blobs = wire.receive(channel)
                    if not (isinstance(message, list) and message and message[0] == "back"):
                        break
                    wire.send(channel, ["here"], [calls.answer(message, blobs)])
                value, error = self._result(message, blobs, calls, args)
            except (wire.Broken, TypeError, ValueError, LookupError, AttributeError) as broken:
                self.reason = self.reason or str(broken) or type(broken).__name__
                raise Gone(self.reason) from None
        if error is not None:
            raise error
        return value

    def _result(
        self, message: list, blobs: list, calls: "_Calls", args: tuple
    ) -> tuple[object, BaseException | None]:
        match message:
            case ["value", value, False]:
                return self._mine(wire.unpack(value, blobs)), None
            case ["value", value, True]:
                after = wire.unpack(value, blobs)
                return None, Wrong(
                    "your code changed its input, which belongs to the caller:"
                    f" {shown(*args)} became {shown(*after)}."
                )
            case ["raised", str(name), str(text), int(which)]:
                return None, calls.raised.get(which) or _error(name, text[:2000])
        raise wire.Broken("a message of no known form")

    def _mine(self, value: object) -> object:
        """A function that was returned can be called from here."""
        if isinstance(value, wire.Foreign) and value._course_callable:
            return RemoteAnswer(self, value._course_number, value._course_name)
        return value


def _error(name: str, text: str) -> BaseException:
    if name == "Wrong":
        return Wrong(text)
    if name == "SystemExit":
        return SystemExit(text)
    known = getattr(builtins, name, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    try:
        made = type(name, (base,), {"__module__": "builtins"})
        return made(text)
    except TypeError:  # an exception that wants more than a text
        return type(name, (Exception,), {"__module__": "builtins"})(text)


def _ours(mode: object) -> bool:
    return type(mode).__module__.startswith("course_utils.")


def _paused_pickle(calls: "_Calls", value: object) -> bytes:
    """Pickled outside of every dispatch mode: what it copies is no work of the answer's."""
    buffer = io.BytesIO()
    with torch.utils._python_dispatch._disable_current_modes():
        _Pickler(buffer, calls).dump(value)
    return buffer.getvalue()


class _Calls:
    """What a call's arguments hold that can be called back, by number; and what these raised."""

    def __init__(self) -> None:
        self.known: list[object] = []
        self.raised: dict[int, BaseException] = {}

    def answer(self, message: list, blobs: list[bytes]) -> bytes:
        """Call back, and pickle the result or the error."""
        _, number, given = message
        args, kwargs = wire.unpack(given, blobs)
        try:
            value = self.known[number](*args, **kwargs)
        except Exception as error:
            self.raised[len(self.raised)] = error
            kind = type(error) if isinstance(error, Wrong) or _plain(error) else RuntimeError
            return pickle.dumps(("raise", kind, str(error), len(self.raised) - 1))
        return _paused_pickle(self, ("value", value))


def _found(function: object) -> bool:
    """Whether it can be imported by its name, there as here."""
    place = sys.modules.get(getattr(function, "__module__", None) or "")
    for name in getattr(function, "__qualname__", "").split("."):
        place = getattr(place, name, None)
    return place is function


def _plain(error: Exception) -> bool:
    return type(error).__module__ == "builtins"


class _Pickler(pickle.Pickler):
    """Functions and other callables stay with the judge, as numbers; so does what came from the
    answer's own process, which finds it there again.
    """

    def __init__(self, file: io.BytesIO, calls: _Calls) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.calls = calls

    def persistent_id(self, value: object) -> object:
        if isinstance(value, wire.Foreign):
            return "own", value._course_number
        if isinstance(value, RemoteAnswer):
            return "own", value._number
        stays = isinstance(value, types.FunctionType | types.MethodType) and not _found(value)
        own = type(value).__module__.startswith("course_utils.checks.")
        if stays or (own and callable(value) and not isinstance(value, torch.nn.Module | type)):
            self.calls.known.append(value)
            return "back", len(self.calls.known) - 1, getattr(value, "__name__", "function")
        return None
