"""What a run will take under a list of optimizers: device bytes, host bytes, seconds, phase by phase. No torch.

Everything is replayed from one trace. What is not known (the seconds of a card without rates) stays None.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from engine import gpus, optimizers
from engine.calibration import Calibration
from engine.estimate import allocator, clock, stream, workspaces
from engine.estimate.bounds import HOST_BASE_BYTES
from engine.estimate.clock import Speeds
from engine.estimate.pinned import pinned_bytes, pinned_in_turn_bytes
from engine.estimate.placements import (
    Casting,
    Grouping,
    GroupOffload,
    ModelOffload,
    Placement,
    Resident,
    SequentialOffload,
    StagedEncoding,
    keeping,
)
from engine.estimate.stream import Stream, Taken
from engine.estimate.trace import KIND_BITS, KIND_MASK, PHASE, WORK, Trace, Work
from engine.estimate.ways import QUADRATIC, way
from engine.facts.casting import is_text_encoder
from engine.optimizers import placing
from engine.optimizers.spec import named
from engine.values import Estimate, Gpu, HostBytes, Interval, Phase, Step

MARGIN = 0.015
"""Beside the mechanisms' own range: assumed, for what is held and not modelled."""
SECONDS_LOW, SECONDS_HIGH = 0.75, 1.35
"""Beside the range of hosts: assumed, for how far a card's rates are from what a run reaches of them."""

_CONVOLUTIONS = ("conv", "conv_last")
_QUALITIES = ("exact", "near", "lossy")


def _step(steps: Sequence[Step], name: str) -> Step | None:
    return next((s for s in steps if s.name == name), None)


def placed(trace: Trace, steps: Sequence[Step], dtype: str) -> Placement:
    """Return the placement that steps put on a trace. Raises: UsageError, IncompatibleError, as `placing.holders`."""
    if _step(steps, "staged_encoding") is not None:
        return StagedEncoding(trace, lambda rest: _placed(rest, steps, dtype))
    return _placed(trace, steps, dtype)


def _placed(trace: Trace, steps: Sequence[Step], dtype: str) -> Placement:
    casting = None
    if (cast := _step(steps, "layerwise_casting")) is not None:
        compute = cast.params["compute"]
        casting = Casting(
            storage=cast.params["storage"],
            compute=dtype if compute == "auto" else compute,
            components=named(cast),
        )
    held = placing.holders(steps, [c.name for c in trace.components])
    resident = [n for n, s in held.items() if s.name == placing.RESIDENT]
    offload = next((s.name for s in held.values() if s.name != placing.RESIDENT), placing.RESIDENT)
    match offload:
        case "model_offload":
            return ModelOffload(keeping(trace, resident), casting)
        case "sequential_offload":
            return SequentialOffload(keeping(trace, resident), casting)
        case "group_offload":
            return GroupOffload(trace, casting, _groupings(steps, held))
    return Resident(trace, casting)


def _groupings(steps: Sequence[Step], held: Mapping[str, Step]) -> dict[str, Grouping | None]:
    """Return how each component is grouped, in the order in which what is in no group is put on the device."""
    found: dict[str, Grouping | None] = {}
    for step in placing.spread(steps, held):
        names = [n for n, s in held.items() if n in (step.params.get("components") or held)]
        if step.name == placing.RESIDENT:
            found |= dict.fromkeys(sorted(names))
        elif step.name == "group_offload":
            how = Grouping(
                block_level=step.params["type"] == "block_level",
                use_stream=step.params["use_stream"],
                blocks_per_group=step.params["blocks_per_group"],
                low_cpu_mem_usage=bool(step.params.get("low_cpu_mem_usage")),
            )
            found |= dict.fromkeys(names, how)
    return found


