"""What speaks against a profile's list, on any model and any machine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from engine import compat
from engine.documents import Place, Problem
from engine.profiles import wording
from engine.profiles.raw import Alternatives, Placed
from engine.values import Step

MAX_COMBINATIONS = 4096


def findings(steps: Sequence[Step]) -> tuple[compat.Finding, ...]:
    """Return the broken rules that need no model and no machine to be broken."""
    return tuple(f for f in compat.general().findings(steps) if f.breaks)


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
    """What is wrong with a list; and, where the list is sound, the alternatives that no combination allows."""

    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def judge(slots: Sequence[Alternatives], otherwise: Place | None) -> Judged:
    """Return what the rules say of a list; `otherwise` is the place of what stands in no place of this file."""
    if (combinations := math.prod(map(len, slots))) > MAX_COMBINATIONS:
        place = next((p for p in map(_first_place, slots) if p is not None), otherwise)
        what = f"the alternatives make {combinations:,} combinations, and {MAX_COMBINATIONS:,} are looked at"
        return Judged((Problem(place, what, "split the profile, or leave alternatives out"),))
    walk = _Walk(slots, otherwise)
    walk.repeats_within_alternatives()
    if walk.excluded.problems:
        return Judged(walk.excluded.problems)  # twice in one breath is a slip, whatever else may be taken
    if combinations == 1:
        walk.end([p for (only,) in slots for p in only], (0,) * len(slots))
    else:
        walk.on([], ())
    if not walk.reached:
        problems = (*walk.excluded.problems, *walk.misplaced.problems, *_none_is_left(combinations, otherwise))
        return Judged(problems)
    if walk.misplaced.problems:
        return Judged(walk.misplaced.problems)
    every = {(i, j) for i, slot in enumerate(slots) for j in range(len(slot))}
    return Judged((), tuple(_unreachable(slots, where, otherwise) for where in sorted(every - walk.reached)))


class _Walk:
    """A walk through all combinations; steps that exclude each other are not followed further: no later one helps."""

    def __init__(self, slots: Sequence[Alternatives], otherwise: Place | None) -> None:
        self._slots = slots
        self.excluded = _Told(otherwise)
        self.misplaced = _Told(otherwise)
        self.reached: set[tuple[int, int]] = set()
        """(slot, alternative) of each that is in a combination that may be used."""

    def repeats_within_alternatives(self) -> None:
        for slot in self._slots:
            for alternative in slot:
                self.excluded.repeats(alternative)

    def on(self, taken: list[Placed], chosen: tuple[int, ...]) -> None:
        """Go on with every alternative of the next slot."""
        is_last = len(chosen) + 1 == len(self._slots)
        for j, alternative in enumerate(self._slots[len(chosen)]):
            more = [*taken, *alternative]
            if is_last:
                self.end(more, (*chosen, j))
            elif not alternative or not self._excludes(more):
                self.on(more, (*chosen, j))

    def _excludes(self, taken: Sequence[Placed]) -> bool:
        broken = [f for f in findings([p.step for p in taken]) if f.rule.kind == "excludes"]
        for found in broken:
            self.excluded.add(found, taken)
        return self.excluded.repeats(taken) or bool(broken)

    def end(self, taken: Sequence[Placed], chosen: tuple[int, ...]) -> None:
        """Judge a whole combination."""
        broken = findings([p.step for p in taken])
        is_excluded = self.excluded.repeats(taken)
        for found in broken:
            if found.rule.kind != "before":
                self.excluded.add(found, taken)
                is_excluded = True
        if not is_excluded:
            self.reached.update(enumerate(chosen))
        if not is_excluded or all(len(s) == 1 for s in self._slots):
            # An order can be broken only by steps that can occur together.
            for found in broken:
                if found.rule.kind == "before":
                    self.misplaced.add(found, taken)


class _Told:
    """Problems, each once, however many combinations have it."""

    def __init__(self, otherwise: Place | None) -> None:
        self._otherwise = otherwise
        self._by_key: dict[tuple[object, ...], Problem] = {}

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(dict.fromkeys(self._by_key.values()))

    def add(self, found: compat.Finding, taken: Sequence[Placed]) -> None:
        """Add a broken rule, at the last of the steps that it speaks of."""
        name = found.subjects[-1] if found.subjects else None
        spoken = [i for i, p in enumerate(taken) if p.step.name == name]
        key = (found.rule.id, found.subjects, *(taken[i].place for i in spoken))
        if key not in self._by_key:
            place = _last(found, taken, spoken) or self._otherwise
            what = f"{found.sentence}: {found.rule.because} (rule {found.rule.id})"
            self._by_key[key] = Problem(place, what, found.rule.remedy)

    def repeats(self, taken: Sequence[Placed]) -> bool:
        """Add what is listed twice and may not be; whether there is any."""
        names = [p.step.name for p in taken]
        if len(set(names)) == len(names):
            return False
        twice = [p for i, p in enumerate(taken) if p.step.name in names[:i] and p.step.name not in repeatable()]
        for placed in twice:
            key = (placed.step.name, place := placed.place or self._otherwise)
            if key not in self._by_key:
                self._by_key[key] = Problem(place, f"{placed.step.name} is listed twice", "keep one of them")
        return bool(twice)


def _last(found: compat.Finding, taken: Sequence[Placed], spoken: Sequence[int]) -> Place | None:
    """Return the place of the last step that a broken rule speaks of; of one that is there twice, the one too many."""
    if len(found.subjects) == 1:
        for i in spoken:
            if any(f.rule is found.rule for f in findings([p.step for p in taken[: i + 1]])):
                return taken[i].place
    return taken[spoken[-1]].place if spoken else None


def _none_is_left(combinations: int, place: Place | None) -> Iterator[Problem]:
    if combinations > 1:
        yield Problem(place, f"of {combinations:,} combinations of alternatives none can be used")


def _first_place(slot: Alternatives) -> Place | None:
    if len(slot) == 1:
        return None
    return next((p.place for alternative in slot for p in alternative if p.place is not None), None)


def _unreachable(slots: Sequence[Alternatives], where: tuple[int, int], otherwise: Place | None) -> Problem:
    alternative = slots[where[0]][where[1]]
    place = alternative[0].place if alternative else _first_place(slots[where[0]])
    words = wording.alternative(p.step for p in alternative)
    what = f"the alternative {words} can never be taken: no combination with the other steps is allowed"
    return Problem(place or otherwise, what, "leave it out, or change what it does not go with")
