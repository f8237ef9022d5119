"""Why a candidate that was estimated, or bounded, was not taken; and what a person should know of the one that was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import compat
from engine.solve.situation import Situation
from engine.units import format_size
from engine.values import Estimate, Note, Request, Step

if TYPE_CHECKING:
    from engine.estimate.bounds import Least


@dataclass(frozen=True, slots=True)
class Short:
    """What is too small for a run, and by how much."""

    rule: str
    bytes: int
    because: str
    remedy: str


def of_estimate(taken: Estimate, situation: Situation) -> Short | None:
    """Return what a run is short of, or None where it fits, or where it is not known."""
    budget, ram = situation.budget_bytes, situation.host_budget_bytes
    if taken.required_bytes is not None and budget is not None and taken.required_bytes > budget:
        phase = max(taken.phases, key=lambda p: p.peak_bytes or 0).name if taken.phases else "the run"
        return _device(f"{phase} needs", taken.required_bytes, budget)
    if situation.below_bytes is not None and taken.required_bytes is not None:
        most = taken.required_bytes + _unsure_bytes(taken)
        if most >= situation.below_bytes:
            return _too_near("it may need", most, situation.below_bytes)
    if taken.host_bytes is not None and ram is not None and taken.host_bytes > ram:
        return _host("it needs", taken.host_bytes, ram)
    return None


def of_least(least: Least, situation: Situation) -> Short | None:
    """Return what a run is short of at the least, or None where the bound does not decide."""
    budget, ram = situation.budget_bytes, situation.host_budget_bytes
    if budget is not None and least.required_bytes > budget:
        return _device("it needs at least", least.required_bytes, budget)
    if situation.below_bytes is not None and least.required_bytes >= situation.below_bytes:
        return _too_near("it needs at least", least.required_bytes, situation.below_bytes)
    if ram is not None and least.host_bytes > ram:
        return _host("it needs at least", least.host_bytes, ram)
    return None


def _device(needs: str, wanted: int, budget: int) -> Short:
    over = format_size(wanted - budget)
    return Short(
        "estimate.device",
        wanted - budget,
        f"{needs} {format_size(wanted)} on the card, the budget is {format_size(budget)}: {over} short",
        f"free {over} on the card, ask for a smaller picture, or offload more",
    )


def _unsure_bytes(taken: Estimate) -> int:
    """Return how much more a run may need than it is estimated to: to the upper end of its interval."""
    high, peak = taken.interval.high_bytes, taken.peak_allocated_bytes
    return 0 if high is None or peak is None else max(0, high - peak)


def _too_near(needs: str, wanted: int, below: int) -> Short:
    return Short(
        "estimate.below",
        wanted - below + 1,
        f"{needs} {format_size(wanted)} on the card, and what was to need {format_size(below)} ran out of memory there",
        "free memory on the card, or ask for a smaller picture",
    )


def _host(needs: str, wanted: int, ram: int) -> Short:
    over = format_size(wanted - ram)
    return Short(
        "estimate.host",
        wanted - ram,
        f"{needs} {format_size(wanted)} of host memory, {format_size(ram)} are available: {over} short",
        f"free {over} of host memory, or keep more on the card",
    )


def slower(seconds: float, quality: str, price: float, best: Estimate, best_price: float, *, takes: str) -> str:
    """Return how much more a candidate costs than the choice; `takes` says how well its seconds are known."""
    taken = best.seconds or 0.0
    counted = "" if price == 1.0 else f" ({quality}: they count {price:.3g} times)"
    chosen = "" if best_price == 1.0 else f" (counted {best_price:.3g} times)"
    return f"{takes} {_seconds(seconds)}{counted}, and the choice {_seconds(taken)}{chosen}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def changes(own: Sequence[Step], now: Sequence[Step], request: Request) -> tuple[Note, ...]:
    """Return what the user's wishes changed in the profile's own list."""
    before, after = {s.name for s in own}, {s.name for s in now}
    added = [
        Note(kind="required", optimizer=n, because="you asked for it; the profile alone does without")
        for n in sorted(after - before)
    ]
    dropped = [
        Note(
            kind="dropped",
            optimizer=n,
            because="left out, since you forbade it"
            if n in request.forbid
            else "left out, since you asked for another placement",
        )
        for n in sorted(before - after)
    ]
    return (*added, *dropped)


def notes(found: Sequence[compat.Finding], steps: Sequence[Step]) -> tuple[Note, ...]:
    """Return what a person should know of the steps that are taken."""
    quiet = [
        Note(kind="no_effect" if f.is_idle else "degrades", optimizer=name, because=f.rule.because)
        for f in found
        if not f.breaks
        for name in f.subjects
    ]
    is_open = any(s.name == "dtype" and s.params["value"] == "auto" for s in steps)
    why = "the card's compute capability is not known, so the dtype is decided on the card"
    return (*quiet, Note(kind="undecided", optimizer="dtype", because=why)) if is_open else tuple(quiet)
