"""`sequential_offload`: one layer at a time on the device. The least memory, by far the slowest.

Source of the behaviour: `DiffusionPipeline.enable_sequential_cpu_offload` of diffusers 0.42 and accelerate's
`AlignDevicesHook`: weights live in a host map, and each module that owns some fetches them for its own forward. A
component that it does not hold is on the device for good.
"""

from __future__ import annotations

from typing import Any

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
    name="sequential_offload",
    summary="one layer at a time on the device: the least memory, by far the slowest",
    slot=92,
    is_placement=True,
    params=(COMPONENTS,),
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    offload.leave_on_device(pipe, left_out(pipe, step))
    pipe.enable_sequential_cpu_offload(device=context.device)


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Put the weights back from the host map. Those that were one are one again (a text encoder's embeddings)."""
    offload.undo(pipe)
    for module in held(pipe, step).values():
        if hasattr(module, "tie_weights"):
            module.tie_weights()


def seen(pipe: Pipeline, context: Context) -> str | None:
    away = [n for n, m in modules(pipe).items() if offload.kind(m) not in (None, "CpuOffload")]
    return f"{names(away)} is offloaded already" if away else None


def _fetches(module: Any) -> bool:
    """Whether every weight is away (on meta) and some hook brings it back."""
    away = all(p.device.type == "meta" for p in module.parameters())
    return away and any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in module.modules())


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    kept = set(pipe._exclude_from_cpu_offload)
    targets = {n: m for n, m in held(pipe, step).items() if n not in kept}
    bare = [n for n, m in targets.items() if not _fetches(m)]
    if bare:
        raise NotApplied("sequential_offload", f"{names(bare)} still holds its weights")
    return f"{names(targets)} fetch their weights layer by layer"
