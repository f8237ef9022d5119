"""The rules and facts of `schema/compatibility.yaml` as values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engine import optimizers, paths, validation
from engine.facts import tiling
from engine.values import FrozenDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A step that a rule speaks of: an optimizer, and what its parameters must be."""

    optimizer: str
    params: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        told = [f"{name}: {_told(wanted)}" for name, wanted in self.params]
        if [name for name, _ in self.params] == ["value"]:
            return f"{self.optimizer}: {told[0].removeprefix('value: ')}"
        return f"{self.optimizer} ({', '.join(told)})" if told else self.optimizer

    def conditions(self, dtype: str | None, whole_tile_px: int | None) -> tuple[Condition, ...]:
        """Return what a step's parameters must be, in a run that computes in `dtype` (None: not known).

        `whole_tile_px` is the least tile that holds the whole picture; None: not known.
        """
        return tuple((name, *_condition(wanted, dtype, whole_tile_px)) for name, wanted in self.params)


Condition = tuple[str, bool, Collection[Any]]
"""A parameter, and whether its value must be one of some or none of them. What is not given is None."""


def _condition(wanted: Any, dtype: str | None, whole_tile_px: int | None = None) -> tuple[bool, Collection[Any]]:
    if isinstance(wanted, Mapping):
        if "holds" in wanted:
            return True, () if whole_tile_px is None else frozenset(range(whole_tile_px, tiling.MOST_PX + 1))
        if "other_than" in wanted:
            return False, (None, "auto", *wanted["other_than"])
        # Unlike the dtype: named, and another; what the run itself decides is like it.
        return (True, ()) if dtype is None else (False, (None, "auto", dtype))
    return True, wanted if isinstance(wanted, tuple) else (wanted,)


def accepted(wanted: Any, value: Any, dtype: str | None) -> bool:
    """Whether a parameter's value is one that a rule asks for."""
    is_one, values = _condition(wanted, dtype)
    return (value in values) is is_one


def _told(wanted: Any) -> str:
    if isinstance(wanted, Mapping):
        ((how, what),) = wanted.items()
        if how == "holds":
            return f"as large as the {what}"
        return f"not {_told(tuple(what))}" if how == "other_than" else f"unlike the {what}"
    if isinstance(wanted, tuple):
        return " or ".join(map(_told, wanted))
    return str(wanted).lower() if isinstance(wanted, bool | None) else str(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of `rules`. What its fields mean stands at the head of the file."""

    id: str
    kind: str
    subjects: tuple[Subject, ...]
    when: Mapping[str, Any] = field(default_factory=FrozenDict)
    beside: tuple[Subject, ...] = ()
    needs: tuple[Subject, ...] = ()
    overlap: bool = False
    parameter: str | None = None
    because: str
    remedy: str
    evidence: tuple[str, ...]
    packages: tuple[str, ...] = ()
    basis: str = "shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One entry of `facts`: what holds of the libraries, and cannot be broken by a list of optimizers."""

    id: str
    about: str
    because: str
    evidence: tuple[str, ...]
    packages: tuple[str, ...] = ()
    basis: str = "shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Works:
    """The cells of the matrix in which two optimizers go together, by their column."""

    columns: tuple[str, ...]
    evidence: tuple[str, ...]
    basis: str = "shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compatibility:
    """The whole file."""

    planned: Mapping[str, Mapping[str, tuple[Any, ...]]]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    works: tuple[Works, ...]
    rules: tuple[Rule, ...]
    facts: tuple[Fact, ...]


@cache
def shipped() -> Compatibility:
    """Return what the shipped file says, in its order."""
    value = validation.value_once(paths.data_dir("schema") / "compatibility.yaml", "compatibility")
    matrix = value["matrix"]
    return Compatibility(
        planned=FrozenDict({n: FrozenDict({k: _frozen(v) for k, v in p.items()}) for n, p in value["planned"].items()}),
        rows=tuple(matrix["rows"]),
        columns=tuple(matrix["columns"]),
        works=tuple(Works(**{k: _frozen(v) for k, v in entry.items()}) for entry in matrix["works"]),
        rules=tuple(_rule(entry) for entry in value["rules"]),
        facts=tuple(Fact(**{k: _frozen(v) for k, v in entry.items()}) for entry in value["facts"]),
    )


def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in their file's order."""
    return shipped().rules


def _rule(entry: Mapping[str, Any]) -> Rule:
    given = {k: _frozen(v) for k, v in entry.items()}
    for name in ("subjects", "beside", "needs"):
        given[name] = tuple(_subject(s) for s in entry.get(name, ()))
    return Rule(**given)


def _subject(entry: str | Mapping[str, Any]) -> Subject:
    if isinstance(entry, str):
        return Subject(optimizer=entry)
    return Subject(
        optimizer=entry["optimizer"], params=tuple((n, _frozen(v)) for n, v in entry.get("params", {}).items())
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({k: _frozen(v) for k, v in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def known_params(name: str) -> Mapping[str, tuple[Any, ...] | None]:
    """Return the parameters that a rule may ask for of an optimizer, with their choices (None: any value)."""
    own = optimizers.spec(name).params if name in optimizers.NAMES else ()
    choices = {"bool": (True, False), "word": ()}
    return {p.name: p.choices or choices.get(p.kind) for p in own} | dict(shipped().planned.get(name, {}))
