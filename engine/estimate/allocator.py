"""What PyTorch's CUDA caching allocator would reserve for a stream of allocations and frees. No torch, no device.

The rules are those of `DeviceCachingAllocator` in `c10/cuda/CUDACachingAllocator.cpp`, with the constants of
`c10/core/AllocatorConfig.h` as torch 2.13 ships it and every option at its default: no `max_split_size_mb`, no
`garbage_collection_threshold`, no `roundup_power2_divisions`, `large_segment_size_mb` 20, no private pools. The names
in brackets below are the functions there.

- A request is rounded up to 512 bytes (`round_size`); one of 0 bytes never reaches the allocator (`raw_alloc`).
- Up to 1 MiB it is served from the small pool, above from the large one; each stream has its own (`get_pool`).
- Of the free blocks that are large enough the smallest is taken, of equal ones the lowest (`get_free_block`).
- Its rest stays free where it is at least 512 bytes (small pool) or more than 1 MiB (large pool); otherwise the whole
  block counts as allocated (`should_split`). So `torch.cuda.memory_allocated`, which sums blocks, can lie above the
  sum of the rounded requests, by up to 1 MiB for each large one.
- Without such a block a segment is taken from the device: 2 MiB for a small request, 20 MiB for one below 10 MiB, else
  the request rounded up to 2 MiB (`get_allocation_size`). All are multiples of the 2 MiB pages in which the device
  hands out memory, so the reserved bytes are what the device has lost.
- Where that would exceed the capacity, every wholly free segment of every pool and stream is given back and the request
  is tried again; if it fails again, it is out of memory (`malloc`, `release_cached_blocks`).
- A freed block is joined with free neighbours in its segment (`free_block`); segments stay reserved until `empty_cache`
  or memory pressure.

With expandable segments a pool has one range of addresses that grows by pages, of 2 MiB (small) or 20 MiB (large); any
rest from 512 bytes on stays free, and giving back unmaps the whole pages inside each free block.

Two things are not known here. Where the device puts a segment: a later one is taken to lie above an earlier one, which
decides only between free blocks of one size. Of 27 runs on an H200 that was so in 24, as far as their reserved bytes
tell; in the others a segment more is predicted than was taken (up to 3.6 %). And memory used on several streams
(`record_stream`), whose blocks come back later: a block here is free when it is freed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import length_hint
from types import MappingProxyType
from typing import Final

PAGE_BYTES: Final = 2 << 20
"""What the device hands out (and kSmallBuffer, and kRoundLarge)."""

_BITS: Final = 9  # Sizes and addresses inside count kMinBlockSize, 512 bytes: small integers are fast ones.
_SMALL: Final = (1 << 20) >> _BITS  # kSmallSize: the largest request of the small pool; a large rest must exceed it
_PAGE: Final = PAGE_BYTES >> _BITS
_LARGE_SEGMENT: Final = (20 << 20) >> _BITS  # large_segment_size
_LARGE: Final = (10 << 20) >> _BITS  # kMinLargeAlloc: from here on a request has a segment of its own size
# The source reserves 9/8 of the device's memory for an expandable segment; nothing asks for more, so "ample" will do.
_RANGE: Final = _LARGE_SEGMENT << 23

# A free block is one integer, its size above its address: sorted, such integers are in the order of best fit.
_SHIFT: Final = 60
_ADDRESS: Final = (1 << _SHIFT) - 1

_NONE: Final[Mapping[int, int]] = MappingProxyType({})


class OutOfMemory(Exception):
    """A request that fits nowhere, even after all that was cached was given back. `index` is the event's, in a replay.

    `allocated_bytes` and `reserved_bytes` are those at the failure, after the giving back.
    """

    def __init__(
        self,
        *,
        requested_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        capacity_bytes: int,
        index: int | None = None,
    ) -> None:
        super().__init__(
            f"no room for {requested_bytes} bytes: {allocated_bytes} are allocated and {reserved_bytes} reserved"
            f" of {capacity_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes
        self.index = index


class _Pressure(Exception):
    """A held allocator would have to give memory back. `index` is the event's; nothing of it has happened."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class _Pool:
    """The free blocks of one pool of one stream and, with expandable segments, where its unmapped ranges begin."""

    __slots__ = ("free", "is_small", "page", "unmapped")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.page = _PAGE if is_small else _LARGE_SEGMENT
        self.free: list[int] = []
        self.unmapped: list[int] = []


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _segment(size: int) -> int:
    """Return the size of the segment that a request is given (`get_allocation_size`)."""
    return _PAGE if size <= _SMALL else _LARGE_SEGMENT if size < _LARGE else _rounded(size, _PAGE)


