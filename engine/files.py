"""Files that are there whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes whenever a file does that is only ever replaced or added to. Raises: OSError."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
