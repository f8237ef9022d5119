"""`staged_encoding`: text encoders are loaded, used, and gone before anything else is loaded.

No library does this by a switch: it is a run in two stages, for prompts that are known up front (`engine/run/staged.py`
makes it). What is here is which steps act in which stage. A pipeline that is loaded has no stages any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from engine.errors import IncompatibleError
from engine.facts.casting import is_text_encoder
from engine.optimizers.spec import Context, Pipeline, Spec, named, nothing_to_load
from engine.values import FrozenDict, Step

NAME = "staged_encoding"
SPEC = Spec(
    name=NAME,
    summary="text encoders are loaded, used, and gone before anything else is loaded",
    slot=5,
    lasts="it is how a run is made, not how a pipeline is",
)
load_arguments = nothing_to_load


def is_in(steps: Iterable[Step]) -> bool:
    """Whether a run of these steps is made in two stages."""
    return any(s.name == NAME for s in steps)


def first_stage(steps: Sequence[Step], components: Iterable[str]) -> tuple[Step, ...]:
    """Return what acts on the text encoders, which are alone on the device: how they are loaded, and which are cast.

    No placement does: wherever one would have held a text encoder, it is on the device until the prompts are encoded.
    `components` are those that have weights.
    """
    own = [n for n in components if is_text_encoder(n)]
    loading = tuple(s for s in steps if s.name == "dtype")
    return (*loading, *_casting(steps, own, is_default=False))


def second_stage(steps: Sequence[Step], components: Iterable[str]) -> tuple[Step, ...]:
    """Return what acts on the rest, in its order. A placement that names text encoders as well holds what is left."""
    own = [n for n in components if not is_text_encoder(n)]
    casting = {s.name: s for s in _casting(steps, own, is_default=True)}
    kept = [casting.get(s.name) if s.name == _CAST else s for s in steps if s.name != NAME]
    return tuple(s for s in kept if s is not None)


_CAST = "layerwise_casting"


def _casting(steps: Sequence[Step], components: Sequence[str], *, is_default: bool) -> tuple[Step, ...]:
    """Return the casting of a stage's components; `is_default`: what is cast where none are named is among them."""
    found = []
    for step in (s for s in steps if s.name == _CAST):
        names = named(step)
        if names is None and is_default:
            found.append(step)
        elif own := tuple(n for n in names or () if n in components):
            found.append(dataclasses.replace(step, params=FrozenDict({**step.params, "components": own})))
    return tuple(found)


def refused() -> IncompatibleError:
    """Return why a pipeline is not given out under it, nor changed."""
    return IncompatibleError(
        "staged_encoding is how a run is made, not how a pipeline is",
        "its text encoders are gone before the rest is loaded, so that the prompts must be there first",
        'give the prompts: plan.run(["…"]); or leave staged_encoding out',
    )


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    raise refused()


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    raise refused()