class Allocator:
    """The caching allocator of one device. Keys are positive, and name a block from its malloc to its free.

    `capacity_bytes` is what it may reserve: the memory fraction (`allowed_memory_maximum`) or what the device has left.
    The two agree but for expandable segments, where the source holds the segment size that the request would have had
    against the fraction, and each page against the device: here both must fit. `aside` says of keys that
    they are allocated on another stream, a stream of copies, by its number from 1 on: each has pools of its own.
    """

    __slots__ = (
        "_absent",
        "_allocated",
        "_aside",
        "_capacity",
        "_ends",
        "_expandable",
        "_is_held",
        "_live",
        "_others",
        "_peak_allocated",
        "_peak_reserved",
        "_pools",
        "_reserved",
        "_segments",
        "_starts",
        "_top",
        "_unmapped_ends",
        "_unmapped_starts",
    )

    def __init__(
        self,
        capacity_bytes: int | None = None,
        *,
        expandable_segments: bool = False,
        aside: Mapping[int, int] = _NONE,
    ) -> None:
        self._aside = aside
        self._capacity = None if capacity_bytes is None else capacity_bytes >> _BITS
        self._expandable = expandable_segments
        self._is_held = False
        self._allocated = self._peak_allocated = 0
        self._reserved = self._peak_reserved = 0
        self._top = 0
        # A stream of copies is known by its number below 0 here.
        self._pools: dict[int, tuple[_Pool, _Pool]] = {-n: (_Pool(True), _Pool(False)) for n in set(aside.values())}
        self._others = {-number: pools for number, pools in self._pools.items()}
        self._live: dict[int, tuple[int, int, list[int]]] = {}
        self._absent: set[int] = set()
        # Neighbours are found by address. Segments lie apart, so blocks that touch are of one segment.
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        self._unmapped_starts: dict[int, int] = {}
        self._unmapped_ends: dict[int, int] = {}

    @property
    def allocated_bytes(self) -> int:
        """The bytes of the allocated blocks: `torch.cuda.memory_allocated`."""
        return self._allocated << _BITS

    @property
    def reserved_bytes(self) -> int:
        """The bytes of the segments: `torch.cuda.memory_reserved`."""
        return self._reserved << _BITS

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that were allocated: `torch.cuda.max_memory_allocated`."""
        return self._peak_allocated << _BITS

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that were reserved: `torch.cuda.max_memory_reserved`."""
        return self._peak_reserved << _BITS

    def malloc(self, key: int, size_bytes: int, stream: int = 0) -> None:
        """Allocate, or raise OutOfMemory; then what was cached has been given back."""
        try:
            self._run([key], {key: size_bytes}, _never, stream)
        except OutOfMemory as error:
            error.index = None
            raise

    def free(self, key: int) -> None:
        self._run([-key], {}, _never)

    def empty_cache(self) -> None:
        """Give back every wholly free segment, or the free pages of expandable ones."""
        for index in (1, 0):  # the large pool first, as the source does
            for pools in self._pools.values():
                (self._unmap if self._expandable else self._release)(pools[index])

    def reset_peaks(self) -> None:
        """Let the peaks begin anew at what is there now."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def _run(
        self,
        events: Sequence[int],
        sizes: Sequence[int] | Mapping[int, int],
        is_optional: Callable[[int], bool],
        stream: int = 0,
        first: int = 0,
    ) -> list[int]:
        """Do these events, the first of which has the index `first`. Return the indices of those that were given up.

        One loop for everything, with its state in locals: this is where the time goes.
        """
        pools = self._pools.get(stream)
        if pools is None:
            pools = self._pools[stream] = (_Pool(True), _Pool(False))
        small, large = pools
        aside = self._aside
        usual = (small, large)
        others = self._others
        starts, ends, live, absent = self._starts, self._ends, self._live, self._absent
        pop_live, keep_live = live.pop, live.setdefault
        pop_start, pop_end = starts.pop, ends.pop
        expandable = self._expandable
        least_large_rest = 1 if expandable else _SMALL + 1
        allocated, peak = self._allocated, self._peak_allocated
        given_up: list[int] = []
        remaining = iter(events)
        try:
            for n in remaining:
                if n < 0:
                    gone = pop_live(-n, None)
                    if gone is None:
                        absent.remove(-n)
                        continue
                    begin, size, free = gone
                    allocated -= size
                    end = begin + size
                    if end in starts:
                        size = pop_start(end)
                        del free[bisect_left(free, size << _SHIFT | end)]
                        end += size
                    if begin in ends:
                        before = pop_end(begin)
                        del free[bisect_left(free, begin - before << _SHIFT | before)]
                        begin = before
                    size = end - begin
                    starts[begin] = size
                    ends[end] = begin
                    insort(free, size << _SHIFT | begin)
                elif n:
                    size = sizes[n] + 511 >> _BITS
                    here = others[aside[n]] if aside and n in aside else usual
                    if size <= _SMALL:
                        if not size:
                            absent.add(n)
                            continue
                        pool, least_rest = here[0], 1
                    else:
                        pool, least_rest = here[1], least_large_rest
                    free = pool.free
                    i = bisect_left(free, size << _SHIFT)
                    if i == len(free):
                        found = self._grow(pool, size)
                        if found < 0:
                            index = first + len(events) - length_hint(remaining) - 1
                            if self._is_held:
                                raise _Pressure(index)
                            if not is_optional(n):
                                raise OutOfMemory(
                                    requested_bytes=sizes[n],
                                    allocated_bytes=allocated << _BITS,
                                    reserved_bytes=self._reserved << _BITS,
                                    capacity_bytes=(self._capacity or 0) << _BITS,
                                    index=index,
                                )
                            given_up.append(index)
                            absent.add(n)
                            continue
                    else:
                        found = free.pop(self._reaching_least(free, i) if expandable else i)
                    begin = found & _ADDRESS
                    rest = (found >> _SHIFT) - size
                    del starts[begin]
                    if rest >= least_rest:
                        end = begin + size
                        starts[end] = rest
                        ends[end + rest] = end
                        insort(free, rest << _SHIFT | end)
                    else:
                        size += rest
                        del ends[begin + size]
                    block = (begin, size, free)
                    if keep_live(n, block) is not block:
                        raise ValueError(f"{n} is allocated already")
                    allocated += size
                    if allocated > peak:
                        peak = allocated
                else:
                    self.empty_cache()
        finally:
            self._allocated, self._peak_allocated = allocated, peak
        return given_up

    def _grow(self, pool: _Pool, size: int) -> int:
        """Return a free block with room for `size`, in no pool any more, or -1 if there is no memory for it."""
        found = self._try_grow(pool, size)
        if found < 0 and not self._is_held:
            self.empty_cache()
            found = self._try_grow(pool, size)
        return found

    def _try_grow(self, pool: _Pool, size: int) -> int:
        segment = _segment(size)
        if self._capacity is not None and self._reserved + segment > self._capacity:
            return -1
        if self._expandable:
            return self._grow_range(pool, size)
        begin = self._top
        self._top = begin + segment + 1
        self._segments[begin] = segment
        self._starts[begin] = segment
        self._ends[begin + segment] = begin
        self._reserve(segment)
        return segment << _SHIFT | begin

    def _reserve(self, size: int) -> None:
        self._reserved += size
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    def _release(self, pool: _Pool) -> None:
        """Give back the segments that are one free block (`release_blocks`)."""
        kept = []
        for block in pool.free:
            begin, size = block & _ADDRESS, block >> _SHIFT
            if self._segments.get(begin) == size:
                del self._segments[begin], self._starts[begin], self._ends[begin + size]
                self._reserved -= size
            else:
                kept.append(block)
        pool.free[:] = kept

    # Expandable segments.

    def _reaching_least(self, free: list[int], i: int) -> int:
        """Return the block to take from `i` on: a block counts with the unmapped range behind it (`get_free_block`).

        The search goes up only while the next one reaches less far, so it need not end at the least of all.
        """
        reach = self._reach(free[i])
        while i + 1 < len(free) and (following := self._reach(free[i + 1])) < reach:
            i, reach = i + 1, following
        return i

    def _reach(self, block: int) -> int:
        size = block >> _SHIFT
        return size + self._unmapped_starts.get((block & _ADDRESS) + size, 0)

    def _grow_range(self, pool: _Pool, size: int) -> int:
        """Map what is missing at the lowest address with room (`try_allocate_expandable_block`).

        All of it or nothing: several gaps together never take more pages than the segment for which there is room.
        """
        begin = self._lowest_room(pool, size)
        if begin in self._unmapped_starts and not self._map(pool, begin, size):
            return -1
        while self._starts[begin] < size:
            have = self._starts[begin]
            if not self._map(pool, begin + have, size - have):
                return -1
        block = self._starts[begin] << _SHIFT | begin
        del pool.free[bisect_left(pool.free, block)]
        return block

    def _lowest_room(self, pool: _Pool, size: int) -> int:
        """Return where `size` fits over free and unmapped blocks, maybe in a new range (`find_expandable_block`)."""
        starts, unmapped = self._starts, self._unmapped_starts
        for begin in pool.unmapped:
            begin = end = self._ends.get(begin, begin)
            while end - begin < size:
                block = starts.get(end) or unmapped.get(end)
                if block is None:
                    break
                end += block
            if end - begin >= size:
                return begin
        begin = _rounded(self._top, _LARGE_SEGMENT)
        self._top = begin + _RANGE + 1
        self._segments[begin] = _RANGE
        self._set_unmapped(pool, begin, begin + _RANGE)
        return begin

    def _set_unmapped(self, pool: _Pool, begin: int, end: int) -> None:
        self._unmapped_starts[begin] = end - begin
        self._unmapped_ends[end] = begin
        insort(pool.unmapped, begin)

    def _unset_unmapped(self, pool: _Pool, begin: int) -> int:
        size = self._unmapped_starts.pop(begin)
        del self._unmapped_ends[begin + size]
        del pool.unmapped[bisect_left(pool.unmapped, begin)]
        return size

    def _map(self, pool: _Pool, begin: int, size: int) -> bool:
        """Map whole pages for up to `size` from the beginning of an unmapped range (`map_block`)."""
        have = self._unmapped_starts[begin]
        mapped = min(_rounded(size, pool.page), have)
        if self._capacity is not None and self._reserved + mapped > self._capacity:
            return False
        self._unset_unmapped(pool, begin)
        end = begin + mapped
        if mapped < have:
            self._set_unmapped(pool, end, begin + have)
        self._reserve(mapped)
        free = pool.free
        if end in self._starts:
            after = self._starts.pop(end)
            del free[bisect_left(free, after << _SHIFT | end)]
            end += after
        if begin in self._ends:
            before = self._ends.pop(begin)
            del free[bisect_left(free, begin - before << _SHIFT | before)]
            begin = before
        self._set_free(free, begin, end)
        return True

    def _set_free(self, free: list[int], begin: int, end: int) -> None:
        self._starts[begin] = end - begin
        self._ends[end] = begin
        insort(free, end - begin << _SHIFT | begin)

    def _unmap(self, pool: _Pool) -> None:
        """Give back the whole pages inside free blocks; a range without a mapped page goes too (`unmap_block`)."""
        free, page = pool.free, pool.page
        for block in free.copy():
            begin, size = block & _ADDRESS, block >> _SHIFT
            end = begin + size
            # Ranges begin at a multiple of every page size.
            low, high = _rounded(begin, page), end // page * page
            if low >= high:
                continue
            del free[bisect_left(free, block)], self._starts[begin], self._ends[end]
            if begin < low:
                self._set_free(free, begin, low)
            if high < end:
                self._set_free(free, high, end)
            self._reserved -= high - low
            if high in self._unmapped_starts:
                high += self._unset_unmapped(pool, high)
            if low in self._unmapped_ends:
                low = self._unmapped_ends[low]
                self._unset_unmapped(pool, low)
            if self._segments.get(low) == high - low:
                del self._segments[low]
            else:
                self._set_unmapped(pool, low, high)

    def _copy(self, capacity_bytes: int) -> Allocator:
        """Return a copy with another capacity, not held. Without expandable segments."""
        copy = Allocator(capacity_bytes, aside=self._aside)
        copy._allocated, copy._peak_allocated = self._allocated, self._peak_allocated
        copy._reserved, copy._peak_reserved = self._reserved, self._peak_reserved
        copy._top = self._top
        frees: dict[int, list[int]] = {}
        for stream, pools in self._pools.items():
            copy._pools.setdefault(stream, (_Pool(True), _Pool(False)))
            for ours, its in zip(pools, copy._pools[stream], strict=True):
                its.free = frees[id(ours.free)] = ours.free.copy()
        copy._live = {key: (begin, size, frees[id(free)]) for key, (begin, size, free) in self._live.items()}
        copy._absent = self._absent.copy()
        copy._starts, copy._ends = self._starts.copy(), self._ends.copy()
        copy._segments = self._segments.copy()
        return copy

    def _advance(
        self, capacity_bytes: int, events: list[int], sizes: Sequence[int], first: int
    ) -> tuple[int, list[int]]:
        """Go on to where memory runs short at this capacity, as it must. Return that index, and the events from it."""
        self._capacity = capacity_bytes >> _BITS
        try:
            self._run(events, sizes, _never, first=first)
        except _Pressure as pressure:
            return pressure.index, events[pressure.index - first :]
        raise AssertionError("a capacity above what is reserved without a limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What a replay came to."""

    peak_allocated_bytes: int
    """The most bytes of allocated blocks: `torch.cuda.max_memory_allocated`."""
    peak_reserved_bytes: int
    """The most bytes of segments: `torch.cuda.max_memory_reserved`."""
    allocated_bytes: tuple[int, ...] = ()
    """The most that were allocated in each stretch; what it begins with counts."""
    reserved_bytes: tuple[int, ...] = ()
    """The most that were reserved in each stretch; what it begins with counts."""
    given_up: tuple[int, ...] = ()
    """The indices of the optional allocations for which there was no memory."""


