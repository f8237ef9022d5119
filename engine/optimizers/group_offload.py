"""`group_offload`: groups of layers come to the device in turn, copied ahead on a stream of their own.

Source of the behaviour: diffusers 0.42, `hooks/group_offloading.py`. At block level a VAE is left resident: its
`decode` never runs the hook on the module itself, and would meet weights that are still on the host.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers.spec import (
    COMPONENTS,
    Context,
    NotApplied,
    Param,
    Pipeline,
    Spec,
    held,
    is_vae,
    modules,
    names,
    nothing_to_load,
)
from engine.values import Step

HOOK = "group_offloading"

SPEC = Spec(
    name="group_offload",
    summary="groups of layers come to the device in turn, copied ahead on a stream of their own",
    slot=93,
    is_placement=True,
    lasts="diffusers has no way to take groups back",
    params=(
        COMPONENTS,
        Param(
            name="type",
            kind="word",
            default="leaf_level",
            choices=("leaf_level", "block_level"),
            about="a group is one layer, or some transformer blocks",
            opens=True,
        ),
        Param(
            name="use_stream",
            kind="bool",
            default=True,
            about="copy the next group while this one computes",
            opens=True,
        ),
        Param(
            name="blocks_per_group",
            kind="count",
            default=1,
            about="blocks in a group at block level; a stream takes one",
            opens=True,
        ),
        Param(
            name="low_cpu_mem_usage",
            kind="bool",
            default=None,
            about="with a stream: pin a group while it is copied, and keep no pinned copies; left out: keep them",
        ),
    ),
)
load_arguments = nothing_to_load


def _pins_in_turn(step: Step) -> bool:
    return bool(step.params["use_stream"] and step.params.get("low_cpu_mem_usage"))


def _grouped(pipe: Pipeline, step: Step) -> dict[str, Any]:
    """Return the components whose weights come in groups."""
    is_block = step.params["type"] == "block_level"
    return {n: m for n, m in held(pipe, step).items() if not (is_block and is_vae(n))}


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    """Group the components that the step holds, one by one, as `DiffusionPipeline.enable_group_offload` does.

    That method is not called itself: it would bring what it leaves out to the device, and with it what another step of
    this kind holds.
    """
    import torch
    from diffusers.hooks import apply_group_offloading

    targets = _grouped(pipe, step)
    refusing = [n for n, m in targets.items() if getattr(m, "_supports_group_offloading", True) is False]
    if refusing:
        raise IncompatibleError(
            f"group_offload cannot act on {names(refusing)} of {type(pipe).__name__}",
            "its class says that it does not support it",
            "use model_offload or sequential_offload",
        )
    # Groups over groups work side by side in silence; and of other offloads' hooks diffusers looks for the component's.
    taken = [n for n, m in targets.items() if _has_hook(m)] or [n for n, m in modules(pipe).items() if _is_moved(m)]
    if taken:
        raise IncompatibleError(
            f"group_offload cannot act on {type(pipe).__name__}",
            f"{names(taken)} is offloaded already",
            "load the pipeline anew",
        )
    is_block = step.params["type"] == "block_level"
    arguments = {
        "onload_device": torch.device(context.device),
        "offload_device": torch.device("cpu"),
        "offload_type": step.params["type"],
        "num_blocks_per_group": step.params["blocks_per_group"] if is_block else None,
        "use_stream": step.params["use_stream"],
        "low_cpu_mem_usage": _pins_in_turn(step),
    }
    for module in targets.values():
        if hasattr(module, "enable_group_offload"):
            module.enable_group_offload(**arguments)
        else:
            apply_group_offloading(module=module, **arguments)
    for name, module in held(pipe, step).items():
        if name not in targets:
            module.to(context.device)


def _hooks(module: Any) -> list[Any]:
    registries = (getattr(m, "_diffusers_hook", None) for m in module.modules())
    hooks = (None if r is None else r.get_hook(HOOK) for r in registries)
    return [h for h in hooks if h is not None]


def _has_hook(module: Any) -> bool:
    return bool(_hooks(module))


def _is_moved(module: Any) -> bool:
    return any(hasattr(m, "_hf_hook") for m in module.modules())


def seen(pipe: Pipeline, context: Context) -> str | None:
    grouped = [n for n, m in modules(pipe).items() if _has_hook(m)]
    return f"{names(grouped)} is in groups already" if grouped else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    targets = _grouped(pipe, step)
    bare = [n for n, m in targets.items() if not _has_hook(m)]
    if bare:
        raise NotApplied("group_offload", f"{names(bare)} has no group-offloading hook")
    streamed = ", streamed" if step.params["use_stream"] else ""
    if _pins_in_turn(step):
        copies = (c for m in targets.values() for h in _hooks(m) for c in h.group.cpu_param_dict.values())
        if any(c.is_pinned() for c in copies):
            raise NotApplied("group_offload", "there are pinned copies, and low_cpu_mem_usage keeps none")
        streamed += ", pinned one after another"
    return f"{names(targets)} in groups, {step.params['type']}{streamed}"
