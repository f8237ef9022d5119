"""Runs that were made on a card, remembered: what was predicted and what was measured.

They show whether predictions for this card are systematically off (`dg-run doctor`), and how wide an interval has to
be. An estimate itself is never shifted by them: an error that is corrected in silence is an error nobody finds.

What makes an interval honest (`widest_error`): a run's error is how far the logarithm of measured / predicted lies
from 0. Of n errors that could have come in any order with the next one, the next is at most the k-th smallest in at
least k / (n + 1) of all cases (split conformal prediction: Papadopoulos et al. 2002; Vovk, Gammerman & Shafer 2005).
With n = 19 or more a k gives 95 %. With fewer the largest error is stretched by the f for which

    n! Γ(1 + f) / Γ(n + 1 + f) = 0.05

which is the chance that an exponentially distributed error exceeds f times the largest of n others (the largest of
n is a sum of exponentials of rates 1 to n: Rényi 1953, so that the chance is the product of k / (k + f)). It is less
than that for every error whose tail falls faster, as that of a normal distribution does; at n = 19, f is 1. Errors
with a heavier tail are covered less often until there are 19.

Fifty repeats of one run are one run: of each kind (model, sizes, steps, optimizers) the latest counts, so that what is
predicted is one run of a kind (one observation of each group, as in Dunn, Wasserman & Ramdas 2022). Only runs under the
same placement, the same versions and the same calibration are compared: others were predicted by something else.

A run that ran out of memory says one thing more: under this room, what it was does not run. It is not planned again
with so little (`ran_out`), until it has run with no more, or the room is larger, or it is forgotten.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import files, optimizers, paths, versions
from engine.calibration import Calibration, file_stem
from engine.optimizers import placing
from engine.values import Driver, Estimate, FrozenDict, Gpu, Interval, Request, Step

MOST_RUNS = 500
FEWEST_KINDS = 8
"""Of fewer runs of different kinds nothing is concluded."""
COVERAGE = 0.95
LEAST_BYTES, LEAST_SECONDS = 0.005, 0.05
"""No interval is narrower, above or below the estimate: assumed, for what the next run does that none did before."""
_MOST_READ_BYTES = 4 * 1024**2
_LOCK_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: what its plan predicted and what it took. Bytes are those of `peak_allocated_bytes`.

    Seconds are of the whole call of the pipeline, from the prompt to the pictures, as those of `Estimate.seconds`:
    without loading, and with whatever the first call in a process does once.
    """

    when: str
    versions: Mapping[str, str | None]
    calibration: str | None
    """The digest of the calibration that its plan was made with."""
    model: str
    height: int | None
    width: int | None
    frames: int | None
    batch: int
    steps: int | None
    optimizers: tuple[str, ...]
    placement: str
    basis: str | None
    digest: str
    predicted_bytes: int | None
    measured_bytes: int | None
    predicted_seconds: float | None
    measured_seconds: float | None
    interval: Interval
    out_of_memory: bool = False
    room_bytes: int | None = None
    """What it could take of the card: its plan's budget, or less, where less was there in the end."""
    asked: str | None = None
    """What of its request decides how much it takes, as a digest; None of what was remembered before there was this."""
    acting: str = ""
    """The steps that did something, as text."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What makes runs repeats of one another."""
        return self.model, self.height, self.width, self.frames, self.batch, self.steps, self.optimizers

    @property
    def bytes_ratio(self) -> float | None:
        return _ratio(self.measured_bytes, self.predicted_bytes)

    @property
    def seconds_ratio(self) -> float | None:
        return _ratio(self.measured_seconds, self.predicted_seconds)


def _ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured and predicted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RanOut:
    """That something ran out of memory: when, and with how much room for it."""

    when: str
    room_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Measured over predicted, each kind of run counting once by its median."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the remembered runs of a card say of its predictions."""

    runs: int
    kinds: int
    out_of_memory: int
    bytes: Ratios | None
    seconds: Ratios | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """By which factor the truth may lie above or below an estimate, by so many kinds of runs. None: not known."""

    kinds: int
    bytes: float | None
    seconds: float | None


def folder() -> Path:
    """Return where runs are remembered."""
    return paths.state_dir() / "runs"


def path(uuid: str) -> Path:
    """Return where a card's runs are remembered."""
    return folder() / f"{file_stem(uuid)}.jsonl"


def circumstances(driver: Driver | None) -> dict[str, str | None]:
    """Return the versions that decide a prediction or a run, the driver's among them."""
    return versions.snapshot() | versions.of_gpu() | {"driver": None if driver is None else driver.version}


