"""The phases of a call, named as the dry run names them: how long each takes, and the most it holds on the device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn

from bench.gpu.device import Device
from bench.gpu.sampling import Sampler
from engine.dryrun import phases

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
        self._names = phases.Names()
        self._begun: Any = None
        self.now = ""
        self.stamps: list[Any] = []

    def begin(self, name: str) -> None:
        """Begin a stretch, after what came before is done on the device."""
        self._device.synchronize()
        self._device.reset_peaks()
        self._sampler.taken()
        self._names = phases.Names()
        self.enter(name)

    def enter(self, kind: str) -> None:
        """Go into a phase; one that comes again gets a number. Staying in one is free of charge."""
        name = self._names.entered(kind)
        if name is not None:
            self._leave()
            self.now = name
            self._begun = self._device.stamp()

    def end(self) -> tuple[Measured, ...]:
        """End the stretch, and return its phases."""
        self._leave()
        done, self._done = tuple(self._done), []
        self.now = ""
        return done

    def _leave(self) -> None:
        if not self.now:
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


class Marks(Protocol):
    """What a call is marked for: the phases that it enters, and its denoising steps' ends."""

    def enter(self, kind: str) -> None: ...

    def step(self) -> None: ...


@contextlib.contextmanager
def marked(pipe: Any, watch: Marks) -> Iterator[None]:
    """Let the pipeline's components mark phases, and its scheduler steps, while this is active."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    scheduler: Any = getattr(pipe, "scheduler", None)
    steps = hasattr(scheduler, "step")
    if steps:
        scheduler.step = types.MethodType(_stepping(scheduler, watch), scheduler)
    try:
        with phases.told(modules, watch.enter):
            yield
    finally:
        if steps:
            del scheduler.step


def _stepping(scheduler: Any, watch: Marks) -> Any:
    real = type(scheduler).step

    @functools.wraps(real)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        if self is scheduler:  # pipelines copy theirs, for sound or frame by frame
            watch.step()
        return result

    return step


def plain(measured: tuple[Measured, ...]) -> list[dict[str, Any]]:
    """Return phases as a record keeps them."""
    return [asdict(p) | {"seconds": round(p.seconds, 6)} for p in measured]
