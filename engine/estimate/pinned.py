"""What PyTorch's caching host allocator takes for pinned memory. No torch.

`CachingHostAllocatorImpl::allocate` in `ATen/core/CachingHostAllocator.h`, torch 2.13: nothing is allocated for 0
bytes; every other block is the request rounded up to a power of two (`PowerOf2Ceil`), however small or large it is,
unless it exceeds `pinned_max_round_threshold_mb` or `pinned_max_cached_size_mb`, which are unlimited by default. Blocks
are never split or joined, and a freed one serves only requests that round to its own size.

`pinned_use_cuda_host_register` (how the memory is pinned) and `pinned_reserve_segment_size_mb` (one segment in advance)
are off by default and not modelled. Whatever the driver adds to a block (whole pages, its own tables) is no rule of
the allocator and not counted, here as in `torch.cuda.host_memory_stats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def pinned_bytes(sizes: Iterable[int], max_round_threshold_bytes: int | None = None) -> int:
    """Return the bytes of the blocks that tensors of these sizes take when they are pinned at one time.

    A block is rounded up to a power of two where the tensor has at most `max_round_threshold_bytes` (None: always).
    """
    total = 0
    for size in sizes:
        is_rounded = size > 0 and (max_round_threshold_bytes is None or size <= max_round_threshold_bytes)
        total += 1 << (size - 1).bit_length() if is_rounded else size
    return total


def pinned_in_turn_bytes(groups: Iterable[Iterable[int]]) -> int:
    """Return the bytes of the blocks that groups of tensors take which are pinned one after another.

    A group's blocks are free before the next one is pinned, and are kept for tensors that round to the same size: of
    each size as many as one group wants.
    """
    most: Counter[int] = Counter()
    for group in groups:
        most |= Counter(pinned_bytes([size]) for size in group if size > 0)
    return sum(size * count for size, count in most.items())
