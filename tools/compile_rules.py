"""The rules that need to know of no model and no machine, as JSON Schema: for whoever types a profile.

A list of steps is refused where two steps exclude each other, where one cannot be used at all, or needs another that is
nowhere in the list; and a choice is refused of which every alternative is excluded by a step that is always there.
Order stays with `engine.profiles`: JSON Schema has no word for it. So do conditions that a schema cannot see, such as
whether two placements name one component both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from engine import compat, optimizers
from engine.compat import Rule, Subject
from engine.compat.rules import accepted
from engine.words import listing

Schema = dict[str, Any]
NAME = "goes_together"


def definitions(rules: Sequence[Rule] | None = None) -> dict[str, Schema]:
    """Return definitions, of which `NAME` is what a list of steps is held against."""
    return _Compiler(compat.rules() if rules is None else rules).made


class _Compiler:
    def __init__(self, rules: Sequence[Rule]) -> None:
        self.made: dict[str, Schema] = {NAME: {}}
        compiled = [r for r in rules if _is_compiled(r)]
        found = [f for rule in compiled for f in self._fragments(rule)]
        found += self._choices([r for r in compiled if r.kind == "excludes"])
        self.made[NAME] |= {
            "description": "steps that go together, as far as their names and parameters tell",
            "if": {"type": "array"},
            "then": {"allOf": found} if found else {},
        }

    def _fragments(self, rule: Rule) -> Iterator[Schema]:
        if rule.kind == "excludes":
            for first, second in combinations(rule.subjects, 2):
                yield self._pair(rule, first, second)
            return
        for subject in rule.subjects:
            name = subject.optimizer
            if not rule.needs:
                told = _told(f"{name} cannot be used here", rule, rule.remedy)
                yield {"items": {"not": self._step(subject), **told}}
                continue
            told = _told(f"{name} needs {listing(map(str, rule.needs), 'or')}", rule, rule.remedy)
            lacks = {"not": {"contains": self._anywhere(rule.needs)}}
            yield {"if": {"allOf": [{"contains": self._step(subject)}, lacks]}, "then": {"not": {}, **told}}

    def _pair(self, rule: Rule, first: Subject, second: Subject) -> Schema:
        one, other = first.optimizer, second.optimizer
        if one == other:
            told = _told(f"{one} cannot be there twice", rule, rule.remedy)
            return {"not": {"contains": self._step(first, rule), "minContains": 2}, **told}
        told = _told(f"{one} and {other} cannot be combined", rule, f"not beside {one}: {rule.remedy}")
        return {
            "if": {"contains": self._step(first, rule)},
            "then": {"items": {"not": self._step(second, rule), **told}},
        }

    def _choices(self, rules: Sequence[Rule]) -> Iterator[Schema]:
        """Yield, for each step that may always be there, that a choice must have an alternative beside it."""
        excluded: dict[str, dict[str, Rule]] = {}
        names: dict[str, str] = {}
        for rule in rules:
            for first, second in combinations(rule.subjects, 2):
                if first.optimizer != second.optimizer:
                    for one, other in ((first, second), (second, first)):
                        ref = self._step(one, rule)["$ref"]
                        names[ref] = one.optimizer
                        excluded.setdefault(ref, {})[self._step(other, rule)["$ref"]] = rule
        for ref, others in excluded.items():
            ids = listing(dict.fromkeys(rule.id for rule in others.values()))
            choice = self._choice({"items": _within([{"$ref": other} for other in others])})
            yield {
                "if": {"contains": {"$ref": ref}},
                "then": {
                    "items": {
                        # Within `allOf`, so that the place is the choice's, and not that of its one word.
                        "not": {"allOf": [choice]},
                        "$comment": f"none of these can be combined with {names[ref]} (rules {ids})",
                        "errorMessage": f"add an alternative that goes with {names[ref]}, or leave that out",
                    }
                },
            }

    def _anywhere(self, subjects: Sequence[Subject]) -> Schema:
        """A step of the list, or one in some alternative of a choice."""
        steps = [self._step(s) for s in subjects]
        return {"anyOf": [*steps, self._choice({"contains": _within(steps)})]}

    @staticmethod
    def _choice(alternatives: Schema) -> Schema:
        return {"type": "object", "required": ["one_of"], "properties": {"one_of": alternatives}}

    def _step(self, subject: Subject, rule: Rule | None = None) -> Schema:
        """Return a reference to what a step is that a rule speaks of.

        Of placements that exclude each other where they hold the same, those that name no components hold what is left;
        of those that name some a schema says nothing.
        """
        rest = rule is not None and rule.overlap
        words = [subject.optimizer, *(f"{n}_{v}" for n, v in subject.params), *(["rest"] if rest else [])]
        name = "_".join(c if c.isalnum() else "_" for c in "is " + " ".join(words)).replace("__", "_").strip("_")
        name = name.lower()
        self.made.setdefault(name, _step(subject, rest))
        return {"$ref": f"#/$defs/{name}"}


def _is_compiled(rule: Rule) -> bool:
    """Whether a rule can be said of a list alone, and of optimizers that a profile may name."""
    subjects = (*rule.subjects, *rule.needs)
    return (
        rule.kind in ("excludes", "requires")
        and not rule.when
        and bool(rule.subjects)
        and all(s.optimizer in optimizers.NAMES and _is_seen(s) for s in subjects)
    )


def _is_seen(subject: Subject) -> bool:
    """Whether the conditions of a subject can be seen in the step itself."""
    own = {p.name for p in optimizers.spec(subject.optimizer).params}
    return all(name in own and not {"unlike", "holds"}.intersection(_forms(wanted)) for name, wanted in subject.params)


def _forms(wanted: Any) -> tuple[str, ...]:
    return tuple(wanted) if isinstance(wanted, dict) else ()


def _within(steps: Sequence[Schema]) -> Schema:
    """An alternative that is one of some steps, or a list that holds one."""
    return {"anyOf": [*steps, {"type": "array", "contains": {"anyOf": list(steps)}}]}


def _told(sentence: str, rule: Rule, remedy: str) -> Schema:
    """What a person is shown: `$comment` by dg-run, `errorMessage` by dg-run and by editors."""
    return {"$comment": f"{sentence}: {rule.because} (rule {rule.id})", "errorMessage": remedy}


def _step(subject: Subject, rest: bool) -> Schema:
    """Return the schema of a step: its name alone counts where its defaults are meant."""
    spec = optimizers.spec(subject.optimizer)
    defaults = {p.name: p.default for p in spec.params}
    wanted = {name: _value(value) for name, value in subject.params}
    others = [name for name, value in subject.params if not accepted(value, defaults[name], None)]
    written: Schema = {}
    if spec.scalar and wanted:
        written = wanted["value"]
    elif wanted:
        written = {"properties": wanted}
    if others and not spec.scalar:
        written["required"] = others
    if rest:
        written["not"] = {"required": ["components"]}
    named: Schema = {"type": "object", "required": [spec.name]}
    if written:
        named["properties"] = {spec.name: written}
    return {"anyOf": [*([] if others else [{"const": spec.name}]), named]}


def _value(wanted: Any) -> Schema:
    """Return the schema of a parameter's value; what is left open is neither one nor another."""
    if isinstance(wanted, dict):
        return {"not": {"enum": [*wanted["other_than"], "auto", None]}}
    return {"enum": list(wanted) if isinstance(wanted, tuple) else [wanted]}
