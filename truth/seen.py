"""What a run holds on its device: the value that an execution and a prediction both give."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a run. `resident` names the weights that are on the device where it begins."""

    name: str
    peak_bytes: int
    resident: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One run, from before anything is placed to the end of its call; sizes are of tensors, not of blocks."""

    phases: tuple[Phase, ...]
    pinned_bytes: int
    """The most that the host has pinned at once."""

    @property
    def peak_bytes(self) -> int:
        """The most on the device at once."""
        return max(p.peak_bytes for p in self.phases)
