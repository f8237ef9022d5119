"""Names become profiles: what shadows what, and chains of parents and fallbacks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from engine import validation
from engine.documents import Document, DocumentError, Problem
from engine.errors import ProfileError
from engine.profiles import inherit, places, rules
from engine.profiles.inherit import Made
from engine.profiles.places import BUILT_IN, Found, Place
from engine.profiles.raw import Raw, read
from engine.values import Profile
from engine.words import did_you_mean, listing, shown

MAX_ANCESTORS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was found, and where in the search: `shelf` counts the places that are looked into before it."""

    raw: Raw
    source: str
    shelf: int

    @property
    def name(self) -> str:
        return self.raw.name


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an entry: a profile, or what is wrong; and what is not wrong, and yet not meant."""

    made: Made | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


class Search:
    """The places of one search, and what is in them. What is read once is read no more; a new search sees changes."""

    def __init__(self, listed: Sequence[tuple[Place, tuple[Found, ...]]], given: Found | None = None) -> None:
        """`given` is a file that was asked for by its path: for the other names that it says, the profiles beside it
        come before all others."""
        self._listed = list(listed)
        self._results: dict[str, Result] = {}
        self.given: Entry | None = None
        if given is not None:
            folder = Path(given.path).parent
            real = os.path.realpath(folder)
            self._listed = [(p, f) for p, f in self._listed if os.path.realpath(p.folder) != real]
            self._listed.insert(0, (Place(folder, str(folder)), ()))
            self.given = Entry(read(given), given.path, 0)

    @cached_property
    def shelves(self) -> tuple[tuple[Entry, ...], ...]:
        """The entries of each place."""
        found = []
        for i, (place, files) in enumerate(self._listed):
            if i == 0 and self.given is not None:
                own = os.path.normpath(self.given.raw.path)
                entries = _entries(place, places.files(place), i)
                found.append(tuple(e for e in entries if os.path.normpath(e.raw.path) != own))
            else:
                found.append(_entries(place, files, i))
        return tuple(found)

    @cached_property
    def _by_name(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for shelf in self.shelves:
            for entry in shelf:
                found.setdefault(entry.name, []).append(entry)
        return found

    def candidates(self, name: str, after: int = -1) -> Iterator[Entry]:
        """Yield the entries of a name in the order of the search, from the place behind `after` on."""
        if self.given is not None and after < 0 and self.given.name == name:
            yield self.given
        yield from (e for e in self._by_name.get(name, ()) if e.shelf > after)

    def lookup(self, name: str, entry: Entry | None = None) -> Entry | None:
        """Return what a name means; within a profile its own name means the next profile of that name."""
        after = entry.shelf if entry is not None and entry.name == name else -1
        return next(self.candidates(name, after), None)

    def names(self) -> list[str]:
        return list(self._by_name)

    def result(self, entry: Entry, *, for_name: bool = True) -> Result:
        """Return an entry's profile with everything that is to be said against it.

        What is wrong within the files of its fallbacks counts where it is asked for by name (`for_name`): a free search
        goes by no fallbacks, and a broken file there breaks nobody else.
        """
        made = self._made(entry)
        problems = (*made.problems, *self._twice(entry), *self._fallback(entry, made.made, for_name=for_name))
        if not problems:
            return made
        return Result(None, tuple(validation.in_order(problems)))

    def profile(self, entry: Entry) -> Profile:
        """Return an entry's profile. Raises: ProfileError, with all its problems."""
        result = self.result(entry)
        if result.made is None:
            raise error(entry, result.problems)
        return result.made.profile

    def fallbacks(self, entry: Entry) -> Iterator[Entry]:
        """Yield the entries that an entry falls back to, one after the other, as far as they are there; each once."""
        seen = {entry.raw.path}
        at = entry
        while (made := self._made(at).made) is not None and made.profile.fallback is not None:
            found = self.lookup(made.profile.fallback)
            if found is None:
                return
            yield found
            if found.raw.path in seen:
                return
            seen.add(found.raw.path)
            at = found

    def _made(self, entry: Entry) -> Result:
        """Return an entry's profile, its fallback not looked at."""
        key = entry.raw.path
        if key not in self._results:
            self._results[key] = self._make(entry)
        return self._results[key]

    def _make(self, entry: Entry) -> Result:
        raw = entry.raw
        name = raw.values.get("extends")
        place = raw.place("optimizers", key=True) if name is None else raw.place("extends")
        made, edits = None, inherit.Edits()
        problems = list(raw.problems)
        if name is None:
            made = inherit.alone(raw, entry.source) if raw.slots is not None else None
        else:
            parent, problem = self._parent(entry, name)
            problems += [] if problem is None else [problem]
            if parent is not None:
                made, edits = inherit.child(raw, entry.source, parent)
                problems += edits.problems
        if made is None or edits.problems:
            return Result(None, tuple(problems))
        judged = rules.judge(made.slots, place)
        problems += judged.problems
        return Result(None if problems else made, tuple(problems), (*edits.warnings, *judged.warnings))

    def _parent(self, entry: Entry, name: str) -> tuple[Made | None, Problem | None]:
        place = entry.raw.place("extends")
        chain = [entry]
        while (above := chain[-1].raw.values.get("extends")) is not None:
            found = self.lookup(above, chain[-1])
            if found is None:
                break
            chain.append(found)
            if found.raw.path == entry.raw.path:
                return None, Problem(place, f"it extends itself: {_arrows(chain)}", "end the chain somewhere")
            if found.raw.path in [e.raw.path for e in chain[:-1]]:
                break  # a ring further up: the parent is told to be wrong, and why
            if len(chain) > MAX_ANCESTORS:
                return None, Problem(place, f"there are more than {MAX_ANCESTORS} profiles above this one")
        if len(chain) == 1:
            known = [n for n in self.names() if n != entry.name]
            return None, Problem(place, f"there is no profile {shown(name)} to extend", did_you_mean(name, known))
        result = self._made(chain[1])
        if result.made is None:
            return None, Problem(place, _not_valid("parent", chain[1], result.problems))
        return result.made, None

    def _fallback(self, entry: Entry, made: Made | None, *, for_name: bool) -> Iterator[Problem]:
        """Yield what is wrong with the chain of fallbacks."""
        name = made.profile.fallback if made is not None else entry.raw.values.get("fallback")
        if name is None:
            return
        own = "fallback" in entry.raw.values
        place = entry.raw.place("fallback" if own else "extends")
        if name == entry.name:
            yield Problem(place, "it falls back to itself", "" if own else "write `fallback: null`, or another one")
            return
        first = self.lookup(name)
        if first is None:
            known = [n for n in self.names() if n != entry.name]
            yield Problem(place, f"there is no profile {shown(name)} to fall back to", did_you_mean(name, known))
            return
        seen = [entry]
        for found in self.fallbacks(entry) if made is not None else [first]:
            seen.append(found)
            if found.raw.path in [e.raw.path for e in seen[:-1]]:
                yield Problem(place, f"the fallbacks go round: {_arrows(seen)}", "end the chain somewhere")
                return
            if (result := self._made(found)).made is None:
                if for_name:
                    yield Problem(place, _not_valid("fallback", found, result.problems))
                return
        last = self._made(seen[-1]).made
        if last is not None and last.profile.fallback is not None and len(seen) > 1:
            what = f"there is no profile {shown(last.profile.fallback)}, which {seen[-1].name} falls back to"
            yield Problem(place, what)

    def _twice(self, entry: Entry) -> Iterator[Problem]:
        """Yield that another file of the same place has the same name: which of them is meant nobody can know."""
        if entry is self.given:
            return
        same = self._by_name.get(entry.name, ())
        others = [e.source for e in same if e.shelf == entry.shelf and e is not entry]
        if others:
            what = f"the name {shown(entry.name)} is also that of {listing(others)}"
            yield Problem(entry.raw.place("name"), what, "rename one of them")


