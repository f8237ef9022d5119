"""Keep the latest few of what takes long to make: cases are dealt with in an order in which neighbours share much."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 8


def kept(among: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """Return what is kept under a key, made where it is not there; the oldest goes where there are too many."""
    if key not in among:
        if len(among) >= MOST:
            del among[next(iter(among))]
        among[key] = make()
    return among[key]
