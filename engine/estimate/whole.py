"""What a run will take under a list of optimizers: device bytes, host bytes, seconds, phase by phase. No torch.

Everything is replayed from one trace. What is not known (the seconds of a card without rates) stays None.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from engine import gpus, optimizers
from engine.calibration import Calibration
from engine.estimate import allocator, clock, stream, workspaces
from engine.estimate.clock import Speeds
from engine.estimate.pinned import pinned_bytes
from engine.estimate.placements import (
    Casting,
    GroupOffload,
    ModelOffload,
    Placement,
    Resident,
    SequentialOffload,
    StagedEncoding,
    is_text_encoder,
)
from engine.estimate.stream import Stream, Taken
from engine.estimate.trace import Trace, Work
from engine.estimate.ways import way
from engine.values import Estimate, Gpu, HostBytes, Interval, Phase, Step

HOST_BASE_BYTES = 1152 * 1024**2
"""Anonymous memory of a process that has run a pipeline on a card, without its weights: 1.00 to 1.32 GiB in 15 runs on
an H200 (torch 2.11 for CUDA 13.0, driver 580.159, Linux), the median 1.13. 438 MiB of it are there once the libraries
are imported, 628 once CUDA's have started; the rest comes with the kernels that are loaded."""

MARGIN = 0.015
"""Beside the mechanisms' own range: assumed, for what is held and not modelled."""
SECONDS_LOW, SECONDS_HIGH = 0.75, 1.35
"""Beside the range of hosts: assumed, for how far a card's rates are from what a run reaches of them."""

_QUALITIES = ("exact", "near", "lossy")


def _step(steps: Sequence[Step], name: str) -> Step | None:
    return next((s for s in steps if s.name == name), None)


def placed(trace: Trace, steps: Sequence[Step], dtype: str) -> Placement:
    """Return the placement that steps put on a trace."""
    if _step(steps, "staged_encoding") is not None:
        return StagedEncoding(trace, lambda rest: _placed(rest, steps, dtype))
    return _placed(trace, steps, dtype)


def _placed(trace: Trace, steps: Sequence[Step], dtype: str) -> Placement:
    casting = None
    if (cast := _step(steps, "layerwise_casting")) is not None:
        compute = cast.params["compute"]
        casting = Casting(storage=cast.params["storage"], compute=dtype if compute == "auto" else compute)
    step = optimizers.placement(steps)
    match step.name if step is not None else "resident":
        case "model_offload":
            return ModelOffload(trace, casting)
        case "sequential_offload":
            return SequentialOffload(trace, casting)
        case "group_offload":
            assert step is not None
            return GroupOffload(
                trace,
                casting,
                block_level=step.params["type"] == "block_level",
                use_stream=step.params["use_stream"],
                blocks_per_group=step.params["blocks_per_group"],
            )
    return Resident(trace, casting)


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
    reserved = allocator.replay(usual.events, usual.sizes, marks=[i for i, _ in usual.marks], aside=usual.aside)
    required = allocator.required_bytes(usual.events, usual.sizes, frozenset(usual.optional), aside=usual.aside)
    context = workspaces.context_bytes(capability, calibration, copies_aside=bool(usual.aside))
    host = host_bytes(along, make(), stored, dtype)
    by_host = {h: clock.speeds(gpu, h, calibration) for h in ("low", "value", "high")}
    seconds = _seconds(along, make, by_host, along.usual_steps if denoising_steps is None else denoising_steps)
    placement = make()
    at_rest = placement.bytes_of(placement.resident())
    usual_speed = by_host["value"]
    low, high = _range(along, make, (capability, units), reserved.peak_allocated_bytes)
    if trace.basis == "component":
        # What the pipeline holds between its components was not seen: as much again as was seen within them.
        held = max(p.activation_bytes for p in stream.peaks(usual))
        high += held
    return Estimate(
        peak_allocated_bytes=reserved.peak_allocated_bytes,
        peak_reserved_bytes=reserved.peak_reserved_bytes,
        device_bytes=reserved.peak_reserved_bytes + context,
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
        found[host] = {p.name: p.seconds for p in clock.phases(trace, make, speed, steps)}
    return found


def _range(
    trace: Trace, make: functools.partial[Placement], card: tuple[tuple[int, int], int | None], peak: int
) -> tuple[int, int]:
    """Return where the peak lies when cuDNN converts nothing, and when it converts everything."""

    def nothing(work: Work) -> Taken:
        return Taken() if work.kind == "conv" else workspaces.taken(work, *card)

    def everything(work: Work) -> Taken:
        if work.kind != "conv":
            return workspaces.taken(work, *card)
        return Taken(bytes=workspaces.converted_bytes(work, ("input", "output")))

    least = stream.peak_bytes(stream.peaks(stream.build(trace, make(), functools.cache(nothing))))
    most = stream.peak_bytes(stream.peaks(stream.build(trace, make(), functools.cache(everything))))
    return round(min(least, peak) * (1 - MARGIN)), round(max(most, peak) * (1 + MARGIN))


def host_bytes(trace: Trace, placement: Placement, stored: Mapping[str, str | None], dtype: str) -> HostBytes:
    """Return the host memory of a run, at its most.

    Weights that are stored in the dtype they are loaded in stay pages of their files, which can be dropped; converted
    ones are anonymous. What model and unstreamed group offload bring back from the device is anonymous too. Pinned
    copies take the place of what they copy, rounded up to powers of two. Of two stages the larger counts.
    """
    inner = placement.inner
    moves_back = isinstance(inner, ModelOffload) or (isinstance(inner, GroupOffload) and not inner.use_stream)
    pinned = set(placement.pinned())
    is_staged = inner is not placement
    anonymous, file = [0, 0], [0, 0]  # of the second stage, which is the only one in general, and of the first
    for component in trace.components:
        is_first = is_staged and is_text_encoder(component.name)
        moved_back = moves_back and not is_first
        is_mapped = stored.get(component.name) == dtype
        cast = {w.storage for m in component.modules if m.path in placement.casts for w in m.weights}
        for weight in component.weights():
            slot = placement.slots([weight])[0]
            if slot in pinned:
                continue
            is_as_stored = is_mapped and weight.is_saved and weight.dtype == dtype
            if is_as_stored and weight.storage not in cast and not moved_back:
                file[is_first] += weight.size_bytes
            else:
                anonymous[is_first] += placement.sizes[slot]
    held = pinned_bytes(placement.sizes[s] for s in sorted(pinned))
    if anonymous[True] > anonymous[False] + held:  # pinning comes with the second stage
        held = 0
    return HostBytes(
        anonymous_bytes=HOST_BASE_BYTES + (max(anonymous) if held == 0 else anonymous[False]),
        pinned_bytes=held,
        file_bytes=max(file),
    )
