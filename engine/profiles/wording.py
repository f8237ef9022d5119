"""Profiles in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from engine import optimizers
from engine.units import format_size
from engine.values import FrozenDict, Match, Profile, Slot, Step
from engine.words import listing


def match(told: Match) -> str:
    """Return when a profile may be used."""
    parts = []
    if told.device is not None:
        parts.append("without an accelerator" if told.device == "cpu" else f"on {told.device}")
    low, high = told.free_vram_at_least_bytes, told.free_vram_below_bytes
    parts += _range(low and format_size(low), high and format_size(high), "of free VRAM")
    few, many = told.pixels_at_least, told.pixels_below
    parts += _range(few and f"{few:,}", many and f"{many:,}", "pixels")
    if told.gpus:
        parts.append(f"on {listing(told.gpus, 'or')}")
    if told.pipelines:
        parts.append(f"for {listing(told.pipelines, 'or')}")
    return ", ".join(parts) or "anywhere"


def _range(low: str | int | None, high: str | int | None, unit: str) -> list[str]:
    if low and high:
        return [f"from {low} to below {high} {unit}"]
    return [f"from {low} {unit}"] if low else [f"below {high} {unit}"] if high else []


def called(profile: Profile) -> str:
    """Return a profile's name and version."""
    return f"{profile.name} {profile.version}"


def value(told: Any) -> str:
    """Return a parameter's value."""
    if told is None:
        return "none"
    if isinstance(told, list | tuple):
        return f"[{', '.join(map(str, told))}]"
    return str(told).lower() if isinstance(told, bool) else str(told)


def short(slot: Slot) -> str:
    """Return a place of a list, each step with those parameters that are not its defaults."""
    told = [alternative(a) for a in slot.alternatives]
    return told[0] if len(told) == 1 else f"one of ({' | '.join(told)})"


def alternative(steps: Iterable[Step]) -> str:
    """Return steps that go together, in the same way."""
    return " + ".join(map(_short, steps)) or "none"


def _short(step: Step) -> str:
    spec = optimizers.spec(step.name)
    if spec.scalar:
        return str(step)
    usual = spec.step().params
    return str(
        dataclasses.replace(step, params=FrozenDict({k: v for k, v in step.params.items() if v != usual.get(k)}))
    )
