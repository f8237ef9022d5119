"""What can go wrong, as a tree. Each class owns one exit code; a test walks the tree against the documented table.

    DgRunError                  1   internal
    ├── UsageError              2   the command line or the arguments of a call
    ├── ProfileError            3   invalid or unknown profile
    ├── IncompatibleError       3   optimizers that do not go together
    ├── NothingFitsError        4   no plan fits the hardware
    ├── ModelError              5   model unknown or unreadable
    ├── HardwareError           6   hardware or driver
    ├── OutOfMemoryError        7   out of memory while running
    └── FileError               8   input or output file

Every error has three parts: what happened, why, and what to do next.
"""

from __future__ import annotations

from typing import Any

INTERRUPTED_EXIT_CODE = 130


class DgRunError(Exception):
    """An expected failure, told in three parts; `why` and `do` may be empty where there is nothing to add."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is, and not by its class's own arguments: a process that works for another one hands its errors over.
        return _again, (type(self), self.args, dict(vars(self)))

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.do:
            lines.append(f"  do:  {self.do}")
        return "\n".join(lines)


def _again(kind: type[DgRunError], arguments: tuple[Any, ...], said: dict[str, Any]) -> DgRunError:
    made = kind.__new__(kind, *arguments)
    made.args = arguments
    vars(made).update(said)
    return made


class UsageError(DgRunError):
    """Arguments that cannot be meant."""

    exit_code = 2


class ProfileError(DgRunError):
    """A profile that is not there, or is not valid."""

    exit_code = 3


class IncompatibleError(DgRunError):
    """Optimizers that do not go together, or not in this order, or not on this hardware."""

    exit_code = 3


class NothingFitsError(DgRunError):
    """No plan fits; the plan's `rejected` says by how much each failed."""

    exit_code = 4


class ModelError(DgRunError):
    """A model that is not known, or cannot be read."""

    exit_code = 5


class HardwareError(DgRunError):
    """A card or a driver that does not answer as it should."""

    exit_code = 6


class OutOfMemoryError(DgRunError):
    """The device ran out of memory while running."""

    exit_code = 7


class FileError(DgRunError):
    """A file that cannot be read or written."""

    exit_code = 8
