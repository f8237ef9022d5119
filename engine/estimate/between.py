"""Estimates made of others: between two sizes, where a size cannot be traced here, and within a budget.

An interpolated one says so: its basis is "interpolated".

What a picture's size decides grows with its pixels: activations and workspaces in proportion, attention's time faster.
The truth lies between the two neighbours, and so does the interval.
"""

from __future__ import annotations

from dataclasses import replace

from engine.values import Estimate, HostBytes, Interval, Phase


def between(low: Estimate, high: Estimate, share: float) -> Estimate:
    """Return the estimate at `share` (0 to 1) of the way from `low` to `high` in pixels: both of one list of steps."""

    def whole(left: int | None, right: int | None) -> int | None:
        return None if left is None or right is None else round(left + share * (right - left))

    def real(left: float | None, right: float | None) -> float | None:
        return None if left is None or right is None else round(left + share * (right - left), 4)

    phases = tuple(
        Phase(
            name=a.name,
            peak_bytes=whole(a.peak_bytes, b.peak_bytes),
            weights_bytes=whole(a.weights_bytes, b.weights_bytes),
            activation_bytes=whole(a.activation_bytes, b.activation_bytes),
            workspace_bytes=whole(a.workspace_bytes, b.workspace_bytes),
            seconds=real(a.seconds, b.seconds),
        )
        for a, b in zip(low.phases, high.phases, strict=False)
    )
    return replace(
        high,
        peak_allocated_bytes=whole(low.peak_allocated_bytes, high.peak_allocated_bytes),
        peak_reserved_bytes=whole(low.peak_reserved_bytes, high.peak_reserved_bytes),
        device_bytes=whole(low.device_bytes, high.device_bytes),
        required_bytes=whole(low.required_bytes, high.required_bytes),
        host=HostBytes(
            anonymous_bytes=whole(low.host.anonymous_bytes, high.host.anonymous_bytes),
            pinned_bytes=whole(low.host.pinned_bytes, high.host.pinned_bytes),
            file_bytes=whole(low.host.file_bytes, high.host.file_bytes),
        ),
        host_bytes=whole(low.host_bytes, high.host_bytes),
        seconds=real(low.seconds, high.seconds),
        load_seconds=real(low.load_seconds, high.load_seconds),
        basis="interpolated",
        interval=Interval(
            low_bytes=low.interval.low_bytes,
            high_bytes=high.interval.high_bytes,
            low_seconds=low.interval.low_seconds,
            high_seconds=high.interval.high_seconds,
        ),
        phases=phases if [p.name for p in low.phases] == [p.name for p in high.phases] else (),
    )


def within(estimate: Estimate, budget_bytes: int | None) -> Estimate:
    """Return an estimate as it would come out within a budget: what the allocator caches stops at it."""
    device, reserved = estimate.device_bytes, estimate.peak_reserved_bytes
    if budget_bytes is None or device is None or reserved is None or device <= budget_bytes:
        return estimate
    over = device - max(budget_bytes, estimate.required_bytes or 0)
    if over <= 0:
        return estimate
    peak = min(estimate.peak_allocated_bytes or 0, reserved - over)
    return replace(
        estimate,
        device_bytes=device - over,
        peak_reserved_bytes=reserved - over,
        peak_allocated_bytes=peak,
        phases=tuple(_capped(p, peak) for p in estimate.phases),
    )


def _capped(phase: Phase, most_bytes: int) -> Phase:
    """Return a phase that holds no more than this: workspaces are what is given up."""
    over = (phase.peak_bytes or 0) - most_bytes
    if over <= 0:
        return phase
    left = None if phase.workspace_bytes is None else max(0, phase.workspace_bytes - over)
    return replace(phase, peak_bytes=most_bytes, workspace_bytes=left)
