"""The allocator on paper: what it may never do, and what PyTorch's own comments say it does."""

import math
import random

import pytest

from course_utils import caching
from course_utils.caching import MIB, CachingAllocator


def pieces(allocator):
    return [p for s in allocator.segments for p in s.pieces]


@pytest.mark.parametrize("expandable", [False, True])
def test_the_books_are_right_after_every_request(expandable, seeded):
    rng = random.Random(seeded)
    for _ in range(5):
        gpu, live = CachingAllocator(300 * MIB, expandable), []
        for _ in range(120):
            if live and rng.random() < 0.45:
                gpu.free(live.pop(rng.randrange(len(live)))[0])
            elif rng.random() < 0.05:
                gpu.empty_cache()
            else:
                size = rng.choice([100, 2**19, 3 * MIB, 7 * MIB, 25 * MIB, 60 * MIB])
                try:
                    live.append((gpu.malloc(size), size))
                except MemoryError:
                    continue
            used = [p for p in pieces(gpu) if p.used]
            assert {id(p) for p in used} == {id(piece) for piece, _ in live}
            assert all(piece.size >= size and piece.mapped for piece, size in live)
            assert gpu.allocated == sum(p.size for p in used)
            assert gpu.reserved == sum(p.size for p in pieces(gpu) if p.mapped)
            assert gpu.allocated <= gpu.reserved <= gpu.capacity
            for segment in gpu.segments:
                for a, b in zip(segment.pieces, segment.pieces[1:], strict=False):
                    assert a.used or b.used or a.mapped != b.mapped, "two that should be one"
        for piece, _ in live:
            gpu.free(piece)
        gpu.empty_cache()
        assert gpu.allocated == gpu.reserved == 0


def test_an_expandable_segment_maps_and_unmaps_whole_pages(seeded):
    rng = random.Random(seeded)
    gpu, live = CachingAllocator(expandable=True), []
    for _ in range(200):
        if live and rng.random() < 0.5:
            gpu.free(live.pop(rng.randrange(len(live))))
        else:
            live.append(gpu.malloc(rng.randint(1, 50 * MIB)))
        if rng.random() < 0.1:
            gpu.empty_cache()
        for segment in gpu.segments:
            start = 0
            for piece in segment.pieces:
                if not piece.mapped:
                    assert start % caching.PAGE[segment.small] == 0
                    assert piece.size == math.inf or piece.size % caching.PAGE[segment.small] == 0
                start += piece.size
            assert segment.pieces[-1].size == math.inf
    large = [p.size for s in gpu.segments if not s.small for p in s.pieces if p.mapped]
    assert sum(large) % (20 * MIB) == 0


def test_holes_between_living_tensors_stay_with_either_kind():
    for expandable in (False, True):
        gpu = CachingAllocator(80 * MIB, expandable)
        tensors = [gpu.malloc(5 * MIB) for _ in range(16)]
        for tensor in tensors[::2]:
            gpu.free(tensor)
        gpu.empty_cache()
        assert gpu.reserved == 80 * MIB
        with pytest.raises(MemoryError, match="40 MiB are free"):
            gpu.malloc(10 * MIB)
        for tensor in tensors[1:8:2]:  # the first half is empty: two pages, or two segments
            gpu.free(tensor)
        assert gpu.malloc(40 * MIB if expandable else 20 * MIB).used


def test_the_growing_batch_of_pytorchs_comment_strands_segments_and_expanding_cures_it():
    """N, N + 1, N + 2 … rows: the older segments are too small, and partly filled by others."""
    rising = list(range(256, 2049, 119))
    free, growing = CachingAllocator(), CachingAllocator(expandable=True)
    caching.runs(free, rising), caching.runs(growing, rising)
    assert free.peak_reserved > 1.3 * free.peak_allocated
    assert growing.peak_reserved < 1.05 * growing.peak_allocated
    left, cured = (caching.smallest_device(rising, expandable=e) for e in (False, True))
    assert cured < left < free.peak_reserved / MIB


def test_equal_batches_strand_nothing():
    gpu, steady = CachingAllocator(), []
    for _ in caching.training(gpu, [1024] * 8):
        steady.append(gpu.device_calls)
    assert len(set(steady[1:])) == 1, "after two steps everything comes from the cache"
    assert gpu.peak_reserved < 1.25 * gpu.peak_allocated


def test_the_cache_is_emptied_before_it_gives_up_and_only_then():
    gpu = CachingAllocator(100 * MIB)
    gpu.free(gpu.malloc(60 * MIB))
    assert (gpu.reserved, gpu.rescues) == (60 * MIB, 0)
    gpu.malloc(30 * MIB)  # cut from the cached 60
    assert (gpu.reserved, gpu.rescues) == (60 * MIB, 0)
    gpu = CachingAllocator(100 * MIB)
    gpu.free(gpu.malloc(60 * MIB))
    gpu.malloc(80 * MIB)
    assert (gpu.reserved, gpu.rescues) == (80 * MIB, 1)


def test_training_on_paper_frees_what_it_makes_and_the_search_ends_where_it_fits():
    draws = caching.lengths(6, seed=1)
    gpu = CachingAllocator()
    after = [g.allocated for g in caching.training(gpu, draws)]
    assert len(set(after)) == 1  # weights and Adam's state
    needed = caching.smallest_device(draws, step=2)
    assert caching.runs(CachingAllocator(needed * MIB), draws)
    assert not caching.runs(CachingAllocator((gpu.peak_allocated // MIB - 1) * MIB), draws)
