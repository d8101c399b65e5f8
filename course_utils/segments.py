"""What PyTorch's caching allocator gets from the device and cuts up: its sizes (from c10's
CUDACachingAllocator.cpp), segments and their pieces.
"""

from dataclasses import dataclass, field

MIB = 2**20
SMALL = MIB  # requests up to here share segments of 2 MiB
LARGE = 10 * MIB  # from here on a request gets a segment of its own
PAGE = {True: 2 * MIB, False: 20 * MIB}  # of an expandable segment: small pool, large pool


@dataclass(eq=False)  # two pieces of one size are two pieces
class Piece:
    """A part of a segment: in use, free, or (in an expandable segment) without memory behind it.

    >>> Piece(512, Segment(small=True)).used
    False
    """

    size: float
    segment: "Segment" = field(repr=False)
    used: bool = False
    mapped: bool = True


@dataclass(eq=False)
class Segment:
    """What the device gave at once (or, expandable, a range of addresses), as its pieces in order.

    >>> Segment(small=False).pieces
    []
    """

    small: bool
    pieces: list[Piece] = field(default_factory=list)


def segment_size(size: int) -> int:
    """Bytes asked of the device for a request of `size` bytes that finds no free piece.

    >>> [segment_size(mib * MIB) // MIB for mib in (1, 5, 25)]
    [2, 20, 26]
    """
    if size <= SMALL:
        return 2 * MIB
    return 20 * MIB if size < LARGE else -(-size // (2 * MIB)) * 2 * MIB
