"""The file that measurements are appended to: JSON Lines, each line on disk before the next case begins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import FileError

SCHEMA = "dg-run/bench-gpu@1"
DIED = ("failed", "timeout", "killed")
"""How a case ends that has measured nothing; `--retry` runs those again."""
_SAME = ("device", "card", "driver", "versions")


class Journal:
    """Reads what is there, and appends. A last line that was cut off in the middle is dropped, and its case is redone.

    Raises: FileError, for a file that cannot be read or written, or that is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = read(path, repair=True)

    @property
    def records(self) -> tuple[dict[str, Any], ...]:
        return tuple(self._records)

    def has(self, case_id: str, machine: Mapping[str, Any], *, retry: bool = False) -> bool:
        """Whether a case was recorded on such a machine: the same card, driver and versions."""
        found = [r for r in self._records if r["id"] == case_id and is_same(r["machine"], machine)]
        return bool(found) and not (retry and found[-1]["status"] in DIED)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record: when this returns it is on the disk."""
        line = json.dumps({"schema": SCHEMA, **record}, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from None
        self._records.append(json.loads(line))


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two machines are the same for what is measured: the same card, driver and versions."""
    return all(one.get(name) == other.get(name) for name in _SAME)


def read(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """Return the records of a file, none where there is no file. `repair` cuts a torn last line off.

    Raises: FileError.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if repair and len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if repair:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None
    return [_record(path, number, line) for number, line in enumerate(whole.splitlines(), 1) if line.strip()]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise FileError(
            f"{path}:{number}: this is no record of the GPU harness",
            f"each line is an object of JSON with schema {SCHEMA!r}",
            "give another file, or take this line out",
        )
    return found


def _unusable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path} cannot be used", error.strerror or str(error), "give another file with --out")
