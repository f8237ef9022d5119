"""`model_offload`: one component at a time on the device, the others in host memory.

Source of the behaviour: `DiffusionPipeline.enable_model_cpu_offload` of diffusers 0.42, whose chain of components is
the class's `model_cpu_offload_seq`; a component outside it is loaded at its first use and stays until the call ends.
A component that it does not hold is on the device for good.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers import offload
from engine.optimizers.spec import (
    COMPONENTS,
    Context,
    NotApplied,
    Pipeline,
    Spec,
    held,
    left_out,
    modules,
    names,
    nothing_to_load,
)
from engine.values import Step

SPEC = Spec(
    name="model_offload",
    summary="one component at a time on the device, the others in host memory",
    slot=91,
    is_placement=True,
    params=(COMPONENTS,),
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    if pipe.model_cpu_offload_seq is None:
        raise IncompatibleError(
            f"model_offload cannot act on {type(pipe).__name__}",
            "the pipeline does not say in which order its components are used",
            "use group_offload or sequential_offload",
        )
    offload.leave_on_device(pipe, left_out(pipe, step))
    pipe.enable_model_cpu_offload(device=context.device)


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    offload.undo(pipe)


def seen(pipe: Pipeline, context: Context) -> str | None:
    moved = [n for n, m in modules(pipe).items() if offload.kind(m) == "CpuOffload"]
    return f"{names(moved)} is offloaded already" if moved else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    kept = offload.kept(pipe)
    moving = {n: m for n, m in held(pipe, step).items() if n not in kept}
    bare = [n for n, m in moving.items() if offload.kind(m) != "CpuOffload"]
    if bare:
        raise NotApplied("model_offload", f"{names(bare)} has no offload hook")
    return f"{names(moving)} move to {context.device} one at a time"