def of_run(
    request: Request,
    steps: Sequence[Step],
    predicted: Estimate,
    *,
    when: str,
    driver: Driver | None,
    calibration: str | None,
    digest: str,
    measured_bytes: int | None,
    measured_seconds: float | None,
    out_of_memory: bool = False,
    room_bytes: int | None = None,
    acting: Sequence[Step] | None = None,
) -> Run:
    """Return a run to remember. `acting` are the steps that do something there; None: all of them."""
    return Run(
        when=when,
        versions=FrozenDict(circumstances(driver)),
        calibration=calibration,
        model=request.model,
        height=request.height,
        width=request.width,
        frames=request.frames,
        batch=request.batch,
        steps=request.steps,
        optimizers=tuple(map(str, steps)),
        placement=placement(steps),
        basis=predicted.basis,
        digest=digest,
        predicted_bytes=predicted.peak_allocated_bytes,
        measured_bytes=measured_bytes,
        predicted_seconds=predicted.seconds,
        measured_seconds=measured_seconds,
        interval=predicted.interval,
        out_of_memory=out_of_memory,
        room_bytes=room_bytes,
        asked=_asked(request),
        acting=text_of(steps if acting is None else acting),
    )


def text_of(acting: Sequence[Step]) -> str:
    """Return the steps that do something as text: with the request they decide how much memory a run takes."""
    return "; ".join(map(str, acting))


def _asked(request: Request) -> str:
    content = {n: getattr(request, n) for n in _DECIDING}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# How many steps it takes to denoise is not among them: each has what the one before it gave back.
_DECIDING = (
    "model",
    "revision",
    "pipeline_class",
    "height",
    "width",
    "frames",
    "batch",
    "guidance",
    "call",
    "components",
)


def placement(steps: Sequence[Step]) -> str:
    """Return where a list of steps puts the model: errors of offloaded and resident runs are not alike.

    Where components are placed apart, by the names of all placements, as "group_offload+resident".
    """
    names = {s.name for s in placing.placements(steps)}
    if optimizers.placement(steps) is None:
        names.add(placing.RESIDENT)
    return "+".join(sorted(names))


def remember(uuid: str, run: Run) -> None:
    """Add a run to those of its card, of which the last ones are kept. Two at once lose nothing. Raises: OSError."""
    from filelock import FileLock

    where = path(uuid)
    where.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(run), ensure_ascii=False, separators=(",", ":")).encode()
    with FileLock(f"{where}.lock", timeout=_LOCK_S):  # a Timeout is an OSError
        lines = _tail(where).splitlines(keepends=True)
        if len(lines) >= MOST_RUNS:
            kept = [each.rstrip(b"\n") + b"\n" for each in lines[1 - MOST_RUNS :]]
            files.write(where, b"".join([*kept, line + b"\n"]))
            return
        files.append_line(where, line)


def read(uuid: str) -> tuple[Run, ...]:
    """Return the runs of a card, the oldest first. What cannot be read is left out."""
    where = path(uuid)
    try:
        return _read_once(where, files.stamp(where))
    except OSError:
        return ()


@functools.lru_cache(maxsize=8)
def _read_once(where: Path, stamp: tuple[int, int, int]) -> tuple[Run, ...]:
    return tuple(run for line in _tail(where).splitlines() if (run := _run(line)) is not None)


def comparable(card: Gpu | None, driver: Driver | None, calibration: Calibration | None) -> tuple[Run, ...]:
    """Return the runs of a card that were made, and predicted, under today's circumstances."""
    if card is None or card.uuid is None:
        return ()
    now = circumstances(driver)
    digest = None if calibration is None else calibration.digest
    return tuple(r for r in read(card.uuid) if r.versions == now and r.calibration == digest)


def ran_out(card: Gpu | None, driver: Driver | None, request: Request) -> Mapping[str, RanOut]:
    """Return what ran out of memory on a card for such a request, by `text_of` what acted; of several the roomiest.

    What has run since then with no more room does run. Other versions do not count; the calibration does not matter,
    since this was no prediction.
    """
    found: dict[str, RanOut] = {}
    if card is None or card.uuid is None:
        return found
    runs = read(card.uuid)
    if not any(r.out_of_memory for r in runs):
        return found
    now, asked = circumstances(driver), _asked(request)
    for run in runs:
        if run.room_bytes is None or run.asked != asked or run.versions != now:
            continue
        known = found.get(run.acting)
        if run.out_of_memory:
            if known is None or run.room_bytes >= known.room_bytes:
                found[run.acting] = RanOut(when=run.when, room_bytes=run.room_bytes)
        elif known is not None and run.room_bytes <= known.room_bytes:
            del found[run.acting]
    return found


