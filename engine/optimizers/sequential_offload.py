"""`sequential_offload`: one layer at a time on the device. The least memory, by far the slowest.

Source of the behaviour: `DiffusionPipeline.enable_sequential_cpu_offload` of diffusers 0.42 and accelerate's
`AlignDevicesHook`: weights live in a host map, and each module that owns some fetches them for its own forward. A
component that it does not hold is on the device for good.
"""

from __future__ import annotations

from typing import Any

from engine.optimizers import hooks, offload
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


def _targets(pipe: Pipeline, step: Step) -> dict[str, Any]:
    kept = set(pipe._exclude_from_cpu_offload)
    return {n: m for n, m in held(pipe, step).items() if n not in kept}


def _fetches(part: Any, context: Context) -> bool:
    """Whether a hook fetches a module's own weights to the device, and puts them away again."""
    hook: Any = getattr(part, "_hf_hook", None)
    found = [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]
    return len(found) == 1 and offload.device_type(found[0].execution_device) == context.device


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    """Every module that owns weights has a hook that fetches them, and they are away (on meta) until it does.

    Source: `attach_align_device_hook` of accelerate 1.15. Buffers may stay on the device.
    """
    targets = _targets(pipe, step)
    for name, module in targets.items():
        owners = {
            path: part
            for path, part in module.named_modules()
            if any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False)))
        }
        here = {path for path, part in owners.items() if any(not p.is_meta for p in part.parameters(recurse=False))}
        if here:
            raise NotApplied("sequential_offload", f"{hooks.first(here)} of {name} still holds its weights")
        bare = {path for path, part in owners.items() if not _fetches(part, context)}
        if bare:
            raise NotApplied(
                "sequential_offload", f"{hooks.first(bare)} of {name} has no hook that fetches it to {context.device}"
            )
    return f"{names(targets)} fetch their weights layer by layer"


def settled(pipe: Pipeline, step: Step, context: Context) -> str:
    """After a call no weight of what is held is on the device, and what it leaves there is."""
    targets = _targets(pipe, step)
    offload.refuse_elsewhere("sequential_offload", targets, "meta")
    offload.refuse_elsewhere(
        "sequential_offload", {n: m for n, m in modules(pipe).items() if n not in targets}, context.device
    )
    return f"{names(targets)} away from the device"
