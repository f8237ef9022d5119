"""Predictions against published measurements: `python -m bench.accuracy [--write]`.

Prints, a point a line, what was published, what is predicted, and the error; then the median, the 95th percentile, and
the share that lies more than 3 % under. `--write` writes docs/accuracy.md. Nothing is fitted to these points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from engine.units import GIB

_DATA = Path(__file__).parent / "data"
_PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"

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


def _table(points: Sequence[Point], unit: float, name: str) -> list[str]:
    rows = [f"| point | published {name} | predicted {name} | error | interval |", "| --- | ---: | ---: | ---: | --- |"]
    for p in points:
        span = "" if p.low is None or p.high is None else f"{p.low / unit:.2f} to {p.high / unit:.2f}"
        rows.append(
            f"| {p.what} ({p.id}) | {p.published / unit:.3f} | {p.predicted / unit:.3f} | {p.error:+.2%} | {span} |"
        )
    return rows


CHOSEN_AFTERWARDS = (
    "Some of these points are no independent test all the same. Where the evidence left a choice, it was made",
    "after they had been seen, and so they confirm it less than they seem to:",
    "",
    "- which of input and output cuDNN converts: both for half precision from 8.0 on (FLUX.1-dev, SD3), the input",
    "  alone on 7.x (SD 1.4) and for float32 (SDXL); the other evidence for float32 allows both;",
    "- that outputs of 2^31 elements are not converted: tried after a first rule, for inputs too, had given",
    "  45.5 GiB for FLUX.1-dev at batch 8; no source says so;",
    "- the share of its rate that attention reaches on 9.0: 0.30 of two measured figures (0.30 and 0.37), after",
    "  FLUX.1-dev's seconds on an H100 had come out too low;",
    "- the speed of pageable copies, 4 GB/s: between what these hosts show and what others do.",
    "",
    "The allocator's rules were read in its source; reserved bytes and HunyuanVideo were first computed afterwards.",
)


def page(of_peaks: Sequence[Point], of_seconds: Sequence[Point]) -> str:
    """Return docs/accuracy.md."""
    explained: dict[str, str] = json.loads((_DATA / "explanations.json").read_text(encoding="utf-8"))
    resident = [p for p in of_seconds if p.placement == "resident"]
    ratios = [max(p.predicted / p.published, p.published / p.predicted) for p in resident]
    lines = [
        "# Accuracy",
        "",
        "Made by `python -m bench.accuracy --write`. Predictions are of the installed libraries "
        f"(torch {_version('torch')}, diffusers {_version('diffusers')}); the published runs are of their own day's.",
        "No factor is fitted to these points: every term is a mechanism, with its evidence beside it",
        "(`engine/gpus/libraries.json`, `engine/gpus/speeds.json`, `engine/estimate/allocator.py`).",
        "",
        *CHOSEN_AFTERWARDS,
        "",
        "## Memory",
        "",
        f"{summary(of_peaks)}.",
        "",
        *_table(of_peaks, GIB, "GiB"),
        "",
        "Allocated is what `torch.cuda.max_memory_allocated()` says, reserved what `max_memory_reserved()` says. The",
        "interval is of allocated bytes: from cuDNN converting nothing to its converting all, and 1.5 % beyond, which",
        "is assumed. It is meant to hold 95 of 100 points, and does not here.",
        "",
        "## Time",
        "",
        f"{summary(of_seconds)}. Resident runs: within a factor of {statistics.median(ratios):.2f} in the median.",
        "",
        *_table(of_seconds, 1.0, "s"),
        "",
        "Nothing was calibrated: rates are the card's own, the shares of them that are reached others' measurements.",
        "",
        "## The worst points, one by one",
        "",
        *(f"- **{i}**: {explained[i]}" for i in explained),
        "",
        "## Sources of the published figures",
        "",
        *(f"- {s}" for s in sorted({p.source for p in (*of_peaks, *of_seconds)})),
        "",
        "## What is not modelled",
        "",
        "- What the CUDA driver takes of the host's memory.",
        "- Algorithms of cuDNN that convert no layout and take a workspace of their own (Winograd, FFT).",
        "- Other versions of the libraries than the installed ones.",
        "- Attention kernels other than torch's own; compiled models.",
        "",
    ]
    return "\n".join(lines)


def _version(name: str) -> str:
    return str(engine.resolve(device="cpu").versions[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/accuracy.md")
    options = parser.parse_args()
    of_peaks, of_seconds = peaks(), seconds()
    for points, unit, name in ((of_peaks, GIB, "GiB"), (of_seconds, 1.0, "s")):
        for p in points:
            inside = "" if p.low is None else "  inside" if p.is_inside else "  OUTSIDE its interval"
            print(f"{p.id:<22} {p.published / unit:9.3f} {p.predicted / unit:9.3f} {name:<4}{p.error:+8.2%}{inside}")
        print(summary(points))
    if options.write:
        _PAGE.write_text(page(of_peaks, of_seconds), encoding="utf-8")
        print(f"written: {_PAGE.name}")


if __name__ == "__main__":
    main()
