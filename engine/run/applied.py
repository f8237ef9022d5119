"""What was applied to which pipeline, known as long as the pipeline lives and kept nowhere in it; taking it back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from engine import optimizers
from engine.errors import DgRunError, IncompatibleError
from engine.optimizers.spec import Context, modules, names
from engine.run.progress import Progress
from engine.values import Step
from engine.words import listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The steps that were applied to a pipeline, where, and to which components."""

    planned: tuple[Step, ...]
    acted: tuple[Step, ...]
    """Those of them that changed something, in their order."""
    here: Context
    components: Mapping[str, weakref.ref[Any]]


_BY_PIPELINE: WeakKeyDictionary[Any, Applied] = WeakKeyDictionary()


def keep(pipe: Any, planned: Sequence[Step], acted: Sequence[Step], here: Context) -> None:
    """Remember what was applied to a pipeline."""
    components = {n: weakref.ref(m) for n, m in modules(pipe).items()}
    _BY_PIPELINE[pipe] = Applied(planned=tuple(planned), acted=tuple(acted), here=here, components=components)


def of(pipe: Any) -> Applied | None:
    """Return what was applied to a pipeline; None where nothing was."""
    return _BY_PIPELINE.get(pipe)


def is_there(pipe: Any, planned: Sequence[Step], here: Context) -> Applied | None:
    """Return what was applied to a pipeline, where it is just these steps; None where nothing has been.

    Raises: IncompatibleError, when other steps were applied, or components have been replaced since.
    """
    before = _BY_PIPELINE.get(pipe)
    if before is None or not before.acted:
        return None
    if (before.planned, before.here) != (tuple(planned), here):
        raise IncompatibleError(
            "another plan was applied to this pipeline",
            f"{listing([s.name for s in before.acted])} acted on it on {before.here.device} in {before.here.dtype}",
            "take it back first (plan.undo(pipe) of that plan), or load the pipeline anew",
        )
    live = modules(pipe)
    other = [n for n in {**live, **before.components} if _held(before, n) is not live.get(n)]
    if other:
        raise IncompatibleError(
            f"{names(other)} of the pipeline was replaced after the plan was applied",
            "what was done to the one before was not done to it",
            "load the pipeline anew",
        )
    return before


def _held(before: Applied, name: str) -> Any:
    found = before.components.get(name)
    return None if found is None else found()


def undo(pipe: Any, planned: Sequence[Step], here: Context, told: Progress) -> None:
    """Take back what these steps did to a pipeline, the last one first; it is then as it was given.

    All of them, or none: where one cannot be taken back, nothing is touched.

    Raises: IncompatibleError, for steps that were not applied to this pipeline, or cannot be taken back.
    """
    before = _BY_PIPELINE.get(pipe)
    if before is None or (before.planned, before.here) != (tuple(planned), here):
        other = None if before is None or not before.acted else listing([s.name for s in before.acted])
        raise IncompatibleError(
            "this plan was not applied to this pipeline",
            f"what was applied is {other}" if other else "nothing was applied to it, as far as is known",
            "undo the plan that was applied",
        )
    lasting = [s.name for s in before.acted if optimizers.optional(s.name, "undo") is None]
    if lasting:
        raise IncompatibleError(
            f"{listing(lasting)} cannot be taken back",
            "; ".join(optimizers.spec(n).lasts or "nothing of the libraries takes it back" for n in lasting),
            "load the pipeline anew",
        )
    # From here on the pipeline is no longer as planned, whatever becomes of it.
    del _BY_PIPELINE[pipe]
    for step in reversed(before.acted):
        take_back = optimizers.optional(step.name, "undo")
        assert take_back is not None
        take_back(pipe, step, here)
        look = optimizers.optional(step.name, "seen")
        if look is not None and (saw := look(pipe, here)) is not None:
            raise DgRunError(
                f"{step.name} was taken back and is still there", saw, "load the pipeline anew, and report this"
            )
        told.say(f"  {step.name}: taken back")