def _never(key: int) -> bool:
    return False


def _chooser(is_optional: frozenset[int] | bytearray) -> Callable[[int], bool]:
    if isinstance(is_optional, bytearray):
        return lambda key: bool(is_optional[key])
    return is_optional.__contains__


def replay(
    events: Sequence[int],
    sizes: Sequence[int],
    capacity_bytes: int | None = None,
    *,
    is_optional: frozenset[int] | bytearray = frozenset(),
    marks: Sequence[int] = (),
    expandable_segments: bool = False,
    aside: Mapping[int, int] = _NONE,
) -> Reserved:
    """Return the peaks of a stream of events: n > 0 allocates `sizes[n]` bytes, -n frees them, 0 empties the cache.

    An optional allocation (a key of the set, or one whose byte is not 0) that fails is left out, with its free; that it
    failed has given back what was cached. Any other raises OutOfMemory. `marks` are the ascending indices at which
    stretches begin, each up to the next; what comes before the first counts only in the peaks of the whole.
    """
    allocator = Allocator(capacity_bytes, expandable_segments=expandable_segments, aside=aside)
    choose = _chooser(is_optional)
    events = list(events)
    allocated, reserved, given_up = [], [], []
    bounds = [0, *marks, len(events)]
    for first, stop in pairwise(bounds):
        allocator.reset_peaks()
        given_up += allocator._run(events[first:stop], sizes, choose, first=first)
        allocated.append(allocator.peak_allocated_bytes)
        reserved.append(allocator.peak_reserved_bytes)
    return Reserved(
        peak_allocated_bytes=max(allocated),
        peak_reserved_bytes=max(reserved),
        allocated_bytes=tuple(allocated[1:]),
        reserved_bytes=tuple(reserved[1:]),
        given_up=tuple(given_up),
    )


