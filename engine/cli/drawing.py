"""A drawing on disk: its place is looked at before the work, and it is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from engine import files
from engine.errors import FileError, UsageError

SUFFIX = ".svg"


def check(path: Path) -> None:
    """Return when a drawing can be written there, as far as can be seen. Raises: UsageError, FileError."""
    if path.suffix.lower() != SUFFIX:
        raise UsageError(
            f"{path}: a timeline is drawn as SVG",
            f"the name ends in {path.suffix or 'nothing'}",
            f"call it {path.stem or 'timeline'}{SUFFIX}",
        )
    if path.is_dir():
        raise FileError(f"{path} is a directory", do=f"give a file, such as {path / 'timeline.svg'}")
    folder = path.parent
    if not folder.is_dir():
        why = "that is no directory" if folder.exists() else "it does not exist"
        raise FileError(f"{path} cannot be written: {folder}", why, "give a place in a directory that is there")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise FileError(f"{path} cannot be written", "permission denied", "give another place with --timeline")


def write(path: Path, text: str) -> None:
    """Write a drawing in the place of what is there. Raises: FileError."""
    try:
        files.publish(path, text)
    except OSError as error:
        why = str(error.strerror or error)
        raise FileError(f"{path} cannot be written", why, "give another place with --timeline") from None
