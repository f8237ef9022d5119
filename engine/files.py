"""Files that are there whole or not at all, whoever else writes them at the same time.

Most who come here only read: what names new files is imported where one is made.
"""

from __future__ import annotations

import os
from pathlib import Path


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes whenever a file does that is only ever replaced or added to. Raises: OSError."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made. Raises: OSError."""
    import tempfile

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


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, which is made where it is not there, and see it on the disk. Raises: OSError.

    Whoever else adds lines, each is whole; a line that was cut off stays a line of its own, and spoils no other.
    """
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        is_cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if is_cut else b"") + line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path, text: str) -> None:
    """Write a text for others to read, whole or not at all, where its folder is; with the rights of any new file.

    Raises: OSError.
    """
    import secrets

    part = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with part.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
