"""Sizes as people write them and as programs count them. Inside, a size is an int of bytes; GiB is 1024 ** 3."""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_UNITS = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*\Z")
# Longer than this is no size anybody has; it also keeps a pasted wall of digits from being parsed.
_LONGEST = 32


def parse_size(text: str) -> int:
    """Return the bytes in a size such as "12GiB", "7.2 GiB" or "8 GB" (which is 8 * 10 ** 9).

    Raises: ValueError with a sentence, when there is no unit, an unknown one, or the size is zero or absurd.
    """
    match = _SIZE.match(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(f"{text[:_LONGEST]!r} is not a size; write a number and a unit, such as 12GiB or 7.2GiB")
    unit = _UNITS.get(match[2].lower())
    if unit is None:
        raise ValueError(
            f"{match[2]!r} is not a unit of size; use B, KiB, MiB, GiB, TiB (or KB, MB, GB, TB for powers of 1000)"
        )
    size = float(match[1]) * unit
    if not 1 <= size <= 1024 * TIB:
        raise ValueError(f"{text.strip()!r} is out of range; a size lies between 1 B and 1024 TiB")
    return math.floor(size)


def format_size(size_bytes: int) -> str:
    """Return a size for reading: "11.90 GiB", "6.5 MiB", "512 B"."""
    if size_bytes >= GIB // 10:
        return f"{size_bytes / GIB:.2f} GiB"
    if size_bytes >= MIB // 10:
        return f"{size_bytes / MIB:.1f} MiB"
    if size_bytes >= KIB:
        return f"{size_bytes / KIB:.0f} KiB"
    return f"{size_bytes} B"


def format_seconds(time_s: float) -> str:
    """Return a duration for reading: "0.42 s", "12 s", "3 min 20 s"."""
    if time_s < 10:
        return f"{time_s:.2f} s"
    if time_s < 120:
        return f"{time_s:.0f} s"
    return f"{int(time_s // 60)} min {int(time_s % 60)} s"
