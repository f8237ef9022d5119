"""The caching allocator's rules, each checked by hand, and against a slow one that keeps lists of pieces."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.estimate.allocator import Allocator, OutOfMemory, least_bytes, replay, required_bytes
from engine.estimate.pinned import pinned_bytes

KIB, MIB = 1 << 10, 1 << 20


def filled(*sizes: int, capacity: int | None = None, expandable: bool = False) -> Allocator:
    """Return an allocator in which keys 1, 2, 3... have these sizes."""
    allocator = Allocator(capacity, expandable_segments=expandable)
    for key, size in enumerate(sizes, 1):
        allocator.malloc(key, size)
    return allocator


def state(allocator: Allocator) -> tuple[int, int]:
    return allocator.allocated_bytes, allocator.reserved_bytes


# Rounding and segments.


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (0, 0, 0),  # never reaches the allocator
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest small one
        (MIB + 1, MIB + 512, 20 * MIB),  # shares a 20 MiB segment from here on
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounded first: 10 MiB, its own segment
        (10 * MIB + 1, 12 * MIB - (2 * MIB - 512), 12 * MIB),  # the rest, 2 MiB - 512, is over 1 MiB and stays free
        (11 * MIB, 12 * MIB, 12 * MIB),  # the rest, 1 MiB, is not: all 12 MiB count as allocated
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB + 512 is again
        (100 * MIB, 100 * MIB, 100 * MIB),
    ],
)
def test_one_request(size: int, allocated: int, reserved: int) -> None:
    allocator = filled(size)
    assert state(allocator) == (allocated, reserved)
    allocator.free(1)
    assert state(allocator) == (0, reserved)
    allocator.empty_cache()
    assert state(allocator) == (0, 0)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment_to_its_last_granule() -> None:
    allocator = filled(MIB, MIB - 512, 512)  # together 2 MiB
    assert state(allocator) == (2 * MIB, 2 * MIB)
    allocator.malloc(4, 1)
    assert state(allocator) == (2 * MIB + 512, 4 * MIB)


def test_requests_below_ten_mib_share_twenty() -> None:
    allocator = filled(9 * MIB, 9 * MIB)  # 2 MiB left
    assert state(allocator) == (18 * MIB, 20 * MIB)
    allocator.malloc(3, 2 * MIB + 1)  # does not fit
    assert allocator.reserved_bytes == 40 * MIB


def test_the_pools_are_apart() -> None:
    allocator = filled(9 * MIB, 512)  # 11 MiB are free in the large pool, but a small request has its own
    assert state(allocator) == (9 * MIB + 512, 22 * MIB)


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = filled(40 * MIB, 30 * MIB, 12 * MIB)
    for key in (1, 2, 3):
        allocator.free(key)
    allocator.malloc(4, 25 * MIB)  # from the 30; 5 MiB are left there
    allocator.malloc(5, 38 * MIB)  # from the 40
    allocator.malloc(6, 11 * MIB)  # the 12, whole
    assert state(allocator) == (25 * MIB + 38 * MIB + 12 * MIB, 82 * MIB)


def test_of_equal_blocks_the_lower_is_taken() -> None:
    allocator = filled(12 * MIB, 12 * MIB)
    allocator.free(2)
    allocator.free(1)
    allocator.malloc(3, 12 * MIB)  # the first segment again
    allocator.empty_cache()
    assert allocator.reserved_bytes == 12 * MIB
    assert list(allocator._segments) == [0]


def test_a_kept_rest_is_allocated_and_comes_back_whole() -> None:
    allocator = filled(20 * MIB)
    allocator.free(1)
    allocator.malloc(2, 19 * MIB)  # 1 MiB is no rest
    assert allocator.allocated_bytes == 20 * MIB
    allocator.free(2)
    allocator.malloc(3, 20 * MIB)
    assert state(allocator) == (20 * MIB, 20 * MIB)


def test_freed_neighbours_are_joined_within_a_segment_only() -> None:
    allocator = filled(6 * MIB, 6 * MIB, 8 * MIB)  # one segment, full
    allocator.malloc(4, 20 * MIB)
    allocator.free(1)
    allocator.free(3)
    allocator.free(2)
    allocator.malloc(5, 20 * MIB)  # the three
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(4)
    allocator.free(5)
    allocator.malloc(6, 40 * MIB)  # two segments are no one
    assert allocator.reserved_bytes == 80 * MIB


def test_emptying_the_cache_keeps_a_segment_in_use() -> None:
    allocator = filled(9 * MIB, 2 * MIB, 30 * MIB, 512)
    for key in (1, 3, 4):
        allocator.free(key)
    allocator.empty_cache()  # the 30 and the small segment go; in the 20, the 2 are in use
    assert state(allocator) == (2 * MIB, 20 * MIB)


def test_streams_do_not_share_blocks_but_give_back_for_each_other() -> None:
    allocator = Allocator(40 * MIB)
    allocator.malloc(1, 20 * MIB, stream=0)
    allocator.free(1)
    allocator.malloc(2, 20 * MIB, stream=7)
    assert state(allocator) == (20 * MIB, 40 * MIB)
    allocator.malloc(3, 20 * MIB, stream=9)  # stream 0's cached segment makes room
    assert state(allocator) == (40 * MIB, 40 * MIB)


# Out of memory.


def test_cached_segments_are_given_back_before_it_is_out_of_memory() -> None:
    allocator = filled(30 * MIB, 20 * MIB, 512, capacity=60 * MIB)
    allocator.free(1)
    allocator.free(3)
    allocator.malloc(4, 40 * MIB)  # 52 + 40 > 60; without the 30 and the 2 it is 60
    assert state(allocator) == (60 * MIB, 60 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(5, 3)
    error = caught.value
    assert (error.requested_bytes, error.allocated_bytes, error.reserved_bytes) == (3, 60 * MIB, 60 * MIB)
    assert error.capacity_bytes == 60 * MIB
    assert error.index is None


def test_a_rest_in_a_used_segment_is_not_given_back() -> None:
    allocator = filled(2 * MIB, capacity=40 * MIB)  # 18 of 20 are free, and stay reserved
    with pytest.raises(OutOfMemory):
        allocator.malloc(2, 21 * MIB)
    allocator.malloc(3, 18 * MIB)
    assert state(allocator) == (20 * MIB, 20 * MIB)


def test_a_small_request_needs_a_whole_page() -> None:
    with pytest.raises(OutOfMemory):
        filled(512, capacity=2 * MIB - 1)


def test_keys_are_held_to_their_word() -> None:
    allocator = filled(512)
    with pytest.raises(ValueError, match="1 is allocated"):
        allocator.malloc(1, 512)
    with pytest.raises(KeyError):
        Allocator().free(2)


# Expandable segments.


def test_a_range_grows_by_pages() -> None:
    allocator = filled(25 * MIB, expandable=True)
    assert state(allocator) == (25 * MIB, 40 * MIB)  # two pages of 20
    allocator.malloc(2, 15 * MIB)
    assert state(allocator) == (40 * MIB, 40 * MIB)
    allocator.malloc(3, 512)  # two-MiB pages in the small pool
    assert state(allocator) == (40 * MIB + 512, 42 * MIB)


def test_any_rest_is_split_off_a_range() -> None:
    allocator = filled(20 * MIB - 512, expandable=True)
    assert state(allocator) == (20 * MIB - 512, 20 * MIB)


def test_the_free_end_of_a_range_is_used_when_it_grows() -> None:
    allocator = filled(15 * MIB, expandable=True)
    allocator.malloc(2, 25 * MIB)  # 5 are free, 20 more are mapped
    assert state(allocator) == (40 * MIB, 40 * MIB)


def test_whole_pages_inside_a_free_block_are_unmapped_and_filled_again() -> None:
    allocator = filled(30 * MIB, 40 * MIB, 10 * MIB, expandable=True)  # four pages
    allocator.free(2)  # 30 to 70: the page from 40 to 60 is wholly free
    allocator.empty_cache()
    assert state(allocator) == (40 * MIB, 60 * MIB)
    allocator.malloc(4, 40 * MIB)  # free, unmapped, free: the gap is filled
    assert state(allocator) == (80 * MIB, 80 * MIB)
    for key in (1, 3, 4):
        allocator.free(key)
    allocator.empty_cache()
    assert state(allocator) == (0, 0)
    assert not allocator._segments


def test_best_fit_counts_what_a_block_can_grow_to() -> None:
    allocator = filled(20 * MIB, 20 * MIB, 15 * MIB, expandable=True)  # 5 are free at the growing end
    allocator.free(1)  # 20 MiB free, which cannot grow
    allocator.malloc(4, 4 * MIB)  # the 5 would fit, but reach further than the 20
    assert state(allocator) == (39 * MIB, 60 * MIB)
    allocator.malloc(5, 16 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_pages_are_given_back_for_a_request_elsewhere() -> None:
    allocator = filled(40 * MIB, 512, 20 * MIB, capacity=62 * MIB, expandable=True)
    allocator.free(1)
    for key in range(4, 14):
        allocator.malloc(key, MIB)  # the third MiB asks for a second small page
    assert state(allocator) == (20 * MIB + 512 + 10 * MIB, 20 * MIB + 12 * MIB)


def test_of_equal_free_parts_of_a_range_the_lower_is_taken() -> None:
    allocator = filled(20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB, expandable=True)
    allocator.free(1)
    allocator.free(3)
    allocator.malloc(5, 20 * MIB)
    assert allocator._live[5][0] == 0


def test_a_range_needs_room_for_the_segment_and_for_the_pages() -> None:
    allocator = filled(15 * MIB, capacity=42 * MIB, expandable=True)
    with pytest.raises(OutOfMemory):
        allocator.malloc(2, 23 * MIB)  # 5 are free and one page of 20 would do, but 20 + 24 > 42
    assert allocator.reserved_bytes == 20 * MIB
    allocator.malloc(2, 22 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    with pytest.raises(OutOfMemory):
        filled(25 * MIB, capacity=30 * MIB, expandable=True)  # 26 would do, but it takes two pages of 20


# Replays.


def test_stretches_begin_with_what_is_there() -> None:
    sizes = [0, 30 * MIB, 12 * MIB, 512]
    #         0  1   2  3   4  5  6
    events = [1, 2, -1, 0, -2, 3, 2]
    result = replay(events, sizes, marks=(2, 4))
    assert result.peak_allocated_bytes == 42 * MIB
    assert result.peak_reserved_bytes == 42 * MIB
    # The first stretch begins with both; the second with 12, then the cached 12 and a small segment.
    assert result.allocated_bytes == (42 * MIB, 12 * MIB + 512)
    assert result.reserved_bytes == (42 * MIB, 14 * MIB)
    assert replay(events, sizes).reserved_bytes == ()
    assert replay([], []) == replay([0], [0])


@pytest.mark.parametrize("optional", [frozenset({2}), bytearray([0, 0, 1, 0])])
def test_an_optional_allocation_is_given_up_but_not_without_a_try(optional: frozenset[int] | bytearray) -> None:
    sizes = [0, 20 * MIB, 30 * MIB, 4]
    events = [1, -1, 1, 3, -3, 2, -2]
    result = replay(events, sizes, 40 * MIB, is_optional=optional, marks=(6,))
    assert result.given_up == (5,)
    assert result.peak_reserved_bytes == 22 * MIB
    assert result.reserved_bytes == (20 * MIB,)  # the small segment went
    with pytest.raises(OutOfMemory) as caught:
        replay(events, sizes, 40 * MIB, marks=(3, 4))
    assert caught.value.index == 5


def test_the_least_is_known_before_any_replay() -> None:
    sizes = [0, 513, 12 * MIB + 1, 100 * MIB]
    # The small pool needs a page for 1024 bytes, the large one seven for 12 MiB + 512.
    assert least_bytes([1, 2, 3, -3], sizes, frozenset({3})) == 2 * MIB + 14 * MIB
    assert least_bytes([], sizes) == 0


def test_required_counts_what_fragments() -> None:
    # 2 MiB in use hold a segment of 20, so 30 need 50; the 4 need another page.
    sizes = [0, 2 * MIB, 30 * MIB, 4, 40 * MIB]
    events = [1, 2, 3]
    assert required_bytes(events, sizes, tolerance_bytes=0) == 52 * MIB
    # Freed before the 40 come, the 30 are given back: 20 + 2 + 40, where 92 would be reserved without a limit.
    events = [1, 2, 3, -2, 4]
    assert replay(events, sizes).peak_reserved_bytes == 92 * MIB
    assert required_bytes(events, sizes, tolerance_bytes=0) == 62 * MIB
    assert 62 * MIB <= required_bytes(events, sizes, tolerance_bytes=8 * MIB) <= 70 * MIB
    assert required_bytes(events, sizes, low=64 * MIB) == 64 * MIB
    assert required_bytes(events, sizes, low=500 * MIB) == 92 * MIB
    assert required_bytes(events, sizes, frozenset({4}), tolerance_bytes=0) == 52 * MIB
    assert required_bytes([], sizes) == 0


# Anything, against a slow allocator.


class Piece:
    """A part of a segment: "used", "free" or "unmapped"."""

    def __init__(self, size: int, kind: str) -> None:
        self.size, self.kind = size, kind


class Slow:
    """The same rules over lists of pieces, in bytes, with nothing remembered that can be looked for."""

    def __init__(self, capacity: int | None, expandable: bool) -> None:
        self.capacity = capacity if capacity is not None else 1 << 60
        self.expandable = expandable
        self.segments: list[tuple[bool, list[Piece]]] = []
        self.used: dict[int, Piece | None] = {}

    def total(self, *kinds: str) -> int:
        return sum(p.size for _, pieces in self.segments for p in pieces if p.kind in kinds)

    def state(self) -> tuple[int, int]:
        return self.total("used"), self.total("used", "free")

    def fitting(self, small: bool, size: int) -> tuple[list[Piece], int] | None:
        found = []
        for number, (is_small, pieces) in enumerate(self.segments):
            if is_small == small:
                places = accumulate((p.size for p in pieces), initial=0)
                for i, (piece, place) in enumerate(zip(pieces, places, strict=False)):
                    if piece.kind == "free" and piece.size >= size:
                        behind = pieces[i + 1] if i + 1 < len(pieces) else None
                        more = behind.size if behind and behind.kind == "unmapped" else 0
                        found.append((piece.size, number, place, piece.size + more, i))
        if not found:
            return None
        found.sort()
        best = 0
        while self.expandable and best + 1 < len(found) and found[best + 1][3] < found[best][3]:
            best += 1
        return self.segments[found[best][1]][1], found[best][4]

    def tidy(self) -> None:
        for _, pieces in self.segments:
            for i in range(len(pieces) - 1, 0, -1):
                if pieces[i].kind == pieces[i - 1].kind != "used":
                    pieces[i - 1].size += pieces.pop(i).size

    def grown(self, small: bool, size: int) -> tuple[list[Piece], int] | None:
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.total("used", "free") + segment > self.capacity:
            return None
        if not self.expandable:
            pieces = [Piece(segment, "free")]
            self.segments.append((small, pieces))
            return pieces, 0
        page = 2 * MIB if small else 20 * MIB
        while True:
            for is_small, pieces in self.segments:
                for start, piece in enumerate(pieces):
                    room, stop = 0, start
                    while stop < len(pieces) and pieces[stop].kind != "used" and room < size:
                        room += pieces[stop].size
                        stop += 1
                    if is_small != small or room < size or piece.kind == "used":
                        continue
                    have = 0
                    for i in range(start, stop):
                        if pieces[i].kind == "unmapped":
                            part = min(-(-min(size - have, pieces[i].size) // page) * page, pieces[i].size)
                            if self.total("used", "free") + part > self.capacity:
                                self.tidy()
                                return None
                            if part < pieces[i].size:
                                pieces.insert(i + 1, Piece(pieces[i].size - part, "unmapped"))
                            pieces[i].size, pieces[i].kind = part, "free"
                        have += pieces[i].size
                    self.tidy()
                    return pieces, start
            self.segments.append((small, [Piece(20 * MIB << 20, "unmapped")]))

    def malloc(self, key: int, size_bytes: int) -> bool:
        size = -(-size_bytes // 512) * 512
        if not size:
            self.used[key] = None
            return True
        small = size <= MIB
        found = self.fitting(small, size) or self.grown(small, size)
        if found is None:
            self.empty_cache()
            found = self.grown(small, size)
            if found is None:
                return False
        pieces, i = found
        rest = pieces[i].size - size
        if rest >= 512 if small or self.expandable else rest > MIB:
            pieces[i].size = size
            pieces.insert(i + 1, Piece(rest, "free"))
        pieces[i].kind = "used"
        self.used[key] = pieces[i]
        return True

    def free(self, key: int) -> None:
        piece = self.used.pop(key)
        if piece:
            piece.kind = "free"
            self.tidy()

    def empty_cache(self) -> None:
        if not self.expandable:
            self.segments = [s for s in self.segments if any(p.kind == "used" for p in s[1])]
            return
        for small, pieces in self.segments:
            page = 2 * MIB if small else 20 * MIB
            place = 0
            for piece in pieces.copy():
                low, high = -(-place // page) * page, (place + piece.size) // page * page
                if piece.kind == "free" and low < high:
                    parts = [(low - place, "free"), (high - low, "unmapped"), (place + piece.size - high, "free")]
                    i = pieces.index(piece)
                    pieces[i : i + 1] = [Piece(size, kind) for size, kind in parts if size]
                place += piece.size
        self.tidy()
        self.segments = [s for s in self.segments if any(p.kind != "unmapped" for p in s[1])]


def assert_tiled(allocator: Allocator) -> None:
    """Assert that blocks fill their segments without gaps or overlaps, and that free ones are joined and listed."""
    kinds: dict[int, tuple[str, int]] = {}
    for begin, size, _ in allocator._live.values():
        kinds[begin] = ("used", size)
    for name, starts in (("free", allocator._starts), ("unmapped", allocator._unmapped_starts)):
        assert not kinds.keys() & starts.keys()
        kinds |= {begin: (name, size) for begin, size in starts.items()}
    reserved = seen = 0
    for begin, size in allocator._segments.items():
        place, before = begin, ""
        while place < begin + size:
            kind, part = kinds[place]
            assert kind != before or kind == "used"
            place, before = place + part, kind
            seen += 1
            reserved += part * (kind != "unmapped")
        assert place == begin + size
    assert seen == len(kinds)
    assert reserved * 512 == allocator.reserved_bytes
    listed = [b for pools in allocator._pools.values() for pool in pools for b in pool.free]
    assert sorted(listed) == sorted(size << 60 | begin for begin, size in allocator._starts.items())
    assert all(pool.free == sorted(pool.free) for pools in allocator._pools.values() for pool in pools)
    assert allocator._ends == {begin + size: begin for begin, size in allocator._starts.items()}
    assert allocator._unmapped_ends == {b + size: b for b, size in allocator._unmapped_starts.items()}


SIZES = st.one_of(
    st.sampled_from([0, 1, 512, 513, MIB, MIB + 1, 5 * MIB, 10 * MIB - 511, 11 * MIB, 19 * MIB, 20 * MIB, 41 * MIB]),
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(1, 60 * MIB),
)
# A number above 0 is a request of so many bytes - 1, one below 0 frees the live block with that index (from the end).
STEPS = st.lists(st.one_of(SIZES.map(lambda size: size + 1), st.integers(-6, -1), st.just(0)), max_size=60)


def stream(steps: list[int]) -> tuple[list[int], list[int]]:
    """Return the events and sizes of these steps."""
    events, sizes, live = [], [0], []
    for step in steps:
        if step > 0:
            sizes.append(step - 1)
            live.append(len(sizes) - 1)
            events.append(live[-1])
        elif not step:
            events.append(0)
        elif live:
            events.append(-live.pop(max(step, -len(live))))
    return events, sizes


def random_steps(seed: int) -> list[int]:
    """Return a long list of steps: what hypothesis draws is varied but short."""
    draw = random.Random(seed)
    sizes = [4 * KIB, 3 * MIB, 60 * MIB]
    kinds = draw.choices("+-0", weights=(50, 46, 4), k=150)
    return [{"+": draw.randrange(draw.choice(sizes)) + 2, "-": -draw.randrange(1, 7), "0": 0}[kind] for kind in kinds]


@settings(max_examples=300, deadline=None)
@given(STEPS, st.one_of(st.none(), st.integers(1, 100)), st.booleans())
def test_every_step_is_the_slow_allocators(steps: list[int], pages: int | None, expandable: bool) -> None:
    check_steps(steps, pages, expandable)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_step_of_a_long_stream_is_the_slow_allocators(seed: int, expandable: bool) -> None:
    for pages in (None, 100, 60, 35, 20):
        check_steps(random_steps(seed), pages, expandable)


def check_steps(steps: list[int], pages: int | None, expandable: bool) -> None:
    capacity = None if pages is None else pages * 2 * MIB + 77
    allocator, slow = Allocator(capacity, expandable_segments=expandable), Slow(capacity, expandable)
    events, sizes = stream(steps)
    failed = []
    peaks = [(0, 0)]
    for index, n in enumerate(events):
        if n > 0:
            try:
                allocator.malloc(n, sizes[n])
            except OutOfMemory:
                failed.append(index)
            assert slow.malloc(n, sizes[n]) == (index not in failed[-1:])
        elif not n:
            allocator.empty_cache()
            slow.empty_cache()
        elif -n in slow.used:
            allocator.free(-n)
            slow.free(-n)
        assert state(allocator) == slow.state()
        assert capacity is None or allocator.reserved_bytes <= capacity
        peaks.append(state(allocator))
    assert_tiled(allocator)

    # What is allocated is what is rounded, but for rests of up to 1 MiB in the large pool.
    live = [-(-sizes[key] // 512) * 512 for key in slow.used]
    slack = 0 if expandable else sum(size > MIB for size in live) * MIB
    assert sum(live) <= allocator.allocated_bytes <= sum(live) + slack
    assert allocator.allocated_bytes <= allocator.reserved_bytes

    # A replay is the same.
    result = replay(events, sizes, capacity, is_optional=frozenset(range(len(sizes))), expandable_segments=expandable)
    assert list(result.given_up) == failed
    assert result.peak_allocated_bytes == allocator.peak_allocated_bytes == max(a for a, _ in peaks)
    assert result.peak_reserved_bytes == allocator.peak_reserved_bytes >= max(r for _, r in peaks)
    if failed:
        with pytest.raises(OutOfMemory) as caught:
            replay(events, sizes, capacity, expandable_segments=expandable)
        assert caught.value.index == failed[0]

    for key in slow.used:
        allocator.free(key)
    allocator.empty_cache()
    assert state(allocator) == (0, 0)
    # A range in which no page could be mapped stays, without memory.
    assert not allocator._starts
    assert allocator._segments == allocator._unmapped_starts


@settings(max_examples=100, deadline=None)
@given(STEPS, st.lists(st.integers(0, 60), max_size=4))
def test_stretches_are_those_of_single_steps(steps: list[int], cuts: list[int]) -> None:
    events, sizes = stream(steps)
    marks = sorted(min(cut, len(events)) for cut in cuts)
    result = replay(events, sizes, marks=marks)
    states = [(0, 0)]
    allocator = Allocator()
    for n in events:
        if n > 0:
            allocator.malloc(n, sizes[n])
        elif n:
            allocator.free(-n)
        else:
            allocator.empty_cache()
        states.append(state(allocator))
    stretches = [states[a : b + 1] for a, b in pairwise([*marks, len(events)])]
    assert result.allocated_bytes == tuple(max(a for a, _ in stretch) for stretch in stretches)
    assert result.reserved_bytes == tuple(max(r for _, r in stretch) for stretch in stretches)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sets(st.integers(1, 60), max_size=8), st.booleans(), st.sampled_from([0, 8 * MIB]))
def test_required_is_enough_and_below_it_was_not(
    steps: list[int], chosen: set[int], expandable: bool, tolerance: int
) -> None:
    check_required(steps, chosen, expandable, tolerance)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_required_of_a_long_stream(seed: int, expandable: bool) -> None:
    check_required(random_steps(seed), set(range(1, 100, 7)), expandable, 0)


def check_required(steps: list[int], chosen: set[int], expandable: bool, tolerance: int) -> None:
    events, sizes = stream(steps)
    optional = frozenset(chosen)

    def succeeds(capacity: int) -> bool:
        try:
            replay(events, sizes, capacity, is_optional=optional, expandable_segments=expandable)
        except OutOfMemory:
            return False
        return True

    required = required_bytes(events, sizes, optional, tolerance_bytes=tolerance, expandable_segments=expandable)
    least = least_bytes(events, sizes, optional)
    most = replay(events, sizes, expandable_segments=expandable).peak_reserved_bytes
    if expandable:
        most += max([20 * MIB, *(size + 2 * MIB for size in sizes)])  # the largest segment
    assert least <= required <= most
    assert required % (2 * MIB) == 0
    assert succeeds(required)
    assert all(succeeds(most + more * 2 * MIB) for more in (0, 1, 7))
    assert not least or not succeeds(least - 1)
    if required > least:
        below = range(required - max(tolerance, 2 * MIB), required, 2 * MIB)
        assert not all(succeeds(capacity) for capacity in below)


# Pinned memory.


def test_pinned_blocks_are_powers_of_two() -> None:
    assert pinned_bytes([]) == 0
    assert pinned_bytes([0, 1, 2, 3, 4096, 4097]) == 0 + 1 + 2 + 4 + 4096 + 8192
    assert pinned_bytes([3 << 30]) == 4 << 30
    assert pinned_bytes([3 << 30, 3 * KIB], max_round_threshold_bytes=1 << 30) == (3 << 30) + 4 * KIB
    assert pinned_bytes([MIB - 1, MIB + 1], max_round_threshold_bytes=MIB) == MIB + MIB + 1
