"""PyTorch's caching allocator for a GPU, on paper: where tensors would lie, and what is left over.

The rules are those of PyTorch's c10/cuda/CUDACachingAllocator.cpp, for one stream. Memory comes
from the device in *segments*; *pieces* are cut from them; a freed piece merges with its free
neighbours and waits for the next request. With `expandable=True` a pool has one segment that grows
by pages, and an empty page can go back. What is not modelled: rounding by cudaMalloc, streams,
graphs, `max_split_size_mb`, and what libraries take for themselves.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

from course_utils.segments import MIB, PAGE, SMALL, Piece, Segment, segment_size


class CachingAllocator:
    """An allocator over a device of `capacity` bytes.

    `allocated` are the bytes of living tensors, `reserved` those taken from the device;
    `peak_allocated` and `peak_reserved` are their highest values, `device_calls` counts requests
    to the device, and `rescues` how often the cache had to be emptied before one was granted.

    >>> gpu = CachingAllocator(80 * MIB)
    >>> tensors = [gpu.malloc(5 * MIB) for _ in range(16)]
    >>> for tensor in tensors[::2]:
    ...     gpu.free(tensor)
    >>> gpu.empty_cache()
    >>> gpu.allocated // MIB, gpu.reserved // MIB
    (40, 80)
    """

    def __init__(self, capacity: float = math.inf, expandable: bool = False) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.segments: list[Segment] = []
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.device_calls = self.rescues = 0

    def malloc(self, size: int) -> Piece:
        """A piece for a tensor of `size` bytes. Raises MemoryError where the device has no more,
        not even after all that can be given back was given back.
        """
        size = max(512, -(-size // 512) * 512)
        small = size <= SMALL
        piece = self._best_fit(size, small) or self._new(size, small)
        if piece is None:
            self.rescues += 1
            self.empty_cache()
            piece = self._new(size, small)
        if piece is None:
            free = (self.capacity - self.allocated) / MIB
            raise MemoryError(f"no room for {size / MIB:g} MiB; {free:g} MiB are free, in parts")
        rest = piece.size - size
        if rest >= 512 if small or self.expandable else rest > MIB:  # cut off what is left over
            self._cut(piece, size)
        piece.used = True
        self.allocated += piece.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return piece

    def free(self, piece: Piece) -> None:
        """The tensor is gone. Its piece stays with the allocator."""
        piece.used = False
        self.allocated -= piece.size
        self._merge(piece)

    def empty_cache(self) -> None:
        """Give back what can be: segments in which nothing is used, and pages without a tenant."""
        if self.expandable:
            for segment in self.segments:
                for piece in [p for p in segment.pieces if p.mapped and not p.used]:
                    self._unmap(piece, PAGE[segment.small])
            return
        kept = [s for s in self.segments if any(p.used for p in s.pieces)]
        self.device_calls += len(self.segments) - len(kept)
        self.segments = kept
        self.reserved = sum(p.size for s in kept for p in s.pieces)

    # ------------------------------------------------------------------------ how it is done

    def _best_fit(self, size: int, small: bool) -> Piece | None:
        """The smallest free piece that is large enough; one that can still grow comes last."""
        best, room = None, math.inf
        for segment in self.segments:
            if segment.small != small:
                continue
            for piece, after in zip(segment.pieces, [*segment.pieces[1:], None], strict=True):
                if piece.used or not piece.mapped or piece.size < size:
                    continue
                grows = after is not None and not after.mapped
                mine = piece.size + (after.size if grows else 0)
                if best is None or mine < room:
                    best, room = piece, mine
        return best

    def _new(self, size: int, small: bool) -> Piece | None:
        if self.expandable:
            return self._grow(size, small)
        wanted = segment_size(size)
        if self.reserved + wanted > self.capacity:
            return None
        segment = Segment(small)
        segment.pieces.append(Piece(wanted, segment))
        self.segments.append(segment)
        self._take(wanted)
        return segment.pieces[0]

    def _take(self, size: int) -> None:
        self.device_calls += 1
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _grow(self, size: int, small: bool) -> Piece | None:
        """Memory for the lowest addresses where `size` bytes fit, page by page."""
        segment = next((s for s in self.segments if s.small == small), None)
        if segment is None:
            segment = Segment(small)
            segment.pieces.append(Piece(math.inf, segment, mapped=False))
            self.segments.append(segment)
        piece = _lowest(segment.pieces, size)
        if not piece.mapped:
            piece = self._map(piece, min(size, piece.size))
        while piece is not None and piece.size < size:
            after = segment.pieces[segment.pieces.index(piece) + 1]  # it is free: _lowest saw it
            if not after.mapped:
                piece = self._map(after, min(size - piece.size, after.size))
        return piece

    def _map(self, piece: Piece, size: float) -> Piece | None:
        """Put pages behind the first `size` bytes; None where the device has no more."""
        page = PAGE[piece.segment.small]
        wanted = math.ceil(size / page) * page
        if self.reserved + wanted > self.capacity:
            return None
        self._cut(piece, wanted)
        piece.mapped = True
        self._take(wanted)
        return self._merge(piece)

    def _unmap(self, piece: Piece, page: int) -> None:
        """Give back the whole pages inside a free piece."""
        pieces = piece.segment.pieces
        start = sum(p.size for p in pieces[: pieces.index(piece)])
        first, last = math.ceil(start / page) * page, (start + piece.size) // page * page
        if last <= first:
            return
        if first > start:
            piece = self._cut(piece, first - start)
        self._cut(piece, last - first)
        piece.mapped = False
        self.reserved -= piece.size
        self.device_calls += 1
        self._merge(piece)

    def _cut(self, piece: Piece, size: float) -> Piece:
        """Shorten a piece to `size`; returns what is cut off, or the piece where nothing is."""
        if piece.size == size:
            return piece
        pieces = piece.segment.pieces
        rest = Piece(piece.size - size, piece.segment, mapped=piece.mapped)
        piece.size = size
        pieces.insert(pieces.index(piece) + 1, rest)
        return rest

    def _merge(self, piece: Piece) -> Piece:
        """Join a free piece with neighbours of its kind; returns what it has become."""
        pieces = piece.segment.pieces
        at = pieces.index(piece)
        for other in pieces[at + 1 : at + 2] + pieces[max(at - 1, 0) : at]:
            if not other.used and other.mapped == piece.mapped:
                piece.size += other.size
                pieces.remove(other)
        return piece


def _lowest(pieces: list[Piece], size: int) -> Piece:
    """The first free piece from which `size` bytes of free addresses follow each other. There is
    one: the last piece has no end.
    """
    start, room = None, 0.0
    for piece in pieces:
        start, room = (None, 0.0) if piece.used else (start or piece, room + piece.size)
        if room >= size:
            return start
    raise AssertionError("the last piece of an expandable segment has no end")


# ----------------------------------------------------------------------------- training on paper


def training(
    allocator: CachingAllocator,
    lengths: Sequence[int],
    *,
    after_step: Callable[[CachingAllocator], None] | None = None,
    layers: int = 6,
) -> Iterator[CachingAllocator]:
    """Steps of a small language model on batches of these lengths (tokens); yields after each.

    A block of width 1,024 keeps 14 numbers for each token and width, as in chapter 08; its
    backward pass takes two more tensors of fourfold width at a time. Gradients are made in the
    backward pass and freed at the step's end; Adam's state comes into being in the first step.
    `after_step` is called with the allocator after each step. Raises MemoryError.

    >>> gpu = CachingAllocator()
    >>> for _ in training(gpu, [512, 512]):
    ...     gpu.allocated // MIB
    288
    288
    """
    width, kept = 1024, (1, 1, 4, 4, 4)
    weights = [4 * 4 * width * width] * 2  # up and down
    for _ in range(layers):
        for size in weights:
            allocator.malloc(size // 2)  # 16 bits
    state = None
    for length in lengths:
        unit, held = 2 * length * width, []
        for _ in range(layers):
            held.append([allocator.malloc(unit * k) for k in kept])
        gradients = []
        for tensors in reversed(held):
            passing = [allocator.malloc(unit * 4) for _ in range(2)]
            gradients += [allocator.malloc(size // 2) for size in weights]
            for tensor in passing + tensors[::-1]:
                allocator.free(tensor)
        if state is None:
            state = [allocator.malloc(size // 2) for _ in range(layers * 2) for size in weights]
        for tensor in gradients:
            allocator.free(tensor)
        if after_step:
            after_step(allocator)
        yield allocator


def lengths(steps: int, seed: int, low: int = 256, high: int = 2048) -> list[int]:
    """Batches of random lengths; the same for the same seed.

    >>> lengths(3, seed=0) == lengths(3, seed=0)
    True
    """
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(steps)]


def runs(allocator: CachingAllocator, lengths: Sequence[int], **how: object) -> bool:
    """Whether the training on paper comes to its end on this device.

    >>> runs(CachingAllocator(100 * MIB), [512])
    False
    """
    try:
        for _ in training(allocator, lengths, **how):
            pass
    except MemoryError:
        return False
    return True


def smallest_device(
    lengths: Sequence[int], *, expandable: bool = False, step: int = 8, **how: object
) -> int:
    """MiB of the smallest device on which these batches can be trained, within `step` MiB: found by
    halving, between what lives at once and what is reserved where there is no limit.

    >>> smallest_device([512, 512]) >= 288
    True
    """
    free = CachingAllocator(expandable=expandable)
    runs(free, lengths, **how)
    low, high = free.peak_allocated // MIB, math.ceil(free.peak_reserved / MIB)
    while high - low > step:
        middle = (low + high) // 2
        fits = runs(CachingAllocator(middle * MIB, expandable), lengths, **how)
        low, high = (low, middle) if fits else (middle, high)
    return high
