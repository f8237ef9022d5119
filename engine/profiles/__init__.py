"""Profiles: read, inherited, checked and found. To add a built-in one: a file in `profiles/`, named for the profile.

    places.py    the folders, and the order in which they are looked into
    raw.py       what one file says itself
    inherit.py   over its parent
    rules.py     held against the rules that need no model and no machine
    search.py    names, shadows, chains
    wording.py   in words

A broken file breaks nobody else's plan: a free search goes on without it, and `broken` says so. Its name is taken all
the same: what it shadows does not come in its place unasked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine import validation
from engine.documents import Problem
from engine.errors import ProfileError, UsageError
from engine.profiles import places, search
from engine.profiles.places import BUILT_IN, Found, Place, only
from engine.profiles.search import Entry, Search
from engine.values import Profile
from engine.words import did_you_mean, listing, shown

__all__ = [
    "BUILT_IN",
    "Examined",
    "Listed",
    "broken",
    "built_in",
    "chain",
    "examine",
    "find",
    "is_path",
    "listed",
    "load",
    "only",
    "visible",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A profile file that a search comes by: its profile, or the error that says what is wrong with it."""

    name: str
    source: str
    path: Path
    profile: Profile | None
    error: ProfileError | None
    shadows: tuple[str, ...] = ()
    """Sources of what has the same name and comes later in the search."""
    shadowed_by: str | None = None


def find(name: str) -> Profile:
    """Return a profile by its name, or by the path of its file. Raises: ProfileError."""
    if not isinstance(name, str):
        raise UsageError(f"a profile is a name or the path of a file, and not {name!r}")
    if is_path(name):
        return load(_expanded(name), name)
    made = _search()
    entry = made.lookup(name)
    if entry is not None:
        return made.profile(entry)
    is_here = name != "" and os.path.lexists(name)
    here = " (a file of that name is here: give its path, such as ./NAME.yaml)" if is_here else ""
    raise ProfileError(
        f"there is no profile {shown(name)}",
        "it is none of those that `dg-run profiles list` shows, nor the path of a .yaml file" + here,
        did_you_mean(name, made.names()),
    )


def _expanded(name: str) -> Path:
    """Return the path that is meant; as it is written where `~` is nobody's home."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib's raises there


def is_path(name: str) -> bool:
    """Whether a profile is asked for by the path of its file, and not by its name."""
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name


def load(path: Path, source: str) -> Profile:
    """Return the profile in a file. Raises: ProfileError, with file, line and column of every problem."""
    made, entry = _given(path, source)
    return made.profile(entry)


def visible(found: Sequence[Listed] | None = None) -> tuple[Profile, ...]:
    """Return every profile that a free search may use here, from the most frugal to the most lavish.

    `found` is what is listed, where it was looked for just now.
    """
    files = listed() if found is None else found
    return tuple(f.profile for f in files if f.profile is not None and f.shadowed_by is None)


def broken(found: Sequence[Listed] | None = None) -> tuple[Listed, ...]:
    """Return the files that a free search would use here and cannot, each with its error. `found` as for `visible`."""
    return tuple(f for f in (listed() if found is None else found) if f.error is not None and f.shadowed_by is None)


def built_in() -> tuple[Profile, ...]:
    """Return the shipped profiles, from the most frugal to the most lavish."""
    shipped = places.built_in()
    return tuple(f.profile for f in _listed(((shipped, places.files(shipped)),)) if f.profile is not None)


def listed() -> tuple[Listed, ...]:
    """Return everything that is in the places of a search, in the order of `visible`; the broken ones at the end."""
    return _listed(_state())


def chain(name: str) -> tuple[Profile, ...]:
    """Return a profile that is asked for by name or path, and those to go on with, in turn, when it cannot fit.

    Raises: ProfileError.
    """
    first = find(name)
    if first.fallback is None:
        return (first,)
    made, entry = _given(_expanded(name), name) if is_path(name) else (_search(), None)
    entry = entry or made.lookup(name)
    return (first,) if entry is None else (first, *(made.profile(e) for e in made.fallbacks(entry)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What is to be said of one file. Lines and columns of problems are those of `text`."""

    path: Path
    text: str
    profile: Profile | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    """What is not wrong, and surely not meant."""


def examine(path: Path) -> Examined:
    """Return everything that is to be said of a file. Raises: ProfileError, when it cannot be read."""
    made, entry = _given(path, str(path))
    result = made.result(entry)
    beside = [e.source for e in made.shelves[0] if e.name == entry.name]
    twice = Problem(entry.raw.place("name"), f"the name {entry.name!r} is also that of {listing(beside)}", "rename one")
    return Examined(
        path=path,
        text=entry.raw.document.text,
        profile=None if result.made is None or beside else result.made.profile,
        problems=tuple(validation.in_order((*result.problems, *([twice] if beside else [])))),
        warnings=tuple(validation.in_order(result.warnings)),
    )


_State = tuple[tuple[Place, tuple[Found, ...]], ...]


def _state() -> _State:
    """Return the files of every place as they are now: what is the same as before is not read again."""
    return tuple((place, places.files(place)) for place in places.order())


@lru_cache(maxsize=8)
def _searched(state: _State) -> Search:
    return Search(state)


def _search() -> Search:
    return _searched(_state())


@lru_cache(maxsize=8)
def _listed(state: _State) -> tuple[Listed, ...]:
    made = _searched(state)
    first: dict[str, Entry] = {}
    sources: dict[str, list[Entry]] = {}
    for shelf in made.shelves:
        for entry in shelf:
            first.setdefault(entry.name, entry)
            sources.setdefault(entry.name, []).append(entry)
    found = []
    for entry in (e for shelf in made.shelves for e in shelf):
        result = made.result(entry, for_name=False)
        is_first = first[entry.name].shelf == entry.shelf
        found.append(
            Listed(
                name=entry.name,
                source=entry.source,
                path=Path(entry.raw.path),
                profile=None if result.made is None else result.made.profile,
                error=search.error(entry, result.problems) if result.made is None else None,
                shadows=tuple(e.source for e in sources[entry.name] if e.shelf > entry.shelf) if is_first else (),
                shadowed_by=None if is_first else first[entry.name].source,
            )
        )
    return tuple(sorted(found, key=_order))


def _order(one: Listed) -> tuple[bool, bool, int, str, str]:
    profile = one.profile
    if profile is None:
        return True, True, 0, one.name, one.source
    match = profile.match
    return False, match.device is not None, match.free_vram_at_least_bytes or 0, one.name, one.source


def _given(path: Path, source: str) -> tuple[Search, Entry]:
    """Return a search that begins with one file, and its entry. Raises: ProfileError, when it cannot be read."""
    try:
        made = Search(_state(), places.file(path))
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        name = str(path) if len(str(path)) <= 200 and str(path).isprintable() else shown(str(path))
        raise ProfileError(
            f"{name}: the profile cannot be read",
            str(getattr(error, "strerror", None) or error),
            "`dg-run profiles list` shows those that can",
        ) from None
    assert made.given is not None
    made.given = Entry(made.given.raw, source, 0)
    return made, made.given
