"""The card's memory along a run, as a series short enough to be drawn. No torch.

A stream of a hundred thousand allocations becomes a few hundred points. What makes the drawing true is kept exactly:
how each phase begins and ends, its peak, the most and the least of its weights. In between every stretch keeps its
highest and lowest moments, so that a point is off its place by less than a stretch's width, and never in its height.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from engine import gpus
from engine.calibration import Calibration
from engine.estimate import stream, whole, workspaces
from engine.estimate.placements import Placement
from engine.estimate.stream import ACTIVATION, CUDA_GRANULE_BYTES, WEIGHT, WORKSPACE, Stream
from engine.estimate.trace import Trace
from engine.estimate.ways import way
from engine.values import Gpu, Step

MAX_POINTS = 400
"""Of a whole run. A run of very many phases may have more: of each its few exact moments are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is on the card from one moment on; `position` is the share of the phase's allocations made before it."""

    position: float
    components_bytes: tuple[int, ...]
    """The weights of each component."""
    activation_bytes: int
    workspace_bytes: int

    @property
    def weights_bytes(self) -> int:
        return sum(self.components_bytes)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLine:
    """One phase: its points in order, and which of them is its peak."""

    name: str
    points: tuple[Point, ...]
    peak: int
    step_ends: tuple[float, ...] = ()
    """Where the denoising steps end that were traced: positions."""

    @property
    def peak_point(self) -> Point:
        return self.points[self.peak]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A run's tensors on the card, phase by phase. `context_bytes` is what the process takes there beside them."""

    components: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    """All weights of each component, as they are kept."""
    phases: tuple[PhaseLine, ...]
    context_bytes: int = 0

    @property
    def peak_phase(self) -> int:
        """The first phase that has the most on the card."""
        return max(range(len(self.phases)), key=lambda i: self.phases[i].peak_point.total_bytes)


def of_trace(
    trace: Trace,
    steps: Sequence[Step],
    gpu: Gpu,
    dtype: str,
    absent: Collection[str] = (),
    calibration: Calibration | None = None,
) -> Timeline:
    """Return the timeline of a run under `steps`, without what is `absent`. `gpu` needs a compute capability."""
    capability, units = gpu.compute_capability, gpus.multiprocessors(gpu)
    assert capability is not None
    along = trace.along(way(steps)).without(absent)
    placement = whole.placed(along, steps, dtype)
    takes = functools.cache(lambda w: workspaces.taken(w, capability, units, calibration))
    made = stream.build(along, placement, takes)
    context = workspaces.context_bytes(capability, calibration, copies_aside=bool(made.aside))
    return of_stream(made, _sizes(along, placement), context)


def _sizes(trace: Trace, placement: Placement) -> dict[str, int]:
    """Return the bytes of each component that has any, in the order they are used, weights rounded as on the card."""
    used = {path: at for at, path in enumerate(trace.paths)}
    ordered = sorted(trace.components, key=lambda c: used.get(c.name, len(used)))
    found = {c.name: sum(_rounded(placement.sizes[s]) for s in placement.slots(c.weights())) for c in ordered}
    return {name: size for name, size in found.items() if size}


def of_stream(made: Stream, sizes_bytes: dict[str, int], context_bytes: int = 0) -> Timeline:
    """Return the timeline of a stream, whose weights are of the components in `sizes_bytes`."""
    names = tuple(sizes_bytes)
    totals, weights = _curves(made)
    starts = [index for index, _ in made.marks]
    spans = list(zip(starts, [*starts[1:], len(made.events)], strict=True))
    chosen = _chosen(totals, weights, spans)
    states = iter(_states(made, names, [i for wanted in chosen for i in wanted]))
    phases = []
    for (start, end), (_, name), wanted in zip(spans, made.marks, chosen, strict=True):
        width = max(1, end - start)
        points = tuple(
            Point(
                position=(i - start) / width,
                components_bytes=parts[: len(names)],
                activation_bytes=parts[-2],
                workspace_bytes=parts[-1],
            )
            for i, parts in zip(wanted, states, strict=False)
        )
        ends = tuple((i - start) / width for i in made.step_ends if start < i <= end)
        peak = max(range(len(points)), key=lambda k: points[k].total_bytes)
        phases.append(PhaseLine(name=name, points=points, peak=peak, step_ends=ends))
    return Timeline(
        components=names, sizes_bytes=tuple(sizes_bytes.values()), phases=tuple(phases), context_bytes=context_bytes
    )


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // CUDA_GRANULE_BYTES) * CUDA_GRANULE_BYTES


def _curves(made: Stream) -> tuple[list[int], list[int]]:
    """Return the bytes in all, and those of weights, before each event and after the last."""
    rounded = [_rounded(s) for s in made.sizes]
    kinds = made.kinds
    total = weights = 0
    totals, of_weights = [0], [0]
    for key in made.events:
        change = rounded[key] if key > 0 else -rounded[-key]
        total += change
        if kinds[abs(key)] == WEIGHT:
            weights += change
        totals.append(total)
        of_weights.append(weights)
    return totals, of_weights


def _chosen(totals: list[int], weights: list[int], spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the moments to keep of each phase. A phase's moments are those before its events, and its very end."""
    exact = [_extremes(totals, weights, start, end + 1) | {start, end} for start, end in spans]
    # A phase of many events gets more stretches than one of few, but not in proportion.
    shares = [math.sqrt(end - start) for start, end in spans]
    stretches = MAX_POINTS
    while stretches:
        each = [round(stretches * share / (sum(shares) or 1)) for share in shares]
        found = [e | _finer(totals, weights, s, n) for e, s, n in zip(exact, spans, each, strict=True)]
        if sum(map(len, found)) <= MAX_POINTS:
            return [sorted(f) for f in found]
        stretches = stretches * 4 // 5
    return [sorted(e) for e in exact]


def _finer(totals: list[int], weights: list[int], span: tuple[int, int], stretches: int) -> set[int]:
    """Return the extremes of each of so many stretches of a phase."""
    start, end = span
    bounds = sorted({start + (end - start) * k // stretches for k in range(stretches + 1)}) if stretches else []
    found: set[int] = set()
    for low, high in itertools.pairwise(bounds):
        found |= _extremes(totals, weights, low, high)
    return found


def _extremes(totals: list[int], weights: list[int], low: int, high: int) -> set[int]:
    """Return where all bytes and the weights' are most and least, the first such places."""
    found = set()
    for curve in (totals, weights):
        part = curve[low:high]
        found |= {low + part.index(max(part)), low + part.index(min(part))}
    return found


def _states(made: Stream, names: tuple[str, ...], wanted: Iterable[int]) -> list[tuple[int, ...]]:
    """Return what is on the card at each wanted moment, which are in order: each component, activations, workspaces."""
    rows = {name: row for row, name in enumerate(names)}
    parts = [0] * (len(names) + 2)
    last = {ACTIVATION: len(names), WORKSPACE: len(names) + 1}
    found: list[tuple[int, ...]] = []
    at = 0
    for moment in wanted:
        for key in made.events[at:moment]:
            if key:
                kind = made.kinds[abs(key)]
                row = rows[made.owners[abs(key)]] if kind == WEIGHT else last[kind]
                parts[row] += _rounded(made.sizes[key]) if key > 0 else -_rounded(made.sizes[-key])
        at = moment
        found.append(tuple(parts))
    return found
