"""What a profile takes over from its parent, and what it changes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import optimizers
from engine.documents import Problem
from engine.errors import DgRunError
from engine.profiles import wording
from engine.profiles.raw import Alternatives, Placed, Raw
from engine.values import Match, Profile, Slot
from engine.words import did_you_mean


@dataclass(frozen=True, slots=True)
class Made:
    """A profile with its list as it is after inheritance, each step with its place in the profile's own file."""

    profile: Profile
    slots: tuple[Alternatives, ...]


@dataclass(frozen=True, slots=True)
class Edits:
    """What came of a profile's edits of its parent, beside the list itself."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)


def alone(raw: Raw, source: str) -> Made:
    """Return a profile without a parent; of a file with problems, what could be read of it."""
    slots = raw.slots or ()
    profile = Profile(
        name=raw.name,
        version=raw.values.get("version", ""),
        summary=raw.values.get("summary", ""),
        match=raw.match or Match(),
        slots=plain(slots),
        source=source,
        prefer=raw.values.get("prefer"),
        fallback=raw.values.get("fallback"),
    )
    return Made(profile, slots)


def child(raw: Raw, source: str, parent: Made) -> tuple[Made, Edits]:
    """Return a profile over its parent (as `alone` does), and what came of its edits."""
    above = parent.profile
    edits = Edits(overridden=list(above.overridden))
    told = wording.called(above)
    inherited = tuple(tuple(tuple(Placed(p.step, None) for p in a) for a in slot) for slot in parent.slots)
    if raw.slots is not None:
        slots = raw.slots
        listed = ", ".join(map(wording.short, above.slots))
        edits.overridden.append(f"optimizers of {told}: {listed}; replaced whole")
    else:
        slots = tuple(_edited(raw, inherited, told, edits))
        if not slots and not edits.problems:
            edits.problems.append(Problem(raw.place("drop"), f"nothing is left of the optimizers of {told}"))
    kept: dict[str, Any] = {}
    for key in ("prefer", "fallback"):
        was = getattr(above, key)
        kept[key] = raw.values.get(key, was)
        if was is not None and kept[key] != was:
            edits.overridden.append(f"{key} of {told}: {was}; {kept[key] or 'none'} here")
    if raw.match is not None and raw.match != above.match:
        was_when, is_when = wording.match(above.match), wording.match(raw.match)
        edits.overridden.append(f"match of {told}: {was_when}; {is_when} here")
    profile = Profile(
        name=raw.name,
        version=raw.values.get("version", ""),
        summary=raw.values.get("summary", ""),
        match=above.match if raw.match is None else raw.match,
        slots=plain(slots),
        source=source,
        extends=raw.values["extends"],
        overridden=tuple(edits.overridden),
        **kept,
    )
    return Made(profile, slots), edits


def plain(slots: Sequence[Alternatives]) -> tuple[Slot, ...]:
    """Return slots without the places of their steps."""
    return tuple(Slot(alternatives=tuple(tuple(p.step for p in a) for a in slot)) for slot in slots)


def _edited(raw: Raw, slots: Sequence[Alternatives], told: str, edits: Edits) -> Iterator[Alternatives]:
    """Yield the parent's slots with `set` and `drop` applied."""
    names = list(dict.fromkeys(p.step.name for slot in slots for a in slot for p in a))
    listed = [(name, raw.place("set", name, key=True)) for name in raw.edits]
    listed += [(name, raw.place("drop", i)) for i, name in enumerate(raw.drops)]
    for name, place in listed:
        if name not in names:
            edits.problems.append(Problem(place, f"{told} has no {name}", did_you_mean(name, names)))
    edits.overridden.extend(f"{name} of {told}: dropped" for name in raw.drops)
    changed: dict[str, list[str]] = {name: [] for name in raw.edits}
    for slot in slots:
        alternatives: list[tuple[Placed, ...]] = []
        for alternative in slot:
            left = tuple(
                _set(raw, p, told, edits, changed[p.step.name]) if p.step.name in raw.edits else p
                for p in alternative
                if p.step.name not in raw.drops
            )
            if [p.step for p in left] not in [[p.step for p in other] for other in alternatives]:
                alternatives.append(left)  # two that have become one are one
        if alternatives != [()]:
            yield tuple(alternatives)
    for name, lines in changed.items():
        edits.overridden.extend(dict.fromkeys(lines))
        if not lines and name in names:
            place = raw.place("set", name, key=True)
            edits.warnings.append(Problem(place, f"this changes nothing: {told} has {name} so", "leave it out"))


def _set(raw: Raw, placed: Placed, told: str, edits: Edits, changes: list[str]) -> Placed:
    """Return a step with the parameters that are set put over the parent's."""
    name, was = placed.step.name, placed.step.params
    spec = optimizers.spec(name)
    given = {"value": raw.edits[name]} if spec.scalar else dict(raw.edits[name])
    try:
        step = spec.step({**was, **given})
    except DgRunError as error:
        problem = Problem(raw.place("set", name), error.what, error.do)
        if problem not in edits.problems:
            edits.problems.append(problem)
        return placed
    for key, value in step.params.items():
        if value != was.get(key):
            of = name if spec.scalar else f"{name}.{key}"
            changes.append(f"{of} of {told}: {wording.value(was.get(key))}; {wording.value(value)} here")
    return dataclasses.replace(placed, step=step, place=raw.place("set", name, key=True))
