"""The phases of a call, named as the dry run names them: how long each takes, and the most it holds on the device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bench.gpu.device import Device
from bench.gpu.sampling import Sampler
from engine.dryrun.record import VAE_METHODS, is_encoder

BEFORE = "start"
"""What comes before the first component: arguments are checked, text is split into tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One phase. The peaks are those from its beginning to its end."""

    name: str
    seconds: float
    allocated_bytes: int
    reserved_bytes: int
    nvml_process_bytes: int | None
    nvml_card_bytes: int | None


class Watch:
    """Ends one phase and begins the next where a component's turn comes."""

    def __init__(self, device: Device, sampler: Sampler) -> None:
        self._device = device
        self._sampler = sampler
        self._done: list[Measured] = []
        self._times: dict[str, int] = {}
        self._begun: Any = None
        self.kind = ""
        self.now = ""
        self.stamps: list[Any] = []

    def begin(self, name: str) -> None:
        """Begin a stretch, after what came before is done on the device."""
        self._device.synchronize()
        self._device.reset_peaks()
        self._sampler.taken()
        self._times.clear()
        self._enter(name)

    def enter(self, kind: str) -> None:
        """Go into a phase; one that comes again gets a number. Staying in one is free of charge."""
        if kind != self.kind:
            self._leave()
            self._enter(kind)

    def end(self) -> tuple[Measured, ...]:
        """End the stretch, and return its phases."""
        self._leave()
        done, self._done = tuple(self._done), []
        self.kind = self.now = ""
        return done

    def _enter(self, kind: str) -> None:
        self.kind = kind
        self._times[kind] = count = self._times.get(kind, 0) + 1
        self.now = kind if count == 1 else f"{kind}.{count}"
        self._begun = self._device.stamp()

    def _leave(self) -> None:
        if not self.kind:
            return
        end = self._device.stamp()
        self._device.synchronize()
        peaks, seen = self._device.peaks(), self._sampler.taken()
        self._done.append(
            Measured(
                name=self.now,
                seconds=self._device.seconds(self._begun, end),
                allocated_bytes=peaks.allocated_bytes,
                reserved_bytes=peaks.reserved_bytes,
                nvml_process_bytes=seen.process_bytes,
                nvml_card_bytes=seen.card_bytes,
            )
        )
        self._device.reset_peaks()

    def step(self) -> None:
        """Note that a denoising step has ended: a stamp, and no waiting."""
        self.stamps.append(self._device.stamp())

    def step_seconds(self) -> tuple[float, ...]:
        """Return the seconds from each step's end to the next one's, and forget them. The device must be done."""
        stamps, self.stamps = self.stamps, []
        return tuple(self._device.seconds(a, b) for a, b in itertools.pairwise(stamps))


@contextlib.contextmanager
def marked(pipe: Any, watch: Watch) -> Iterator[None]:
    """Let the pipeline's components mark phases, and its scheduler steps, while this is active."""
    handles: list[Any] = []
    wrapped: list[tuple[Any, str]] = []
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        kind = "encode" if is_encoder(name) else "denoise"
        handles.append(part.register_forward_pre_hook(functools.partial(_mark, watch, kind)))
        for method in () if is_encoder(name) else VAE_METHODS:
            real = getattr(part, method, None)
            if callable(real):
                setattr(part, method, _marking(real, watch, method))
                wrapped.append((part, method))
    scheduler: Any = getattr(pipe, "scheduler", None)
    if hasattr(scheduler, "step"):
        scheduler.step = types.MethodType(_stepping(scheduler, watch), scheduler)
        wrapped.append((scheduler, "step"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, name in wrapped:
            delattr(owner, name)


def _mark(watch: Watch, kind: str, *_: Any) -> None:
    watch.enter(kind)


def _marking(real: Any, watch: Watch, kind: str) -> Any:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        watch.enter(kind)
        return real(*args, **kwargs)

    return call


def _stepping(scheduler: Any, watch: Watch) -> Any:
    real = type(scheduler).step

    @functools.wraps(real)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        if self is scheduler:  # pipelines copy theirs, for sound or frame by frame
            watch.step()
        return result

    return step


def plain(phases: tuple[Measured, ...]) -> list[dict[str, Any]]:
    """Return phases as a record keeps them."""
    return [asdict(p) | {"seconds": round(p.seconds, 6)} for p in phases]
