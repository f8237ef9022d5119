"""What the rules say of a list of optimizers.

A solver asks this of thousands of lists under the same facts. So `under` strikes out the rules whose `when` does not
hold: once those that no dtype makes hold, and for every dtype those that it decides. The others are kept by the
optimizer without which they say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from engine import optimizers
from engine.compat import when
from engine.compat.rules import Condition, Rule, rules
from engine.compat.when import Facts
from engine.errors import IncompatibleError
from engine.values import Step
from engine.words import listing

BREAKING = ("excludes", "before", "requires")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that speaks of the list at hand, and the optimizers in the list that it speaks of."""

    rule: Rule
    subjects: tuple[str, ...]

    @property
    def breaks(self) -> bool:
        """Whether the list cannot be used; otherwise it is a thing to know."""
        return self.rule.kind in BREAKING

    @property
    def is_idle(self) -> bool:
        """Whether the subjects do nothing at all here, so that a run without them is the same run."""
        return self.rule.kind == "no_effect" and self.rule.parameter is None

    @property
    def sentence(self) -> str:
        """What is said of the list, in one clause."""
        told = listing(self.subjects)
        match self.rule.kind:
            case "excludes" if len(self.subjects) == 1:
                return f"{told} cannot be there twice"
            case "excludes":
                return f"{told} cannot be combined"
            case "before":
                return f"{self.subjects[0]} must come before {self.subjects[1]}"
            case "requires" if self.rule.needs:
                return f"{told or 'this model'} needs {listing((str(s) for s in self.rule.needs), 'or')}"
            case "requires":
                return f"{told} cannot be used here"
            case "degrades":
                return f"{told} works here at a price"
        return f"{f'{self.rule.parameter} of ' if self.rule.parameter else ''}{told} will have no effect"


def under(facts: Facts) -> Applicable:
    """Return the rules that can speak under these facts."""
    return Applicable(facts)


@cache
def general() -> Applicable:
    """Return the rules that can speak of any model on any machine."""
    return under(Facts(libraries=when.installed()))


def refusal(broken: Sequence[Finding]) -> IncompatibleError:
    """Return the error that names every broken rule."""
    return IncompatibleError(
        "; ".join(dict.fromkeys(f.sentence for f in broken)),
        "; ".join(dict.fromkeys(f"{f.rule.because} (rule {f.rule.id})" for f in broken)),
        "; ".join(dict.fromkeys(f.rule.remedy for f in broken)),
    )


