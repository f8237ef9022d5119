"""Where profiles lie, and in which order they are looked for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from engine import paths

BUILT_IN = "built-in"
_SUFFIXES = (".yaml", ".yml")
# A file that was written this recently could be written again within one tick of the clock that stamps it.
_FRESH_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of profiles, and how it is told: plans and pictures carry that, so it is no longer than it must be."""

    folder: Path
    told: str

    def source(self, path: str) -> str:
        """Return how a file of this place is told."""
        return BUILT_IN if self.told == BUILT_IN else str(Path(self.told) / Path(path).name)


@dataclass(frozen=True, slots=True)
class Found:
    """A file, and what changes whenever its content does."""

    path: str
    stamp: tuple[int, ...]


_CHOSEN: ContextVar[tuple[Place, ...] | None] = ContextVar("_CHOSEN", default=None)


def built_in() -> Place:
    """Return the place of the shipped profiles."""
    return Place(paths.data_dir("profiles"), BUILT_IN)


def order() -> tuple[Place, ...]:
    """Return the places in which a name is looked for, first to last; some may not exist."""
    chosen = _CHOSEN.get()
    if chosen is not None:
        return chosen
    shipped = built_in()
    found = [Place(folder, _told(folder)) for folder in _of_the_user()]
    # In a checkout of dg-run itself ./profiles is the shipped folder.
    return (*(p for p in found if not _is_same(p.folder, shipped.folder)), shipped)


@contextlib.contextmanager
def only(folder: Path) -> Iterator[None]:
    """Look into this folder and the shipped profiles, and nowhere else: the same on every machine."""
    token = _CHOSEN.set((Place(folder, str(folder)), built_in()))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def _of_the_user() -> Iterator[Path]:
    # A current folder that was deleted, or a user without a home, is no reason not to draw.
    with contextlib.suppress(OSError):
        here = Path.cwd()
        yield here / "profiles"
        for folder in (here, *here.parents):
            project = folder / ".dg-run" / "profiles"
            if project.is_dir():
                yield project
                break
    with contextlib.suppress(RuntimeError):
        yield paths.config_dir() / "profiles"


def _told(folder: Path) -> str:
    """Return a folder from here, or from home, where it lies below them."""
    with contextlib.suppress(OSError, ValueError):
        return str(folder.relative_to(Path.cwd()))
    with contextlib.suppress(RuntimeError, ValueError):
        return str(Path("~") / folder.relative_to(Path.home()))
    return str(folder)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def files(place: Place) -> tuple[Found, ...]:
    """Return the YAML files of a place, by name; () where there is no such folder.

    What cannot be looked at (not even the folder, maybe) is among them: whoever reads it is told why.
    """
    found = []
    now = time.time_ns()
    try:
        with os.scandir(place.folder) as entries:
            for entry in entries:
                # Hidden files are an editor's; what is no file (a pipe, say) is not opened.
                if entry.name.endswith(_SUFFIXES) and entry.name[0] != ".":
                    try:
                        if entry.is_file():
                            found.append(Found(entry.path, _stamp(entry.stat(), now)))
                    except OSError:
                        found.append(Found(entry.path, (now,)))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError:
        return (Found(str(place.folder), (now,)),)
    return tuple(sorted(found, key=lambda f: f.path))


def file(path: Path) -> Found:
    """Return one file as it is now. Raises: OSError."""
    return Found(str(path), _stamp(path.stat(), time.time_ns()))


def _stamp(seen: os.stat_result, now_ns: int) -> tuple[int, ...]:
    is_fresh = now_ns - seen.st_mtime_ns < _FRESH_NS
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_size, now_ns if is_fresh else 0
