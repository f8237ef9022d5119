"""What two versions of a profile differ in, by what they mean: how a file is written does not count."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence

from engine.profiles import wording
from engine.values import Profile, Slot, Step


def between(old: Profile, new: Profile) -> tuple[str, ...]:
    """Return a line for each difference; () where both mean the same."""
    return tuple(dict.fromkeys(_differences(old, new)))


def _differences(old: Profile, new: Profile) -> Iterator[str]:
    for key in ("name", "version", "summary", "prefer", "extends", "fallback"):
        was, now = getattr(old, key), getattr(new, key)
        if was != now:
            yield f"{key}: {was or 'none'} → {now or 'none'}"
    if old.match != new.match:
        yield f"match: {wording.match(old.match)} → {wording.match(new.match)}"
    yield from (f"optimizers: {line}" for line in _of_slots(old.slots, new.slots))


def _of_slots(old: Sequence[Slot], new: Sequence[Slot]) -> Iterator[str]:
    """Yield what is added, removed, moved or changed, each place of the list held against the one that it became."""
    same: list[tuple[Slot, Slot]] = []
    gone: list[Slot] = []
    come: list[Slot] = []
    matcher = difflib.SequenceMatcher(a=[_kind(s) for s in old], b=[_kind(s) for s in new], autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            same += zip(old[i:i_end], new[j:j_end], strict=True)
        else:
            gone += old[i:i_end]
            come += new[j:j_end]
    for was, now in _pairs(gone, come, lambda a, b: _kind(a) == _kind(b)):
        yield f"{_kind(was)} stands in another place of the order"
        same.append((was, now))
    # A step that became a choice, or a choice that was decided, is the same place of the list.
    for was, now in _pairs(gone, come, lambda a, b: not _names(a).isdisjoint(_names(b))):
        if len(was.alternatives) > 1 and len(now.alternatives) > 1:
            same.append((was, now))
        else:
            yield f"{wording.short(was)} → {wording.short(now)}"
    yield from (f"{wording.short(s)} is gone" for s in gone)
    yield from (f"{wording.short(s)} is added" for s in come)
    for was, now in same:
        yield from _of_one(was, now)


def _pairs(gone: list[Slot], come: list[Slot], are_one: Callable[[Slot, Slot], bool]) -> list[tuple[Slot, Slot]]:
    """Return, and take out of both lists, the places that are one."""
    found = []
    for was in list(gone):
        if (now := next((s for s in come if are_one(was, s)), None)) is not None:
            gone.remove(was)
            come.remove(now)
            found.append((was, now))
    return found


def _of_one(old: Slot, new: Slot) -> Iterator[str]:
    """Yield what changed within one place."""
    if len(old.alternatives) == len(new.alternatives) and _shape(old) == _shape(new):
        steps = zip(_steps(old), _steps(new), strict=True)
        yield from dict.fromkeys(line for was, now in steps for line in _of_step(was, now))
        return
    for alternative in old.alternatives:
        if alternative not in new.alternatives:
            yield f"the alternative {wording.alternative(alternative)} is gone"
    for alternative in new.alternatives:
        if alternative not in old.alternatives:
            yield f"the alternative {wording.alternative(alternative)} is added"
    kept = [a for a in new.alternatives if a in old.alternatives]
    if kept != [a for a in old.alternatives if a in new.alternatives]:
        yield f"the alternatives stand in another order: {' | '.join(map(wording.alternative, kept))}"


def _of_step(old: Step, new: Step) -> Iterator[str]:
    for key in dict.fromkeys((*old.params, *new.params)):
        was, now = old.params.get(key), new.params.get(key)
        if was != now:
            name = old.name if key == "value" else f"{old.name}.{key}"
            yield f"{name}: {wording.value(was)} → {wording.value(now)}"


def _kind(slot: Slot) -> str:
    """Return what a place is about: the names in it, whatever their parameters."""
    names = dict.fromkeys(s.name for s in _steps(slot))
    return next(iter(names)) if len(slot.alternatives) == 1 else f"one of {', '.join(sorted(names))}"


def _names(slot: Slot) -> set[str]:
    return {s.name for s in _steps(slot)}


def _shape(slot: Slot) -> list[list[str]]:
    return [[s.name for s in a] for a in slot.alternatives]


def _steps(slot: Slot) -> list[Step]:
    return [s for a in slot.alternatives for s in a]