def _tail(where: Path) -> bytes:
    """Return the end of a file, whole where it is of the size it should be; nothing where it cannot be read."""
    try:
        with where.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _MOST_READ_BYTES))
            return file.read()
    except OSError:
        return b""


_TEXT = ("when", "model", "placement", "digest")
_SIZES = ("height", "width", "frames", "steps", "predicted_bytes", "measured_bytes", "room_bytes")
_SECONDS = ("predicted_seconds", "measured_seconds")


def _run(line: bytes) -> Run | None:
    """Return the run of a line, or None for a line that is damaged, or another version's."""
    try:
        told = json.loads(line)
        run = Run(
            **told
            | {
                "versions": FrozenDict(told["versions"]),
                "optimizers": tuple(map(str, told["optimizers"])),
                "interval": Interval(**told["interval"]),
            }
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    sound = all(isinstance(getattr(run, n), str) for n in _TEXT)
    sound = sound and all(_is_count(getattr(run, n)) for n in _SIZES) and _is_count(run.batch)
    sound = sound and (run.asked is None or isinstance(run.asked, str))
    sound = sound and isinstance(run.acting, str) and isinstance(run.out_of_memory, bool)
    return run if sound and all(_is_time(getattr(run, n)) for n in _SECONDS) else None


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63)


def _is_time(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9)


def summary(runs: Sequence[Run]) -> Summary:
    """Return how far predictions were off: a repeat does not count again."""
    return Summary(
        runs=len(runs),
        kinds=len({r.kind for r in runs}),
        out_of_memory=sum(r.out_of_memory for r in runs),
        bytes=_ratios((r.kind, r.bytes_ratio) for r in runs),
        seconds=_ratios((r.kind, r.seconds_ratio) for r in runs),
    )


def _ratios(told: Iterable[tuple[Any, float | None]]) -> Ratios | None:
    by_kind: dict[Any, list[float]] = {}
    for kind, ratio in told:
        if ratio is not None:
            by_kind.setdefault(kind, []).append(ratio)
    medians = [statistics.median(ratios) for ratios in by_kind.values()]
    return Ratios(low=min(medians), median=statistics.median(medians), high=max(medians)) if medians else None


def ranges(runs: Sequence[Run]) -> dict[tuple[str, str | None], Range]:
    """Return by which factors the truth may be off, by placement and basis: the latest run of each kind counts."""
    alike: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.placement, run.basis), []).append(run)
    return {
        which: Range(
            kinds=len({r.kind for r in several}),
            bytes=factor(((r.kind, r.bytes_ratio) for r in several), LEAST_BYTES),
            seconds=factor(((r.kind, r.seconds_ratio) for r in several), LEAST_SECONDS),
        )
        for which, several in alike.items()
    }


def factor(told: Iterable[tuple[Any, float | None]], least: float) -> float | None:
    """Return by which factor the truth may lie above or below an estimate; None where too few kinds were seen."""
    latest = {kind: ratio for kind, ratio in told if ratio is not None}
    error = widest_error([abs(math.log(ratio)) for ratio in latest.values()])
    return None if error is None else max(math.exp(error), 1 + least)


def widest_error(errors: Sequence[float]) -> float | None:
    """Return what the next error does not exceed in 95 of 100 cases; None of fewer than eight. See above for how."""
    count = len(errors)
    if count < FEWEST_KINDS:
        return None
    ordered = sorted(errors)
    rank = math.ceil(COVERAGE * (count + 1) - 1e-9)
    return ordered[rank - 1] if rank <= count else ordered[-1] * stretch(count)


@functools.cache
def stretch(count: int) -> float:
    """Return how many times the largest of so many errors the next exceeds in 5 of 100 cases, by bisection."""

    def missed(times: float) -> float:
        return math.exp(math.lgamma(count + 1) + math.lgamma(1 + times) - math.lgamma(count + 1 + times))

    low, high = 1.0, 1.0
    while missed(high) > 1 - COVERAGE:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if missed(middle) > 1 - COVERAGE else (low, middle)
    return high


def adjusted(estimate: Estimate, found: Range | None) -> Estimate:
    """Return an estimate whose interval is as wide as the errors of remembered runs were. Nothing else changes."""
    if found is None:
        return estimate
    interval, peak, seconds = estimate.interval, estimate.peak_allocated_bytes, estimate.seconds
    if found.bytes is not None and peak is not None:
        interval = dataclasses.replace(
            interval, low_bytes=math.floor(peak / found.bytes), high_bytes=math.ceil(peak * found.bytes)
        )
    if found.seconds is not None and seconds is not None:
        interval = dataclasses.replace(
            interval, low_seconds=round(seconds / found.seconds, 4), high_seconds=round(seconds * found.seconds, 4)
        )
    return dataclasses.replace(estimate, interval=interval)
