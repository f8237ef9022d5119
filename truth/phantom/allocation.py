"""PyTorch's own caching allocator, asked for a stream of allocations: what `engine.estimate.allocator` is held against.

Runs where the phantom device is loaded. Sizes are in bytes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import torch

from engine.estimate.allocator import OutOfMemory, Reserved, replay
from truth.phantom.card import set_capacity


def executed(
    events: Sequence[int],
    sizes: Sequence[int],
    capacity_bytes: int | None = None,
    *,
    is_optional: AbstractSet[int] = frozenset(),
    aside: Mapping[int, int] = MappingProxyType({}),
) -> Reserved | int:
    """Return what the real allocator comes to, as `engine.estimate.allocator.replay` does.

    Where it runs out of memory, the index of the event at which it does. Nothing is left allocated.
    """
    # They have no types.
    cuda: Any = torch.cuda
    allocate, delete = cuda.caching_allocator_alloc, cuda.caching_allocator_delete
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0
    set_capacity(capacity_bytes)
    torch.cuda.reset_peak_memory_stats()
    streams: dict[int, Any] = {number: cuda.Stream() for number in set(aside.values())}
    live: dict[int, int] = {}
    given_up: list[int] = []
    try:
        for index, n in enumerate(events):
            if n < 0:
                if -n in live:
                    delete(live.pop(-n))
            elif n:
                if sizes[n]:  # torch's storages of nothing never reach the allocator
                    try:
                        live[n] = allocate(sizes[n], 0, streams[aside[n]]) if n in aside else allocate(sizes[n])
                    except torch.OutOfMemoryError:
                        if n not in is_optional:
                            return index
                        given_up.append(index)
            else:
                torch.cuda.empty_cache()
        return Reserved(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(),
            given_up=tuple(given_up),
        )
    finally:
        for address in live.values():
            delete(address)
        torch.cuda.empty_cache()


def predicted(
    events: Sequence[int],
    sizes: Sequence[int],
    capacity_bytes: int | None = None,
    *,
    is_optional: frozenset[int] = frozenset(),
    aside: Mapping[int, int] = MappingProxyType({}),
    expandable_segments: bool = False,
) -> Reserved | int:
    """Return the same of ours."""
    try:
        return replay(
            events,
            sizes,
            capacity_bytes,
            is_optional=is_optional,
            aside=aside,
            expandable_segments=expandable_segments,
        )
    except OutOfMemory as error:
        assert error.index is not None
        return error.index


def random_stream(chance: random.Random) -> tuple[list[int], list[int], frozenset[int], dict[int, int]]:
    """Return events, sizes, what is optional and what is aside, of a random stream of up to some hundred events."""
    largest = chance.choice([4 << 10, 1 << 20, 3 << 20, 24 << 20, 200 << 20])
    recurring = [_size(chance, largest) for _ in range(chance.randint(1, 8))]
    sizes, events = [0], []
    alive: list[int] = []
    keeps, empties = chance.uniform(0.35, 0.65), chance.choice([0.0, 0.0, 0.01, 0.1])
    for _ in range(chance.randint(5, 600)):
        if chance.random() < empties:
            events.append(0)
        elif alive and chance.random() > keeps:
            events.append(-alive.pop(chance.choice([-1, 0, chance.randrange(len(alive))])))
        else:
            sizes.append(chance.choice(recurring) if chance.random() < 0.6 else _size(chance, largest))
            alive.append(len(sizes) - 1)
            events.append(alive[-1])
    keys = range(1, len(sizes))
    optional = frozenset(k for k in keys if chance.random() < 0.1) if chance.random() < 0.3 else frozenset()
    streams = chance.choice([0, 0, 1, 2, 3])
    aside = {k: chance.randint(1, streams) for k in keys if streams and chance.random() < 0.3}
    return events, sizes, optional, aside


def _size(chance: random.Random, largest: int) -> int:
    if chance.random() < 0.05:
        return chance.choice([0, 1, 512, 513, 1 << 20, (1 << 20) + 1, 10 << 20, (10 << 20) - 1, 20 << 20, 2 << 20])
    return int(largest ** chance.random())
