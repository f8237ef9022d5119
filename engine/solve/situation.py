"""What a decision is made from, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.facts.model import Model
from engine.history import RanOut
from engine.units import format_size
from engine.values import Estimate, FrozenDict, Gpu, Note, Profile, Rejection, Request, Step

if TYPE_CHECKING:
    from engine.estimate.bounds import Least

QUALITIES = ("exact", "near", "lossy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything a decision is made from."""

    request: Request
    model: Model
    gpu: Gpu | None
    estimate: Callable[[Sequence[Step]], Estimate] = field(default=lambda steps: Estimate())
    """What a run under these steps takes; fields that are not known are None."""
    least: Callable[[Sequence[Step]], Least | None] = field(default=lambda steps: None)
    """What such a run takes at the least, told faster; never more than the estimate."""
    timed: Callable[[Sequence[Step]], float | None] = field(default=lambda steps: None)
    """The seconds that the estimate will have, told sooner; None where that cannot be."""
    sizes: Callable[[str], Mapping[str, int]] = field(default=lambda dtype: FrozenDict())
    """Bytes of the weights of each component in a dtype; empty where they are not known."""
    budget_bytes: int | None = None
    below_bytes: int | None = None
    """Only what surely needs less than that of the card is chosen: what was to need so much ran out of memory."""
    ran_out: Mapping[str, RanOut] = field(default_factory=FrozenDict)
    """What ran out of memory on this card under this request, by the steps that acted, as text."""
    host_budget_bytes: int | None = None
    gpus: int = 1
    platform: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    def lost(self, acting: str) -> str | None:
        """Return that these steps, as text, ran out of memory here with no less room than there is now; else None."""
        before, budget = self.ran_out.get(acting), self.budget_bytes
        if before is None or budget is None or before.room_bytes < budget:
            return None
        room = format_size(before.room_bytes)
        return f"it ran out of memory here on {before.when[:10]} with {room} for it, and has {format_size(budget)} now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was chosen (`profile` None: nothing, or an exact list), and why everything else was not."""

    profile: Profile | None
    steps: tuple[Step, ...]
    fits: bool | None
    estimate: Estimate
    rejected: tuple[Rejection, ...]
    notes: tuple[Note, ...]
    key: tuple[float, ...] = ()
    """What the choice was made by: the least is the best, on whichever card. Empty where nothing was estimated."""
