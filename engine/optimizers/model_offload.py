"""`model_offload`: one component at a time on the device, the others in host memory.

Source of the behaviour: `DiffusionPipeline.enable_model_cpu_offload` of diffusers 0.42, whose chain of components is
the class's `model_cpu_offload_seq`; a component outside it is loaded at its first use and stays until the call ends.
A component that it does not hold is on the device for good.
"""

from __future__ import annotations

from typing import Any

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
    """Each component that is held has its hook, which brings it and sends the one before it in the chain away."""
    moving, kept = _moving(pipe, step), _kept(pipe)
    bare = [n for n, m in moving.items() if offload.kind(m) != "CpuOffload"]
    if bare:
        raise NotApplied("model_offload", f"{names(bare)} has no offload hook")
    before = None
    chain = [n for n in (pipe.model_cpu_offload_seq or "").split("->") if n in moving]
    for name in [*chain, *(n for n in moving if n not in chain)]:
        hook = moving[name]._hf_hook
        if offload.device_type(hook.execution_device) != context.device:
            raise NotApplied("model_offload", f"the hook of {name} moves it to {hook.execution_device}")
        previous = None if hook.prev_module_hook is None else hook.prev_module_hook.model
        planned = before if name in chain else None
        if previous is not (None if planned is None else moving[planned]):
            raise NotApplied("model_offload", f"the hook of {name} does not send {planned or 'nothing'} away before it")
        before = name if name in chain else before
    hooked = [n for n, m in kept.items() if offload.kind(m) is not None]
    if hooked:
        raise NotApplied("model_offload", f"a hook moves {names(hooked)}, which should stay on the device")
    return f"{names(moving)} move to {context.device} one at a time"


def settled(pipe: Pipeline, step: Step, context: Context) -> str:
    """After a call each component that is held is back on the host, and what is kept is on the device."""
    moving = _moving(pipe, step)
    offload.refuse_elsewhere("model_offload", moving, "cpu")
    offload.refuse_elsewhere("model_offload", _kept(pipe), context.device)
    return f"{names(moving)} back on the host"


def _moving(pipe: Pipeline, step: Step) -> dict[str, Any]:
    kept = offload.kept(pipe)
    return {n: m for n, m in held(pipe, step).items() if n not in kept}


def _kept(pipe: Pipeline) -> dict[str, Any]:
    kept = offload.kept(pipe)
    return {n: m for n, m in modules(pipe).items() if n in kept}
