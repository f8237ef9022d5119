"""`resident`: components on the device for the whole run; all of them where none are named."""

from __future__ import annotations

from engine.optimizers import offload
from engine.optimizers.spec import (
    COMPONENTS,
    Context,
    NotApplied,
    Pipeline,
    Spec,
    held,
    left_out,
    names,
    nothing_to_load,
)
from engine.values import Step

SPEC = Spec(
    name="resident",
    summary="components on the device for the whole run: all, or those that are named",
    slot=90,
    is_placement=True,
    params=(COMPONENTS,),
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    if not left_out(pipe, step):
        pipe.to(context.device)
        return
    for _, module in sorted(held(pipe, step).items()):  # in the order in which `pipe.to` goes
        module.to(context.device)


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Bring what it holds back to the host, where a pipeline is loaded."""
    for module in held(pipe, step).values():
        module.to("cpu")


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    targets = held(pipe, step)
    for name, module in targets.items():
        elsewhere = {t.device.type for t in (*module.parameters(), *module.buffers())} - {context.device}
        if elsewhere:
            raise NotApplied("resident", f"weights of {name} are on {names(sorted(elsewhere))}")
        if offload.kind(module) is not None:
            raise NotApplied("resident", f"a hook moves {name}")
    return f"{names(targets)} on {context.device}"


settled = verify
