"""What planning predicts of a case: its dry run, replayed under its steps."""

from __future__ import annotations

from typing import Any

import torch

from engine import optimizers
from engine.dryrun import record
from engine.dryrun import run as dryrun
from engine.estimate import stream
from engine.estimate.placements import Placement
from engine.estimate.trace import Trace
from engine.estimate.ways import way
from engine.estimate.whole import placed
from truth.cases import Case
from truth.kept import kept
from truth.seen import Phase, Seen

_traced: dict[tuple[str, ...], Trace] = {}


def trace(case: Case) -> Trace:
    """Return the trace of a case's pipeline and call, which all have that compute alike, wherever their weights are."""
    computing = map(str, optimizers.changing(case.steps))
    key = (case.architecture, case.dtype, str(case.call), way(case.steps), *computing)
    return kept(_traced, key, lambda: _recorded(case))


def _recorded(case: Case) -> Trace:
    pipe, call = case.made()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to("meta")
            tie: Any = getattr(component, "tie_weights", lambda: None)
            tie()  # moving to meta unties
    dryrun.change(pipe, optimizers.changing(case.steps), case.dtype)
    wanted = way(case.steps)
    # CUDA's results, and not what its operators hold on the way: the counted device cannot see that.
    return record.record(pipe, call, "cuda", [wanted] if wanted else [], held=None)


def predicted(case: Case) -> Seen:
    """Return what a case should hold, in bytes as they are asked for: no allocator rounds them, no library adds any."""
    along = trace(case).along(way(case.steps))
    placement = placed(along, case.steps, case.dtype)
    made = stream.build(along, placement)
    names = _names(along, placement)
    phases = tuple(
        Phase(
            name=p.name, peak_bytes=p.peak_bytes, resident=frozenset(n for s in slots for n in names.get(s, (f"?{s}",)))
        )
        for p, slots in zip(stream.peaks(made, 1), made.present, strict=True)
    )
    in_turn = max(map(placement.bytes_of, placement.pinned_in_turn()), default=0)
    return Seen(phases=phases, pinned_bytes=placement.bytes_of(placement.pinned()) + in_turn)


def later_peak_bytes(case: Case) -> int:
    """Return the most that a case should hold in any call after its first."""
    along = trace(case).along(way(case.steps))
    return stream.later_peak_bytes(stream.build(along, placed(along, case.steps, case.dtype)), 1)


def _names(along: Trace, placement: Placement) -> dict[int, list[str]]:
    """Return the names of the weights in each slot; tied ones share it."""
    found: dict[int, list[str]] = {}
    for component in along.components:
        for module in component.modules:
            for weight in module.weights:
                found.setdefault(placement.slot_of(weight.storage), []).append(f"{module.path}.{weight.name}")
    return found
