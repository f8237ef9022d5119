"""What a decision is made from, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.facts.model import Model
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
    host_budget_bytes: int | None = None
    gpus: int = 1
    platform: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"


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
