"""What the machine has at this moment: one snapshot for one decision. No torch, no CUDA context."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from engine.probe import host, nvml, visibility
from engine.values import FrozenDict, Gpu, Hardware, Host

_WDDM = (
    "runs under WDDM: beyond its memory Windows spills to host RAM in silence,"
    " some ten times slower, and no error comes"
)


def snapshot() -> Hardware:
    """Return the cards a new process could use, and the host around them. What is broken is in `faults`."""
    around = host.snapshot()
    reading = nvml.read()
    gpus, notes = visibility.visible(reading.gpus, os.environ)
    gpus = tuple(_unified(g, around) for g in gpus)
    faults = tuple(f for f in reading.faults if f.index is None or not _set_aside(gpus))
    because = reading.nothing_because
    if reading.gpus and not gpus:
        because = notes[0]
    notes += tuple(f"card {g.index} {_WDDM}" for g in gpus if g.driver_model == "WDDM")
    return Hardware(gpus=gpus, host=around, driver=reading.driver, faults=faults, notes=notes, no_gpu_because=because)


def _set_aside(gpus: Sequence[Gpu]) -> bool:
    """Whether the user chose among the cards, so that a broken one which was not chosen does not matter."""
    variable = os.environ.get(visibility.VISIBLE)
    return variable is not None and (bool(gpus) or variable.strip() in ("", "-1"))


def without_cards() -> Hardware:
    """Return the host alone, asking no driver."""
    return Hardware(gpus=(), host=host.snapshot(), no_gpu_because="the cards are left alone")


def _unified(gpu: Gpu, around: Host) -> Gpu:
    """Give a card that shares the host's memory the host's sizes.

    Such parts (Jetson, GB10) answer the question for their own memory with "not supported": a discrete card never does.
    """
    is_silent = gpu.total_bytes is None and gpu.unknown.get("total_bytes") == nvml.NOT_TOLD and not gpu.mig
    if not is_silent or sys.platform == "win32" or around.total_ram_bytes is None:
        return gpu
    known = {n: r for n, r in gpu.unknown.items() if n not in ("total_bytes", "free_bytes")}
    return dataclasses.replace(
        gpu,
        unified_memory=True,
        total_bytes=around.total_ram_bytes,
        free_bytes=around.ram_bytes,
        unknown=FrozenDict(known),
    )