def error(entry: Entry, problems: Sequence[Problem]) -> ProfileError:
    """Return the error that tells of an entry's problems."""
    document = entry.raw.document
    told = DocumentError(document.source, document.text, problems).told(ProfileError, "this is not a valid profile")
    assert isinstance(told, ProfileError)
    return told


@lru_cache(maxsize=64)
def _entries(place: Place, files: tuple[Found, ...], shelf: int) -> tuple[Entry, ...]:
    return tuple(_each(place, files, shelf))


def _each(place: Place, files: Sequence[Found], shelf: int) -> Iterator[Entry]:
    for found in files:
        try:
            raw = read(found)
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError as refused:
            problem = Problem(None, f"it cannot be read: {refused.strerror or refused}")
            empty = Document(found.path, "", None, {}, {})
            raw = Raw(path=found.path, document=empty, problems=(problem,), name=Path(found.path).stem)
        if not raw.is_anothers:
            yield Entry(raw, place.source(found.path), shelf)


def _not_valid(role: str, entry: Entry, problems: Sequence[Problem]) -> str:
    first = problems[0]
    where = entry.raw.path if first.place is None else f"{entry.raw.path}:{first.place.line}:{first.place.column}"
    return f"its {role} {entry.name} is not valid: {where}: {first.what}"


def _arrows(chain: Sequence[Entry]) -> str:
    """Return a chain by its names, and by its sources where one name occurs twice within it."""
    names = [e.name for e in chain]
    is_ambiguous = len({e.raw.path for e in chain}) > len(set(names))
    return " → ".join(f"{e.name} ({e.source})" if is_ambiguous and e.source != BUILT_IN else e.name for e in chain)
