"""Where the outputs of a run go: to files of their own, or numbered into a folder, where a run goes on that ended."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.errors import FileError
from engine.plan import Plan
from engine.run import items, media, output
from engine.run.items import Call, Item

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.run.media import Video

FOLDER = Path("outputs")
_LOCK = ".dg-run.lock"
# As `media.write` and `preview` name what is not there yet, of outputs that `Folder` numbers.
_UNFINISHED = re.compile(r"\.\d{4,}-\d+(\.broken|\.preview)?\.(png|mp4)\.[0-9a-f]{8}\.tmp|\d{4,}-\d+\.preview\.png")


class Place(Protocol):
    """Where outputs go."""

    folder: Path
    goes_on: bool
    """Whether a run goes on there that ended before its end."""

    def check(self, plan: Plan, wanted: Sequence[Call]) -> None:
        """Return when all of them can be written. Raises: FileError."""

    def missing(self, plan: Plan, wanted: Sequence[Call]) -> tuple[Call, ...]:
        """Return the calls of which an output is not there yet. Raises: FileError, where another's is in its place."""

    def save(self, made: Image | Video, item: Item, plan: Plan, *, is_broken: bool = False) -> Path | None:
        """Write an output and return where it is; None where it was there. Raises: FileError.

        One that is broken is kept under another name: a run that goes on makes it again.
        """

    def path(self, item: Item) -> Path:
        """Return where an output goes."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from the place for the run. Raises: FileError, when somebody else has it."""


class Files:
    """The file that was asked for, numbered where there are several, or new names in `outputs/`."""

    goes_on = False

    def __init__(self, asked: Path | None, count: int, seed: int, suffix: str) -> None:
        self._is_new = asked is None
        base = _unused(FOLDER / f"{seed}{suffix}", count) if asked is None else asked
        self.paths = [base] if count == 1 else [base.with_stem(f"{base.stem}-{k}") for k in range(1, count + 1)]
        self.folder = base.parent

    def path(self, item: Item) -> Path:
        return self.paths[item.number]

    def check(self, plan: Plan, wanted: Sequence[Call]) -> None:
        output.check(self.paths, plan)

    def missing(self, plan: Plan, wanted: Sequence[Call]) -> tuple[Call, ...]:
        return tuple(wanted)

    def save(self, made: Image | Video, item: Item, plan: Plan, *, is_broken: bool = False) -> Path | None:
        path = self.path(item)
        place = _of_broken(path) if is_broken else path
        return output.save(made, place, output.record(plan, item), is_new=self._is_new)

    def held(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _unused(base: Path, count: int) -> Path:
    """Return `base`, or the first of its numbered neighbours whose files do not exist: nothing is written over."""
    tried, n = base, 1
    while any(tried.parent.glob(f"{tried.stem}-*{base.suffix}" if count > 1 else tried.name)):
        tried, n = base.with_stem(f"{base.stem}_{n}"), n + 1
    return tried


def _of_broken(path: Path) -> Path:
    return path.with_stem(f"{path.stem}.broken")


class Folder:
    """A folder with an output a number and seed, as `0007-42.png`. What is there is left as it is."""

    goes_on = True

    def __init__(self, folder: Path, count: int, suffix: str) -> None:
        self.folder, self._suffix = folder, suffix
        self._digits = max(4, len(str(count)))

    def path(self, item: Item) -> Path:
        """Return where an output goes."""
        return self.folder / f"{item.number + 1:0{self._digits}}-{item.seed}{self._suffix}"

    def check(self, plan: Plan, wanted: Sequence[Call]) -> None:
        if wanted:
            output.check([self.path(i) for c in wanted for i in c.items if not self.path(i).exists()], plan)

    def missing(self, plan: Plan, wanted: Sequence[Call]) -> tuple[Call, ...]:
        # A call is made again as a whole, and what is there is not written again: so each output is the one that it
        # would have been without the interruption, whatever it was drawn beside.
        there = {i.number for c in wanted for i in c.items if self._is_there(plan, i)}
        return tuple(c for c in wanted if not there.issuperset(i.number for i in c.items))

    def _is_there(self, plan: Plan, item: Item) -> bool:
        path = self.path(item)
        if not path.exists():
            return False
        try:
            said = media.read_record(path).get("item")
        except FileError as error:
            raise FileError(
                f"{path} is there, and nobody can say what it is", error.what, "move it away, or give another --output"
            ) from None
        if said != items.identity(plan.request, item):
            raise FileError(
                f"{path} is there, and is of another run",
                "it has this number and seed, and was made for another prompt, size, picture, LoRA or model",
                "give another folder with --output, or another --seed",
            )
        return True

    def save(self, made: Image | Video, item: Item, plan: Plan, *, is_broken: bool = False) -> Path | None:
        path = self.path(item)
        if is_broken:
            return output.save(made, _of_broken(path), output.record(plan, item))
        return None if path.exists() else output.save(made, path, output.record(plan, item))

    def _tidy(self) -> None:
        """Remove what a run was writing when it was killed: nobody else writes here now."""
        with contextlib.suppress(OSError):
            for left in [f for f in self.folder.iterdir() if _UNFINISHED.fullmatch(f.name)]:
                left.unlink()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise FileError(
                f"another dg-run is writing into {self.folder}",
                f"it holds {self.folder / _LOCK}",
                "wait for it, or give another folder with --output",
            ) from None
        except FileExistsError:
            raise FileError(
                f"{self.folder} is no folder", "a file of that name is there", "give another place with --output"
            ) from None
        except OSError as error:
            raise FileError(
                f"{self.folder} cannot be written", str(error.strerror or error), "give another place with --output"
            ) from None
        try:
            self._tidy()
            yield
        finally:
            # While it is held: whoever takes a lock looks whether its file is still the one of that name.
            with contextlib.suppress(OSError):
                (self.folder / _LOCK).unlink()
            lock.release()