class Applicable:
    """The rules whose `when` holds, ready to be asked of one list after another."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._rules = tuple((i, r) for i, r in enumerate(rules()) if when.may_hold(r.when, facts))
        self._by_dtype: dict[str | None, _Table] = {}

    def findings(self, steps: Sequence[Step]) -> tuple[Finding, ...]:
        """Return every rule that speaks of these steps, in this order."""
        dtype: str | None = "float32"  # as the library loads where nothing is said
        named: dict[str, list[tuple[int, Step]]] = {}
        shared = False
        for i, step in enumerate(steps):
            if step.name == "dtype":
                dtype = None if step.params["value"] == "auto" else step.params["value"]
            if step.params and step.params.get("components") is not None:
                shared = True
            named.setdefault(step.name, []).append((i, step))
        table = self._by_dtype.get(dtype)
        if table is None:
            table = self._by_dtype[dtype] = _Table(self._rules, self.facts, dtype)
        found: dict[int, tuple[str, ...]] = {}
        for rule in table.always:
            if subjects := rule.speaks(named, steps if shared else None):
                found[rule.position] = subjects
        for name in named:
            for rule in table.by_name.get(name, ()):
                if rule.partners is not None and rule.partners.isdisjoint(named):
                    continue
                if subjects := rule.speaks(named, steps if shared else None):
                    found[rule.position] = subjects
        if not found:
            return ()
        return tuple(_finding(position, found[position]) for position in sorted(found))


@cache
def _finding(position: int, subjects: tuple[str, ...]) -> Finding:
    return Finding(rule=rules()[position], subjects=tuple(n for n in subjects if n))


class _Table:
    """The rules whose `when` holds for one dtype."""

    def __init__(self, speaking: Sequence[tuple[int, Rule]], facts: Facts, dtype: str | None) -> None:
        """`speaking` are rules that may hold under these facts, each with its position among all."""
        self.always: list[_Active] = []
        self.by_name: dict[str, list[_Active]] = {}
        whole_tile_px = None if facts.model is None else facts.model.whole_tile_px(facts.height, facts.width)
        for position, rule in speaking:
            if not when.holds_in(rule.when, facts, dtype):
                continue
            wanted = rule.when.get("component")
            names = None if wanted is None else when.components(wanted, facts.model)
            active = _Active(position, rule, names, dtype, whole_tile_px)
            if not rule.subjects:
                self.always.append(active)
            for name in active.triggers:
                self.by_name.setdefault(name, []).append(active)


_Named = Mapping[str, Sequence[tuple[int, Step]]]
_Subject = tuple[str, tuple[Condition, ...]]


class _Active:
    """One rule whose `when` holds. `components` are those that it holds for; None is the pipeline as a whole."""

    def __init__(
        self,
        position: int,
        rule: Rule,
        components: frozenset[str] | None,
        dtype: str | None,
        whole_tile_px: int | None,
    ) -> None:
        self.position = position
        self.rule = rule
        self.components = components
        names = dict.fromkeys(s.optimizer for s in rule.subjects)
        # Without its first subject an order says nothing, and without all but the last an exclusion of many does.
        few = {"before": 1, "excludes": max(1, len(names) - 1)}.get(rule.kind, len(names))
        self.triggers = tuple(names)[:few]
        self.partners = self._partners()
        self._subjects, self._beside, self._needs = (
            tuple((s.optimizer, s.conditions(dtype, whole_tile_px)) for s in subjects)
            for subjects in (rule.subjects, rule.beside, rule.needs)
        )
        self._pairs = tuple(combinations(self._subjects, 2))
        self.speaks = {"excludes": self._excludes, "before": self._before}.get(rule.kind, self._alone)

    def _partners(self) -> frozenset[str] | None:
        """Return names of which one must be in a list too, beside a trigger; None where none must."""
        if self.rule.beside:
            return frozenset(s.optimizer for s in self.rule.beside)
        names = [s.optimizer for s in self.rule.subjects]
        return frozenset(names[1:]) if self.rule.kind in ("excludes", "before") else None

    def _meant(self, subject: _Subject, named: _Named, shared: Sequence[Step] | None) -> Sequence[tuple[int, Step]]:
        name, conditions = subject
        found = named.get(name, ())
        if found and conditions:
            found = [f for f in found if _are_met(conditions, f[1].params)]
        if found and shared is not None and self.components is not None:
            found = [f for f in found if self.components & _held(f[1], shared, self.components)]
        return found

    def _alone(self, named: _Named, shared: Sequence[Step] | None) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        for subject in self._subjects:
            if subject[0] not in found and self._meant(subject, named, shared):
                found = (*found, subject[0])
        if self._subjects and not found:
            return ()
        if self._beside and not any(self._meant(s, named, shared) for s in self._beside):
            return ()
        if self._needs and any(self._meant(s, named, shared) for s in self._needs):
            return ()
        return found or ("",)  # a rule without subjects speaks of the pipeline

    def _excludes(self, named: _Named, shared: Sequence[Step] | None) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for first, second in self._pairs:
            if second[0] not in named or first[0] not in named:
                continue
            others = self._meant(second, named, shared)
            for i, a in self._meant(first, named, shared) if others else ():
                for j, b in others:
                    if i != j and (not self.rule.overlap or _overlap(a, b)):
                        found |= {a.name: None, b.name: None}
        return tuple(found)

    def _before(self, named: _Named, shared: Sequence[Step] | None) -> tuple[str, ...]:
        first, *later = self._subjects
        for i, a in self._meant(first, named, shared):
            for other in later:
                if other[0] not in named:
                    continue
                for j, b in self._meant(other, named, shared):
                    if j < i:
                        return a.name, b.name
        return ()


def _are_met(conditions: tuple[Condition, ...], params: Mapping[str, Any]) -> bool:
    for name, is_one, values in conditions:  # noqa: SIM110 (a generator takes twice as long, a thousand times)
        if (params.get(name) in values) is not is_one:
            return False
    return True


def _overlap(a: Step, b: Step) -> bool:
    """Whether two placements are known to hold a component both: a name, or what nobody names."""
    one, other = a.params.get("components"), b.params.get("components")
    if isinstance(one, str) or isinstance(other, str):  # left open
        return False
    if one is None or other is None:
        return one is other
    return not set(one).isdisjoint(other)


@cache
def _placements() -> frozenset[str]:
    return frozenset(s.name for s in optimizers.specs() if s.is_placement)


def _held(step: Step, steps: Sequence[Step], components: frozenset[str]) -> frozenset[str]:
    """Return those of some components that a step holds: its own; for a placement without any, what is left."""
    own = step.params.get("components")
    if isinstance(own, str):  # left open: nothing is known to be held
        return frozenset()
    if own is not None:
        return components & frozenset(own)
    if step.name not in _placements():
        return components
    others = (s.params.get("components") for s in steps if s.name in _placements())
    return components.difference(*(o for o in others if o is not None and not isinstance(o, str)))
