"""`staged_encoding`: text encoders are loaded, used, and gone before anything else is loaded.

No library does this by a switch: it is a run in two stages, for prompts that are known up front. What is here is what
planning needs. This version estimates such a run and does not make it: it is refused before anything is loaded.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="staged_encoding",
    summary="text encoders are loaded, used, and gone before anything else is loaded",
    slot=5,
    planned_only=True,
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    raise IncompatibleError(
        "staged_encoding cannot be applied to a loaded pipeline", "its stages are how a pipeline is loaded"
    )


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    raise IncompatibleError(
        "staged_encoding cannot be verified on a loaded pipeline", "its stages are how a pipeline is loaded"
    )
