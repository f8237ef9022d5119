"""Locks on disk: read with a sentence for whatever is wrong, written whole or not at all, and over locks only."""

from __future__ import annotations

import os
from pathlib import Path

from engine import documents, files, lock
from engine.documents import DocumentError
from engine.errors import DgRunError, FileError, UsageError
from engine.lock import Lock
from engine.plan import Plan

SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}


def kind_of(path: Path) -> str:
    """Return "yaml" or "json" by a file's name. Raises: UsageError."""
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"{path}: a lock is YAML or JSON, by its name",
            f"the name ends in {path.suffix or 'nothing'}",
            f"call it {path.stem or 'plan'}.yaml, or {path.stem or 'plan'}.json",
        )
    return kind


def read(path: str | os.PathLike[str]) -> Lock:
    """Return the lock in a file. Raises: UsageError, for another ending; FileError, when it cannot be used."""
    where = Path(path)
    kind = kind_of(where)
    return lock.parse(_text(where), str(where), kind)


def _text(where: Path) -> str:
    try:
        if where.exists() and not where.is_file():
            what = "a directory" if where.is_dir() else "not a file"  # a pipe would be waited for
            raise FileError(f"{where}: the lock cannot be read", f"that is {what}", "give the file that --lock wrote")
        return documents.read_text(where)
    except DocumentError as error:
        raise lock.damaged(error) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = str(getattr(error, "strerror", None) or error)
        raise FileError(f"{where}: the lock cannot be read", why, "give the file that --lock wrote") from None


def check_place(path: Path) -> None:
    """Return when a lock can be written there, as far as can be seen: only a lock is replaced.

    Called before the work. Raises: UsageError, FileError.
    """
    kind_of(path)
    try:
        _look_at(path)
    except OSError as error:  # a name that is too long
        why = str(error.strerror or error)
        raise FileError(f"{path} cannot be written", why, "give another place with --lock") from None


def _look_at(path: Path) -> None:
    folder, do = path.parent, "give another place with --lock"
    if path.is_dir():
        raise FileError(f"{path} is a directory", do=f"give a file, such as {path / 'plan.yaml'}")
    if not folder.is_dir():
        why = "that is no directory" if folder.exists() else "it does not exist"
        raise FileError(f"{path} cannot be written: {folder}", why, "give a place in a directory that is there")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise FileError(f"{path} cannot be written", "permission denied", do)
    if path.exists() and not _is_lock(path):
        raise FileError(f"{path} is there, and is not a lock", "only a lock is replaced by a lock", do)


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock, be it edited or of another version: or empty, so that nothing is lost with it."""
    try:
        text = _text(path)
        if not text.strip():
            return True
        kind = kind_of(path)
        value = (documents.parse_json(text, "") if kind == "json" else documents.parse(text, "")).value
    except (DgRunError, DocumentError):
        return False
    return isinstance(value, dict) and str(value.get("schema", "")).startswith(lock.FAMILY)


def write(plan: Plan, path: str | os.PathLike[str]) -> Lock:
    """Write the lock of a plan, whole or not at all, and return it. Raises: UsageError, FileError, and as `lock.of`."""
    where = Path(path)
    check_place(where)
    kind, made = kind_of(where), lock.of(plan)
    text = made.text(kind)
    try:
        is_read_again = lock.parse(text, str(where), kind) == made
    except FileError:
        is_read_again = False
    if not is_read_again:
        # A lock that would be refused is not written: a number or a nesting that documents do not take.
        raise UsageError(
            "the plan cannot be locked", "an argument of the call would not be read again as it is", "give plain values"
        )
    try:
        files.publish(where, text)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{where} cannot be written",
            str(getattr(error, "strerror", None) or error),
            "give another place with --lock",
        ) from None
    return made
