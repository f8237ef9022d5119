"""What is to be drawn: prompts of a command line, of a call of the library, or of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.documents import DocumentError, read_text
from engine.errors import FileError, UsageError
from engine.units import format_size
from engine.words import did_you_mean, shown

MAX_SEED = 2**32 - 1
MAX_IMAGES = 100_000
MAX_FILE_BYTES = 64 * 1024**2
SUFFIXES = (".txt", ".jsonl")
_EMPTY_DO = 'say what to draw: --prompt "a red circle on a blue background"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt. What is None is the run's own: its seeds, its number of pictures, what it shall not draw."""

    text: str
    negative_prompt: str | None = None
    seed: int | None = None
    num_images: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"the prompt is {shown(self.text)}", "it must be text", _EMPTY_DO)
        if not self.text.strip():
            raise UsageError("the prompt is empty", do=_EMPTY_DO)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise UsageError(f"the negative prompt is {self.negative_prompt!r}", "it must be text")
        for text in (self.text, self.negative_prompt or ""):
            if "\0" in text:
                raise UsageError("the prompt has a NUL (U+0000)", "files of videos end a text there", "leave it out")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise UsageError("the prompt has half a character (a surrogate)", do="write it in UTF-8")
        check_seed(self.seed)
        check_count(self.num_images)


def check_seed(seed: int | None) -> None:
    """Raises: UsageError, for what is no seed."""
    if seed is not None and not (_is_whole(seed) and 0 <= seed <= MAX_SEED):
        raise UsageError(f"the seed is {seed!r}", f"it must be a whole number between 0 and {MAX_SEED}")


def check_count(count: int | None) -> None:
    """Raises: UsageError, for what is no number of pictures."""
    if count is not None and not (_is_whole(count) and 1 <= count <= MAX_IMAGES):
        raise UsageError(f"num_images is {count!r}", f"it must be a whole number between 1 and {MAX_IMAGES:,}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def of(given: str | Prompt | Mapping[str, Any] | Iterable[str | Prompt | Mapping[str, Any]]) -> tuple[Prompt, ...]:
    """Return prompts as they are given to the library: one or several texts, objects of a file, or `Prompt`s.

    Raises: UsageError.
    """
    if not isinstance(given, Iterable):
        raise UsageError(f"the prompts are {shown(given)}", "they must be texts, or objects with a prompt", _EMPTY_DO)
    several = [given] if isinstance(given, str | Prompt | Mapping) else list(given)
    if not several:
        raise UsageError("the prompt is empty", "there is none", _EMPTY_DO)
    return tuple(_one(each) for each in several)


def _one(given: str | Prompt | Mapping[str, Any]) -> Prompt:
    if isinstance(given, Prompt):
        return given
    return _of_object(given) if isinstance(given, Mapping) else Prompt(text=given)


_KEYS = {"prompt": "text", "negative_prompt": "negative_prompt", "seed": "seed", "num_images": "num_images"}


def _of_object(given: Mapping[str, Any]) -> Prompt:
    if unknown := [k for k in given if k not in _KEYS]:
        raise UsageError(f"a prompt has no {unknown[0]!r}", do=did_you_mean(str(unknown[0]), _KEYS))
    if "prompt" not in given:
        raise UsageError("there is no prompt", do='write {"prompt": "…"}')
    return Prompt(**{_KEYS[k]: v for k, v in given.items()})


def read(path: Path) -> tuple[Prompt, ...]:
    """Return the prompts of a file: .txt has one a line, .jsonl one object a line. Empty lines are passed over.

    Raises: UsageError, for another ending; FileError, naming the line that cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: prompts are read from {' or '.join(SUFFIXES)}",
            f"the name ends in {path.suffix or 'nothing'}",
            f"call it {path.stem or 'prompts'}.txt, with one prompt a line",
        )
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} cannot be read", "it is not a file", "give a file of prompts")
        text = read_text(path, MAX_FILE_BYTES)
    except DocumentError as error:
        told = error.told(FileError, "these prompts cannot be read")
        do = f"write them as UTF-8, at most {format_size(MAX_FILE_BYTES)} of them"
        raise FileError(told.what, told.why, told.do or do) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = str(getattr(error, "strerror", None) or error)
        raise FileError(f"{path} cannot be read", why, "give a file of prompts") from None
    is_text = path.suffix.lower() == ".txt"
    # Not `splitlines`, which breaks at characters that JSON may hold as they are (U+2028).
    lines = [(n, line.strip()) for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1)]
    found = tuple(_line(path, n, line, is_text=is_text) for n, line in lines if line)
    if not found:
        raise FileError(f"{path} has no prompts", "all of its lines are empty", "write one prompt a line")
    return found


def _line(path: Path, number: int, line: str, *, is_text: bool) -> Prompt:
    try:
        if is_text:
            return Prompt(text=line)
        value = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_once_each)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return _of_object(value)
    except UsageError as error:
        raise FileError(f"{path}:{number}: {error.what}", error.why, error.do) from None
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}:{number}: this is not a prompt as JSON", str(error), 'write {"prompt": "…"}, one a line'
        ) from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k in found if sum(k == other for other, _ in pairs) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