def estimate(
    trace: Trace,
    steps: Sequence[Step],
    gpu: Gpu,
    *,
    dtype: str,
    denoising_steps: int | None,
    stored: Mapping[str, str | None],
    absent: Collection[str] = (),
    calibration: Calibration | None = None,
) -> Estimate:
    """Return the estimate of a run under `steps`, as if the card had no limit.

    `stored` says, by component, which dtype its weights have on disk (None: not known, taken to be another).
    `absent` names components that are not loaded; what they would give is handed in. `gpu` needs a compute capability;
    `calibration` is what was measured of it.
    """
    capability, units = gpu.compute_capability, gpus.multiprocessors(gpu)
    assert capability is not None
    along = trace.along(way(steps)).without(absent)
    make = functools.partial(placed, along, steps, dtype)
    takes = functools.cache(lambda w: workspaces.taken(w, capability, units, calibration))
    usual = stream.build(along, make(), takes)
    how: dict[str, Any] = {"aside": usual.aside, "expandable_segments": _step(steps, "allocator") is not None}
    reserved = allocator.replay(usual.events, usual.sizes, marks=[i for i, _ in usual.marks], **how)
    required = allocator.required_bytes(usual.events, usual.sizes, frozenset(usual.optional), **how)
    # A run may be of several calls, and is to end with as much room as it began with.
    required += max(0, stream.later_peak_bytes(usual) - stream.peak_bytes(stream.peaks(usual)))
    context = workspaces.context_bytes(capability, calibration, copies_aside=bool(usual.aside))
    host = host_bytes(along, make(), stored, dtype)
    is_tf32 = _step(steps, "tf32") is not None
    by_host = {h: clock.speeds(gpu, h, calibration, tf32=is_tf32) for h in ("low", "value", "high")}
    seconds = _seconds(along, make, by_host, along.usual_steps if denoising_steps is None else denoising_steps)
    placement = make()
    at_rest = placement.bytes_of(placement.loaded())
    usual_speed = by_host["value"]
    low, high = _range(along, make, (capability, units), reserved.peak_allocated_bytes)
    if trace.basis == "component":
        # What the pipeline holds between its components was not seen: as much again as was seen within them.
        held = max(p.activation_bytes for p in stream.peaks(usual))
        high += held
    return Estimate(
        peak_allocated_bytes=reserved.peak_allocated_bytes,
        peak_reserved_bytes=reserved.peak_reserved_bytes,
        device_bytes=max(reserved.peak_reserved_bytes, required) + context,
        required_bytes=required + context,
        host=host,
        host_bytes=(host.anonymous_bytes or 0) + (host.pinned_bytes or 0),
        seconds=None if seconds is None else round(sum(seconds["value"].values()), 3),
        load_seconds=None
        if usual_speed is None
        else round(clock.load_seconds(_stored_bytes(along), at_rest, usual_speed), 3),
        quality=max((optimizers.spec(s.name).quality for s in steps), key=_QUALITIES.index, default="exact"),
        basis=trace.basis,
        calibrated=calibration is not None,
        interval=Interval(
            low_bytes=low,
            high_bytes=high,
            low_seconds=None if seconds is None else round(sum(seconds["high"].values()) * SECONDS_LOW, 3),
            high_seconds=None if seconds is None else round(sum(seconds["low"].values()) * SECONDS_HIGH, 3),
        ),
        assumptions=trace.assumptions,
        phases=_phases(usual, reserved.allocated_bytes, None if seconds is None else seconds["value"]),
    )


def _stored_bytes(trace: Trace) -> int:
    return sum(w.size_bytes for c in trace.components for w in c.weights() if w.is_saved)


def _phases(usual: Stream, allocated: Sequence[int], seconds: Mapping[str, float] | None) -> tuple[Phase, ...]:
    found = []
    for peak, most in zip(stream.peaks(usual), allocated, strict=True):
        found.append(
            Phase(
                name=peak.name,
                peak_bytes=most,
                weights_bytes=peak.weights_bytes,
                activation_bytes=peak.activation_bytes,
                workspace_bytes=peak.workspace_bytes,
                seconds=None if seconds is None or peak.name not in seconds else round(seconds[peak.name], 4),
            )
        )
    return tuple(found)


def _seconds(
    trace: Trace, make: functools.partial[Placement], by_host: Mapping[str, Speeds | None], steps: int | None
) -> dict[str, dict[str, float]] | None:
    """Return the seconds by phase on a slow ("low"), a usual and a fast host; None for a card without rates."""
    found = {}
    for host, speed in by_host.items():
        if speed is None:
            return None
        found[host] = _by_phase(clock.phases(trace, make, speed, steps))
    return found


def seconds_of(
    trace: Trace, steps: Sequence[Step], speed: Speeds | None, *, dtype: str, denoising_steps: int | None
) -> float | None:
    """Return the seconds that `estimate` would give, and nothing else: a tenth of its work. `trace` as there."""
    if speed is None:
        return None
    make = functools.partial(placed, trace, steps, dtype)
    usual = trace.usual_steps if denoising_steps is None else denoising_steps
    return round(sum(_by_phase(clock.phases(trace, make, speed, usual)).values()), 3)


def _by_phase(phases: Sequence[clock.PhaseSeconds]) -> dict[str, float]:
    return {p.name: p.seconds for p in phases}


