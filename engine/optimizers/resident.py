"""`resident`: every component on the device for the whole run."""

from __future__ import annotations

from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, modules, names, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="resident",
    summary="every component on the device for the whole run",
    slot=90,
    is_placement=True,
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    pipe.to(context.device)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    for name, module in modules(pipe).items():
        elsewhere = {p.device.type for p in module.parameters()} - {context.device}
        if elsewhere:
            raise NotApplied("resident", f"weights of {name} are on {names(sorted(elsewhere))}")
    return f"{names(modules(pipe))} on {context.device}"
