"""From a profile's file to what it says itself: its parent is not looked at, its names and values are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine import documents, optimizers, validation
from engine.documents import Document, DocumentError, Problem
from engine.errors import DgRunError
from engine.profiles.places import Found
from engine.units import parse_size
from engine.values import FrozenDict, Match, Step
from engine.words import shown

SCHEMA = "dg-run/profile@1"
# Many times what the longest of lists takes.
MAX_BYTES = 256 * 1024
MAX_VALUES = 5_000
_FAMILY = "dg-run/profile@"


@dataclass(frozen=True, slots=True)
class Placed:
    """A step, and where it stands in its file; None is in an ancestor's."""

    step: Step
    place: documents.Place | None


Alternatives = tuple[tuple[Placed, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What one file says. Where there are problems, what they speak of is missing; the rest can be judged all the same,
    for more problems, and is no profile."""

    path: str
    document: Document
    problems: tuple[Problem, ...]
    name: str
    """The file's own name where it says none that can be read."""
    values: Mapping[str, Any] = field(default_factory=FrozenDict)
    """The plain values, by key: version, summary, prefer, extends, fallback."""
    match: Match | None = None
    slots: tuple[Alternatives, ...] | None = None
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=FrozenDict)
    drops: tuple[str, ...] = ()

    @property
    def is_anothers(self) -> bool:
        """Whether this is a file of another program: of a folder that is called `profiles` too."""
        text = self.document.text
        return text != "" and not any(word in f"\n{text}" for word in ("dg-run/", "optimizers", "\nextends:"))

    def place(self, *path: str | int, key: bool = False) -> documents.Place | None:
        return self.document.place(path, key=key)


@lru_cache(maxsize=1024)
def read(found: Found) -> Raw:
    """Return what a file says. Raises: OSError. One that has not changed since is not read again."""
    path = Path(found.path)
    source, text = found.path, ""
    try:
        text = documents.read_text(path, MAX_BYTES)
        document, problems = documents.inspect(text, source, MAX_VALUES)
    except DocumentError as error:
        empty = Document(source, text or error.text, None, {}, {})
        return Raw(path=source, document=empty, problems=error.problems, name=path.stem)
    return _Reader(document, list(problems)).raw(path)


class _Reader:
    """Reads what can be read, and keeps every problem: a typo in one line hides no mistake in another."""

    def __init__(self, document: Document, problems: list[Problem]) -> None:
        self.document = document
        self.problems = problems

    def raw(self, path: Path) -> Raw:
        value = self.document.value
        told = value if isinstance(value, dict) else {}
        name = told.get("name")
        named: dict[str, Any] = {
            "path": str(path),
            "name": name if isinstance(name, str) and len(name) <= 64 else path.stem,
        }
        if (newer := self._newer(told.get("schema"))) is not None:
            # What a later version may hold is not for this one to judge.
            return Raw(document=self.document, problems=(newer,), **named)
        by_schema = validation.problems_once(self.document, "profile")
        self.problems += by_schema
        match = self._match(told["match"]) if isinstance(told.get("match"), dict) else None
        listed = told.get("optimizers")
        slots = self._slots(listed) if isinstance(listed, list) and len(listed) <= 32 else None
        self._edits(told)
        return Raw(
            document=self.document,
            problems=tuple(validation.in_order(self.problems)),
            values=FrozenDict(
                {
                    k: told[k]
                    for k in ("version", "summary", "prefer", "extends", "fallback")
                    if k in told and (told[k] is None or isinstance(told[k], str))
                }
            ),
            match=match,
            slots=slots if self._is_sound("optimizers") else None,
            edits=FrozenDict(told.get("set", {})) if self._is_sound("set") else FrozenDict(),
            drops=tuple(told.get("drop", ())) if self._is_sound("drop") else (),
            **named,
        )

    def _newer(self, schema: Any) -> Problem | None:
        """Return the problem of a format that a later dg-run brought, or None."""
        if not isinstance(schema, str) or not schema.startswith(_FAMILY):
            return None
        number = schema.removeprefix(_FAMILY)
        if not (number.isascii() and number.isdecimal() and len(number) <= 9 and int(number) > 1):
            return None
        return Problem(
            self.document.place(("schema",)),
            f"{schema} is of a newer dg-run; this one reads {SCHEMA}",
            "update dg-run, or write the profile for the older format",
        )

    def _say(self, what: str, do: str, *path: str | int) -> None:
        place = self.document.place(path)
        if not any(p.place == place for p in self.problems):  # the schema has told of it already
            self.problems.append(Problem(place, what, do))

    def _match(self, told: Mapping[str, Any]) -> Match:
        vram = self._range(told, "free_vram", self._size)
        pixels = self._range(told, "pixels", lambda value, *_: value if type(value) is int else None)
        names = {
            k: tuple(n for n in told[k] if isinstance(n, str)) if isinstance(told.get(k), list) else ()
            for k in ("gpus", "pipelines")
        }
        device = told.get("device")
        return Match(
            device=device if isinstance(device, str) else None,
            free_vram_at_least_bytes=vram[0],
            free_vram_below_bytes=vram[1],
            pixels_at_least=pixels[0],
            pixels_below=pixels[1],
            gpus=names["gpus"],
            pipelines=names["pipelines"],
        )

    def _range(
        self, told: Mapping[str, Any], key: str, read: Callable[..., int | None]
    ) -> tuple[int | None, int | None]:
        """Return the bounds of a half-open range."""
        bounds = told.get(key)
        if not isinstance(bounds, dict):
            return None, None
        low, high = (read(bounds.get(b), "match", key, b) for b in ("at_least", "below"))
        if low is not None and high is not None and low >= high:
            what = f"nothing is at least {shown(bounds['at_least'])} and below {shown(bounds['below'])}"
            self._say(what, "below must be the larger one", "match", key, "below")
        return low, high

    def _size(self, text: Any, *path: str) -> int | None:
        if not isinstance(text, str):
            return None
        try:
            return parse_size(text)
        except ValueError as error:
            self._say(str(error), "", *path)
            return None

    def _slots(self, listed: list[Any]) -> tuple[Alternatives, ...]:
        return tuple(self._slot(entry, ("optimizers", i)) for i, entry in enumerate(listed))

    def _slot(self, entry: Any, path: tuple[str | int, ...]) -> Alternatives:
        choices = entry.get("one_of") if isinstance(entry, dict) and set(entry) == {"one_of"} else None
        if not isinstance(choices, list):
            return ((step,),) if (step := self._step(entry, path)) else ((),)
        found: list[tuple[Placed, ...]] = []
        for i, choice in enumerate(choices[:32]):
            alternative = self._alternative(choice, (*path, "one_of", i))
            if [p.step for p in alternative] in [[p.step for p in other] for other in found]:
                self._say("this alternative is here twice", "keep one of them", *path, "one_of", i)
            found.append(alternative)
        return tuple(found)

    def _alternative(self, choice: Any, path: tuple[str | int, ...]) -> tuple[Placed, ...]:
        if choice == "none":
            return ()
        entries = choice[:32] if isinstance(choice, list) else [choice]
        paths = [(*path, i) for i in range(len(entries))] if isinstance(choice, list) else [path]
        return tuple(p for e, at in zip(entries, paths, strict=True) if (p := self._step(e, at)))

    def _step(self, entry: Any, path: tuple[str | int, ...]) -> Placed | None:
        """Return a step, or None where the schema says what is wrong with it."""
        name, params = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
        if not isinstance(name, str) or name not in optimizers.NAMES:
            return None
        spec = optimizers.spec(name)
        try:
            given = {"value": params} if spec.scalar and params is not None else params
            return Placed(spec.step(given if isinstance(given, dict) else None), self.document.place(path))
        except DgRunError as error:
            # The schema knows the same of every parameter, and where it stands: this is for what it cannot say.
            if not any(self._is_within(p, path) for p in self.problems):
                self._say(error.what, error.do, *path)
            return None

    def _is_sound(self, key: str) -> bool:
        """Whether nothing is wrong with what stands under a key: then it is judged, whatever is wrong elsewhere."""
        return not any(self._is_within(p, (key,)) for p in self.problems)

    def _is_within(self, problem: Problem, path: tuple[str | int, ...]) -> bool:
        within = (v for k, v in self.document.values.items() if k[: len(path)] == path)
        keys = (v for k, v in self.document.keys.items() if k[: len(path)] == path)
        return problem.place in (*within, *keys)

    def _edits(self, told: Mapping[str, Any]) -> None:
        edits, drops = told.get("set"), told.get("drop")
        if isinstance(edits, dict) and isinstance(drops, list):
            for i, name in enumerate(drops):
                if isinstance(name, str) and name in edits:
                    self._say(f"{shown(name)} is set and dropped", "leave one of them out", "drop", i)