def least_bytes(
    events: Sequence[int], sizes: Sequence[int], is_optional: frozenset[int] | bytearray = frozenset()
) -> int:
    """Return a capacity below which no replay succeeds: the peak of what is not optional, each pool in whole pages."""
    choose = _chooser(is_optional)
    small = large = peak = 0
    for n in events:
        key = abs(n)
        if not n or choose(key):
            continue
        size = sizes[key] + 511 >> _BITS
        change = size if n > 0 else -size
        if size <= _SMALL:
            small += change
        else:
            large += change
        if n > 0 and small + large > peak - 2 * _PAGE:
            peak = max(peak, _rounded(small, _PAGE) + _rounded(large, _PAGE))
    return peak << _BITS


def required_bytes(
    events: Sequence[int],
    sizes: Sequence[int],
    is_optional: frozenset[int] | bytearray = frozenset(),
    *,
    low: int | None = None,
    tolerance_bytes: int = 8 << 20,
    expandable_segments: bool = False,
    aside: Mapping[int, int] = _NONE,
) -> int:
    """Return a capacity, in bytes, at which the replay was seen to succeed, or is known to.

    Bisection finds it between `low` (by default `least_bytes`, below which nothing succeeds) and what is reserved
    without a limit (with expandable segments, and the largest segment, which `Allocator` asks room for): either it is
    `low` in whole pages, or the replay was seen to fail at some capacity no more than `tolerance_bytes` (taken as at
    least 2 MiB) below it. That is not all there is to know, because success does not only grow with capacity: what is
    given back under pressure changes where later blocks lie, so a lesser capacity may succeed and a greater one fail.
    Only from the upper end on does every capacity succeed.
    """
    events = list(events)
    choose = _chooser(is_optional)
    high = replay(events, sizes, expandable_segments=expandable_segments, aside=aside).peak_reserved_bytes
    if expandable_segments:
        high += max((_segment(sizes[n] + 511 >> _BITS) for n in events if n > 0), default=0) << _BITS
    # Device memory comes in whole pages, so no other capacities are tried.
    probe = _rounded(least_bytes(events, sizes, is_optional) if low is None else low, PAGE_BYTES)
    failed = probe - PAGE_BYTES
    # Until memory first runs short a replay does not depend on its capacity. `held` stands where it does at the least
    # capacity still in question, for every trial to begin there. (A range that grew in part would be in its way.)
    held, done = Allocator(expandable_segments=expandable_segments, aside=aside), 0
    held._is_held = True
    rest = events
    if probe < high and not expandable_segments:
        done, rest = held._advance(probe, rest, sizes, done)
    while probe < high:
        allocator = (
            Allocator(probe, expandable_segments=True, aside=aside) if expandable_segments else held._copy(probe)
        )
        try:
            allocator._run(rest, sizes, choose, first=done)
        except OutOfMemory:
            failed = probe
            if not expandable_segments:
                done, rest = held._advance(failed, rest, sizes, done)
        else:
            high = probe
        if high - failed <= max(tolerance_bytes, PAGE_BYTES):
            break
        probe = _rounded((failed + high) // 2, PAGE_BYTES)
    return high
