"""Execute a case, predict it, and say where the two differ."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from truth import device
from truth.cases import Case
from truth.executed import executed
from truth.predicted import predicted
from truth.seen import Seen

TOLERANCE = 0.01
"""How far a predicted peak may be from the executed one."""
ROOM, SHORT = 0.01, -0.05
"""A run succeeds with its predicted peak and this share of it more, and runs out of memory with this much less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A case, what it held, and what was predicted."""

    case: Case
    executed: Seen
    predicted: Seen

    @property
    def error(self) -> float:
        """Of the peak, as a share of what was executed."""
        return self.predicted.peak_bytes / self.executed.peak_bytes - 1

    @property
    def worst_phase_error(self) -> float:
        """Of the phase that is predicted worst, as a share of what that phase held."""
        pairs = zip(self.predicted.phases, self.executed.phases, strict=True)
        return max((p.peak_bytes / e.peak_bytes - 1 for p, e in pairs if e.peak_bytes), key=abs, default=0.0)

    @property
    def differences(self) -> tuple[str, ...]:
        """Return what is not equal to the byte and to the name, in words."""
        return tuple(_differences(self.predicted, self.executed))


def compared(case: Case) -> Compared:
    """Return a case executed and predicted. Raises: as `executed`."""
    return Compared(case=case, executed=executed(case), predicted=predicted(case))


def _differences(told: Seen, seen: Seen) -> Iterator[str]:
    if [p.name for p in told.phases] != [p.name for p in seen.phases]:
        yield f"phases {[p.name for p in told.phases]} were predicted, and {[p.name for p in seen.phases]} came"
        return
    for a, b in zip(told.phases, seen.phases, strict=True):
        if a.peak_bytes != b.peak_bytes:
            yield f"{a.name}: {a.peak_bytes} bytes were predicted, {b.peak_bytes} were held"
        if away := sorted(a.resident - b.resident):
            yield f"{a.name}: not on the device at its start: {', '.join(away[:3])} ({len(away)})"
        if there := sorted(b.resident - a.resident):
            yield f"{a.name}: on the device at its start, and not predicted: {', '.join(there[:3])} ({len(there)})"
    if told.pinned_bytes != seen.pinned_bytes:
        yield f"{told.pinned_bytes} bytes pinned were predicted, {seen.pinned_bytes} were"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """Whether a case ran where the device had a little more than its predicted peak, and where it had less."""

    id: str
    with_room: bool
    when_short: bool


def bounded(case: Case) -> Bounded:
    """Run a case under two capacities: its predicted peak and `ROOM`, and the peak less `SHORT`."""
    peak = predicted(case).peak_bytes
    return Bounded(id=case.id, with_room=_runs(case, peak * (1 + ROOM)), when_short=_runs(case, peak * (1 + SHORT)))


def _runs(case: Case, size_bytes: float) -> bool:
    device.load()
    gc.collect()
    try:
        with device.capacity(device.counts().live_bytes + round(size_bytes)):
            executed(case)
    except torch.OutOfMemoryError:
        return False
    return True