def computing_seconds(trace: Trace, speed: Speeds | None, steps: int | None) -> dict[str, float] | None:
    """Return the seconds by phase of a run with everything on the device; None for a card without rates.

    `QUADRATIC` is no phase: it is what of decoding other tiles could save.
    """
    if speed is None:
        return None
    found = {QUADRATIC: _quadratic_seconds(trace, speed)}
    usual = trace.usual_steps if steps is None else steps
    for phase in clock.phases(trace, functools.partial(Resident, trace), speed, usual):
        found[phase.name] = found.get(phase.name, 0.0) + phase.seconds
    return found


def _quadratic_seconds(trace: Trace, speed: Speeds) -> float:
    """Return the seconds of a decoder's attention and products, with what it takes to start them.

    All else in a decoder grows with the pixels, and tiles overlap: together they compute no less of it than the whole.
    """
    seconds, phase = 0.0, ""
    for word in trace.events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == PHASE:
            phase = trace.phases[payload]
        elif kind == WORK and phase.startswith("decode") and trace.works[payload].kind in ("attention", "matmul"):
            seconds += clock.work_seconds(trace.works[payload], speed) + speed.launch_s
    return seconds


def _range(
    trace: Trace, make: functools.partial[Placement], card: tuple[tuple[int, int], int | None], peak: int
) -> tuple[int, int]:
    """Return where the peak lies when cuDNN converts nothing, and when it converts everything."""

    def nothing(work: Work) -> Taken:
        return Taken() if work.kind in _CONVOLUTIONS else workspaces.taken(work, *card)

    def everything(work: Work) -> Taken:
        if work.kind not in _CONVOLUTIONS:
            return workspaces.taken(work, *card)
        return Taken(bytes=workspaces.converted_bytes(work, ("input", "output")))

    least = stream.peak_bytes(stream.peaks(stream.build(trace, make(), functools.cache(nothing))))
    most = stream.peak_bytes(stream.peaks(stream.build(trace, make(), functools.cache(everything))))
    return round(min(least, peak) * (1 - MARGIN)), round(max(most, peak) * (1 + MARGIN))


def host_bytes(trace: Trace, placement: Placement, stored: Mapping[str, str | None], dtype: str) -> HostBytes:
    """Return the host memory of a run, at its most.

    Weights that are stored in the dtype they are loaded in stay pages of their files, which can be dropped; converted
    ones are anonymous. What model and unstreamed group offload bring back from the device is anonymous too. Pinned
    copies take the place of what they copy, rounded up to powers of two; those that are made for each transfer are
    beside it. Of components that are let go of before the next one is loaded the largest counts, as wide as it was
    loaded; of two stages the larger.
    """
    inner = placement.inner
    pinned = set(placement.pinned())
    is_staged = inner is not placement
    anonymous, file = [0, 0], [0, 0]  # of the second stage, which is the only one in general, and of the first
    alone = [[(0, 0)], [(0, 0)]]  # of components of which the host holds one at a time
    for component in trace.components:
        is_first = is_staged and is_text_encoder(component.name)
        moved_back = not is_first and inner.brings_back(component.name)
        is_let_go = placement.lets_go(component.name)
        is_mapped = stored.get(component.name) == dtype
        cast = {w.storage for m in component.modules if m.path in placement.casts for w in m.weights}
        own_bytes = own_file_bytes = 0
        for weight in component.weights():
            slot = placement.slots([weight])[0]
            if slot in pinned:
                continue
            is_as_stored = is_mapped and weight.is_saved and weight.dtype == dtype
            if is_as_stored and weight.storage not in cast and not moved_back:
                own_file_bytes += weight.size_bytes
            elif is_let_go and not is_as_stored:
                own_bytes += weight.size_bytes
            else:
                own_bytes += placement.sizes[slot]
        if is_let_go:
            alone[is_first].append((own_bytes, own_file_bytes))
        else:
            anonymous[is_first] += own_bytes
            file[is_first] += own_file_bytes
    for stage, parts in enumerate(alone):
        anonymous[stage] += max(own for own, _ in parts)
        file[stage] += max(own for _, own in parts)
    held = pinned_bytes(placement.sizes[s] for s in sorted(pinned))
    held += pinned_in_turn_bytes([placement.sizes[s] for s in g] for g in placement.pinned_in_turn())
    if anonymous[True] > anonymous[False] + held:  # pinning comes with the second stage
        held = 0
    return HostBytes(
        anonymous_bytes=HOST_BASE_BYTES + (max(anonymous) if held == 0 else anonymous[False]),
        pinned_bytes=held,
        file_bytes=max(file),
    )
