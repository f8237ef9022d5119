"""Published measurements, and what is predicted in their place. Nothing is fitted to them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from engine.units import GIB

_DATA = Path(__file__).parents[1] / "data"

# The cards of the published points, by the names of the table.
_CARDS = {
    "H100-80GB": "H100 SXM",
    "NVIDIA H100 80GB": "H100 SXM",
    "A100-80GB": "A100-SXM4-80GB",
    "A100-40GB": "A100-SXM4-40GB",
    "NVIDIA A100 40GB": "A100-SXM4-40GB",
    "NVIDIA L20 48GB": "L20",
    "16GB card": "T4",
}
_HOST_RAM = "512GiB"
_UNDER = -0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A published figure and what is predicted in its place: bytes or seconds."""

    id: str
    what: str
    source: str
    published: float
    predicted: float
    low: float | None
    high: float | None
    basis: str
    placement: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    @property
    def is_inside(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= self.published <= self.high


def _rows(name: str) -> list[dict[str, Any]]:
    text = (_DATA / f"published_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _plan(row: dict[str, Any]) -> engine.Plan:
    """Return the plan of a published run, as it was run."""
    steps: list[Any] = [{"name": "dtype", "params": {"value": row["dtype"]}}]
    steps += [name for name in ("vae_slicing", "vae_tiling") if row.get(name)]
    steps.append(row["placement"])
    frames = row.get("num_frames")
    longest = (row.get("extra") or {}).get("max_sequence_length")
    return engine.resolve(
        row["model"],
        height=row["height"],
        width=row["width"],
        frames=frames if frames and frames > 1 else None,
        batch=row["batch"],
        steps=row["steps"],
        guidance=row["guidance"],
        call={"max_sequence_length": longest} if longest else None,
        optimizers=steps,
        gpu=_CARDS[row["gpu"]],
        host_ram=_HOST_RAM,
        told=lambda line: print(line, file=sys.stderr),
    )


def _what(row: dict[str, Any]) -> str:
    size = f"{row['width']} x {row['height']}" + (f" x {f}" if (f := row.get("num_frames")) and f > 1 else "")
    extras = [n for n in ("vae_tiling", "vae_slicing") if row.get(n)]
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    how = ", ".join([row["placement"], *extras])
    return f"{row['model'].rpartition('/')[2]}, {size}{batch}, {row['dtype']}, {how}, {row['gpu']}"


def peaks() -> list[Point]:
    """Return the points of memory, in bytes."""
    found = []
    for row in _rows("peaks"):
        estimate = _plan(row).estimate
        is_reserved = "reserved" in row["metric"]
        predicted = estimate.peak_reserved_bytes if is_reserved else estimate.peak_allocated_bytes
        assert predicted is not None
        found.append(
            Point(
                id=row["id"],
                what=_what(row) + (", reserved" if is_reserved else ""),
                source=row["source"],
                published=row["value_gib"] * GIB,
                predicted=predicted,
                # The interval is of allocated bytes.
                low=None if is_reserved else estimate.interval.low_bytes,
                high=None if is_reserved else estimate.interval.high_bytes,
                basis=estimate.basis or "",
                placement=row["placement"],
            )
        )
    return found


def seconds() -> list[Point]:
    """Return the points of time."""
    found = []
    for row in _rows("seconds"):
        estimate = _plan(row).estimate
        assert estimate.seconds is not None
        found.append(
            Point(
                id=row["id"],
                what=_what(row) + f", {row['steps']} steps",
                source=row["source"],
                published=row["seconds"],
                predicted=estimate.seconds,
                low=estimate.interval.low_seconds,
                high=estimate.interval.high_seconds,
                basis=estimate.basis or "",
                placement=row["placement"],
            )
        )
    return found


def summary(points: Sequence[Point]) -> str:
    """Return the median and 95th percentile of the errors' size, and the share that is too low by more than 3 %."""
    sizes = sorted(abs(p.error) for p in points)
    p95 = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    under = sum(p.error < _UNDER for p in points)
    judged = [p for p in points if p.low is not None]
    inside = sum(p.is_inside for p in judged)
    return (
        f"{len(points)} points: median {statistics.median(sizes):.2%}, 95th percentile {p95:.2%},"
        f" {under} predicted more than 3 % too low; {inside} of {len(judged)} inside their interval"
    )


def explanations() -> dict[str, str]:
    """Return what is known of the points that are predicted worst, by their ids."""
    found: dict[str, str] = json.loads((_DATA / "explanations.json").read_text(encoding="utf-8"))
    return found
