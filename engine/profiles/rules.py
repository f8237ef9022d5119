"""What speaks against a profile's list, on any model and any machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from engine import compat
from engine.documents import Place, Problem
from engine.profiles.raw import Alternatives, Placed
from engine.values import Step
from engine.words import listing

MAX_COMBINATIONS = 4096


@cache
def _speaking() -> compat.Applicable:
    return compat.under(compat.Facts(libraries=compat.installed()))


def findings(steps: Sequence[Step]) -> tuple[compat.Finding, ...]:
    """Return the broken rules that need no model and no machine to be broken."""
    return tuple(f for f in _speaking().findings(steps) if f.breaks)


@cache
def repeatable() -> frozenset[str]:
    """Return the optimizers that may be listed more than once: a rule says when not."""
    found = set()
    for rule in compat.rules():
        names = [s.optimizer for s in rule.subjects]
        found |= {n for n in names if rule.kind == "excludes" and names.count(n) > 1}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Judged:
    """What is wrong with a list; and the alternatives that no combination allows, where the list is sound."""

    problems: tuple[Problem, ...]
    unreachable: tuple[tuple[int, int], ...] = ()
    """(slot, alternative) of each."""


def judge(slots: Sequence[Alternatives], otherwise: Place | None) -> Judged:
    """Return what the rules say of a list; `otherwise` is the place of what stands in no place of this file."""
    if (combinations := math.prod(map(len, slots))) > MAX_COMBINATIONS:
        place = next((p for p in map(_first_place, slots) if p is not None), otherwise)
        what = f"the alternatives make {combinations:,} combinations, and {MAX_COMBINATIONS:,} are looked at"
        return Judged((Problem(place, what, "split the profile, or leave alternatives out"),))
    reached: set[tuple[int, int]] = set()
    misplaced: dict[Problem, None] = {}
    excluded: dict[Problem, None] = {}
    for chosen in itertools.product(*(range(len(s)) for s in slots)):
        taken = [p for slot, i in zip(slots, chosen, strict=True) for p in slot[i]]
        broken = tuple(_broken(taken, otherwise))
        if not any(is_excluded for is_excluded, _ in broken):
            reached.update(enumerate(chosen))
        for is_excluded, problem in broken:
            if is_excluded:
                excluded[problem] = None
            elif combinations == 1 or not any(is_other for is_other, _ in broken):
                # An order can be broken only by steps that can occur together.
                misplaced[problem] = None
    if not reached:
        return Judged((*excluded, *misplaced, *_none_is_left(combinations, otherwise)))
    if misplaced:
        return Judged(tuple(misplaced))
    every = {(i, j) for i, slot in enumerate(slots) for j in range(len(slot))}
    return Judged((), tuple(sorted(every - reached)))


def _none_is_left(combinations: int, place: Place | None) -> Iterator[Problem]:
    if combinations > 1:
        yield Problem(place, f"of {combinations:,} combinations of alternatives none can be used")


def _broken(taken: Sequence[Placed], otherwise: Place | None) -> Iterator[tuple[bool, Problem]]:
    """Yield what speaks against these steps together: whether it excludes them, or only their order; and how it is
    told."""
    names = [p.step.name for p in taken]
    for i, placed in enumerate(taken):
        if placed.step.name in names[:i] and placed.step.name not in repeatable():
            yield True, Problem(placed.place or otherwise, f"{placed.step.name} is listed twice", "keep one of them")
    for found in findings([p.step for p in taken]):
        subject = found.subjects[-1] if found.subjects else None
        places = [p.place for p in taken if p.step.name == subject] or [None]
        what = f"{found.sentence}: {found.rule.because} (rule {found.rule.id})"
        yield found.rule.kind != "before", Problem(places[-1] or otherwise, what, found.rule.remedy)


def _first_place(slot: Alternatives) -> Place | None:
    if len(slot) == 1:
        return None
    return next((p.place for alternative in slot for p in alternative if p.place is not None), None)


def told(slots: Sequence[Alternatives], where: tuple[int, int]) -> tuple[Place | None, str]:
    """Return the place and the words of one alternative."""
    alternative = slots[where[0]][where[1]]
    place = alternative[0].place if alternative else _first_place(slots[where[0]])
    return place, listing([str(p.step) for p in alternative]) or "none"
