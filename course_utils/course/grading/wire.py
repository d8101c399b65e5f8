"""What may cross from a learner's process to the judge: plain values, rebuilt from their parts.

Nothing is unpickled. A subclass arrives as what it extends (a str whose == always holds becomes a
str), an iterator as a list, an object as a `Foreign` with its attributes, and what cannot be
taken apart as a `Foreign` without any.
"""

import json
import math
import numbers
import struct
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import islice
from socket import socket

import numpy as np
import torch

MOST_BYTES = 256 * 2**20
MOST_ITEMS = 2_000_000
DEPTH = 40
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        torch.complex128,
    )
}


class Broken(Exception):
    """What arrived is no message: the other side is gone, or speaks otherwise than it should."""


class Foreign:
    """An object that stays in the learner's process: its class's name, its number there, and those
    of its attributes that could be taken apart.
    """

    def __init__(self, number: int, name: str, callable_: bool, attributes: dict) -> None:
        self.__dict__.update(attributes)
        self._course_number, self._course_name = number, name
        self._course_callable = callable_

    def __repr__(self) -> str:
        return f"a {self._course_name}"


def send(channel: socket, value: object, blobs: list[bytes]) -> None:
    """One message: JSON and the bytes that it refers to. Raises Broken where nobody reads."""
    head = json.dumps(value).encode()
    sizes = [len(head), *map(len, blobs)]
    try:
        channel.sendall(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        for part in (head, *blobs):
            channel.sendall(part)
    except OSError as error:
        raise Broken(str(error)) from None


def receive(channel: socket) -> tuple[object, list[bytes]]:
    """The next message. Raises Broken at its end, or where it is none or too long."""
    (count,) = struct.unpack("<I", _exactly(channel, 4))
    if not 1 <= count <= 100_000:
        raise Broken("a message of no known form")
    sizes = struct.unpack(f"<{count}Q", _exactly(channel, 8 * count))
    if sum(sizes) > MOST_BYTES:
        raise Broken(f"a message of {sum(sizes):,} bytes; {MOST_BYTES:,} are allowed")
    head, *blobs = (_exactly(channel, size) for size in sizes)
    try:
        return json.loads(head), blobs
    except (ValueError, RecursionError):
        raise Broken("a message of no known form") from None


def _exactly(channel: socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = channel.recv(min(size - len(parts), 2**20))
        except OSError as error:
            raise Broken(str(error)) from None
        if not part:
            raise Broken("the other side is gone")
        parts += part
    return bytes(parts)


def pack(value: object, keep: Callable[[object], int]) -> tuple[object, list[bytes]]:
    """A value as (JSON, bytes). `keep` numbers an object that stays behind. Raises ValueError for
    what is too large or too deep.
    """
    blobs: list[bytes] = []
    room = [MOST_ITEMS]

    def one(v: object, depth: int = 0) -> object:
        room[0] -= 1
        if room[0] < 0 or depth > DEPTH:
            raise ValueError(f"more than {MOST_ITEMS:,} values, or more than {DEPTH} deep")
        if v is None or isinstance(v, bool):
            return v
        if isinstance(v, np.generic | np.ndarray) and v.dtype.kind in "biufc":
            blobs.append(np.ascontiguousarray(v).tobytes())
            alone = isinstance(v, np.generic)
            return ["array", v.dtype.str, list(v.shape), len(blobs) - 1, alone]
        if isinstance(v, torch.Tensor):
            return _tensor(v, blobs) or _kept(v, keep, {})
        if plain := _plain(v):
            return plain
        if isinstance(v, Mapping):
            pairs = [[one(k, depth + 1), one(x, depth + 1)] for k, x in v.items()]
            return ["dict", pairs]
        if isinstance(v, list | tuple | set | frozenset | range | Iterator):
            kinds = (tuple, set, frozenset)
            kind = next((k.__name__ for k in kinds if isinstance(v, k)), "list")
            return [kind, [one(x, depth + 1) for x in islice(v, MOST_ITEMS)]]
        held = getattr(v, "__dict__", None)
        simple = isinstance(held, dict) and not callable(v)
        return _kept(v, keep, one(held, depth + 1)[1] if simple else [])

    return one(value), blobs


def _plain(v: object) -> list | None:
    if isinstance(v, str):
        return ["str", str.__str__(v)]
    if isinstance(v, int):
        return ["int", hex(int(v))]
    if isinstance(v, float):
        return ["float", float.hex(v)]
    if isinstance(v, complex):
        return ["complex", v.real.hex(), v.imag.hex()]
    if isinstance(v, bytes | bytearray):
        return ["bytes", bytes(v).hex()]
    if isinstance(v, torch.dtype):
        return ["dtype", str(v).removeprefix("torch.")]
    if v is ...:
        return ["dots"]
    if isinstance(v, numbers.Rational):
        return ["fraction", hex(v.numerator), hex(v.denominator)]
    return None


def _tensor(t: torch.Tensor, blobs: list[bytes]) -> list | None:
    name = str(t.dtype).removeprefix("torch.")
    if name not in _DTYPES or t.layout != torch.strided:
        return None
    with torch.no_grad():
        plain = t.detach().cpu().contiguous()
        blobs.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return ["tensor", name, list(t.shape), len(blobs) - 1]


def _kept(v: object, keep: Callable[[object], int], attributes: list) -> list:
    name = getattr(v, "__name__", None) if callable(v) else None
    name = name if isinstance(name, str) else type(v).__name__
    return ["kept", keep(v), str.__str__(name)[:80], callable(v), attributes or []]


def unpack(value: object, blobs: list[bytes]) -> object:
    """What `pack` took apart, put together. Raises Broken for anything else."""
    try:
        return _unpack(value, blobs)
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"a value of no known form: {type(error).__name__}") from None


def _unpack(value: object, blobs: list[bytes]) -> object:
    if value is None or isinstance(value, bool):
        return value
    kind, *rest = value
    match kind:
        case "str":
            return str(rest[0])
        case "int":
            return int(rest[0], 16)
        case "float":
            return float.fromhex(rest[0])
        case "complex":
            return complex(*map(float.fromhex, rest))
        case "bytes":
            return bytes.fromhex(rest[0])
        case "fraction":
            return Fraction(int(rest[0], 16), int(rest[1], 16))
        case "dtype":
            return _DTYPES[rest[0]]
        case "dots":
            return ...
        case "array":
            return _array(*rest, blobs)
        case "tensor":
            return _tensor_of(*rest, blobs)
        case "dict":
            return {_unpack(k, blobs): _unpack(v, blobs) for k, v in rest[0]}
        case "kept":
            number, name, callable_, pairs = rest
            held = {str(_unpack(k, blobs)): _unpack(v, blobs) for k, v in pairs}
            return Foreign(int(number), str(name), bool(callable_), held)
    made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return made(_unpack(v, blobs) for v in rest[0])


def _array(dtype: str, shape: list, at: int, alone: bool, blobs: list[bytes]) -> object:
    kind = np.dtype(dtype)
    if kind.kind not in "biufc":
        raise Broken(f"an array of {dtype}")
    array = np.frombuffer(blobs[at], kind).reshape(shape).copy()
    return array[()] if alone else array


def _tensor_of(name: str, shape: list, at: int, blobs: list[bytes]) -> torch.Tensor:
    dtype = _DTYPES[name]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(blobs[at]), dtype=dtype).reshape(shape)
