"""`group_offload`: groups of layers come to the device in turn, copied ahead on a stream of their own.

Source of the behaviour: diffusers 0.42, `hooks/group_offloading.py`. At block level a VAE is left resident: its
`decode` never runs the hook on the module itself, and would meet weights that are still on the host.
"""

from __future__ import annotations

import itertools
from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers import hooks, offload
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
        Param(
            name="record_stream",
            kind="bool",
            default=None,
            about="with a stream: let a group go without waiting for the computing; its memory comes back when that "
            "has passed, which is not estimated. Left out: wait",
        ),
    ),
)
load_arguments = nothing_to_load


def _records(step: Step) -> bool:
    return bool(step.params["use_stream"] and step.params.get("record_stream"))


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
        "record_stream": _records(step),
    }
    for module in targets.values():
        if hasattr(module, "enable_group_offload"):
            module.enable_group_offload(**arguments)
        else:
            apply_group_offloading(module=module, **arguments)
        if step.params["use_stream"]:
            module.register_forward_hook(_put_back(module))
    for name, module in held(pipe, step).items():
        if name not in targets:
            module.to(context.device)


def _put_back(module: Any) -> Any:
    """Return a hook for the end of a forward that takes from the device what was copied ahead and was not used then.

    Where blocks are skipped, by a cache or by guidance that leaves layers out, the layer before them has the first of
    theirs copied all the same, and it would stay.
    """
    groups = [hook.group for hook in _hooks(module)]

    def put_back(*_: Any) -> None:
        for group in groups:
            # Its weights come and go together, so one tells of all.
            one = next(itertools.chain(group.parameters, *(m.parameters() for m in group.modules)), None)
            if group.stream is not None and one is not None and one.device.type == group.onload_device.type:
                group.stream.synchronize()
                group.offload_()

    return put_back


def _hooks(module: Any) -> list[Any]:
    return list(hooks.of(module, HOOK).values())


def _has_hook(module: Any) -> bool:
    return bool(_hooks(module))


def _is_moved(module: Any) -> bool:
    return any(hasattr(m, "_hf_hook") for m in module.modules())


def seen(pipe: Pipeline, context: Context) -> str | None:
    grouped = [n for n, m in modules(pipe).items() if _has_hook(m)]
    return f"{names(grouped)} is in groups already" if grouped else None


def not_estimated(step: Step) -> str | None:
    if not _records(step):
        return None
    return (
        "with record_stream memory comes back when the computing has passed, and how far the host is ahead is not known"
    )


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    """Just the modules that begin or end a group have its hook, each group is of the planned kind and size, and every
    weight is in one."""
    targets = _grouped(pipe, step)
    for name, module in targets.items():
        _verify_groups(name, module, step, context)
    for name, module in held(pipe, step).items():
        if name not in targets and any(p.device.type != context.device for p in module.parameters()):
            raise NotApplied("group_offload", f"{name} is in no groups, and not on {context.device}")
    streamed = ", streamed" if step.params["use_stream"] else ""
    if _pins_in_turn(step):
        copies = (c for m in targets.values() for h in _hooks(m) for c in h.group.cpu_param_dict.values())
        if any(c.is_pinned() for c in copies):
            raise NotApplied("group_offload", "there are pinned copies, and low_cpu_mem_usage keeps none")
        streamed += ", pinned one after another"
    if _records(step):
        streamed += ", recorded"
    return f"{names(targets)} in groups, {step.params['type']}{streamed}"


def settled(pipe: Pipeline, step: Step, context: Context) -> str:
    """After a call the weights in groups are back on the host. Buffers of streamed blocks stay on the device."""
    targets = _grouped(pipe, step)
    offload.refuse_elsewhere("group_offload", targets, "cpu")
    offload.refuse_elsewhere(
        "group_offload", {n: m for n, m in held(pipe, step).items() if n not in targets}, context.device
    )
    return f"{names(targets)} back on the host"


def _verify_groups(name: str, module: Any, step: Step, context: Context) -> None:
    found = hooks.of(module, HOOK)
    if not found:
        raise NotApplied("group_offload", f"{name} has no group-offloading hook")
    planned = _planned_groups(module, step)
    if missing := set(planned) - set(found):
        raise NotApplied("group_offload", f"{hooks.first(missing)} of {name} has no group-offloading hook")
    if more := set(found) - set(planned):
        raise NotApplied("group_offload", f"{hooks.first(more)} of {name} has a group-offloading hook of its own")
    for path, hook in found.items():
        group, blocks = hook.group, planned[path]
        own = f"the group of {path or 'the rest'} of {name}"
        if blocks is not None and len(group.modules) != blocks:
            raise NotApplied("group_offload", f"{own} has {len(group.modules)} modules; planned were {blocks}")
        if group.onload_device.type != context.device or group.offload_device.type != "cpu":
            raise NotApplied("group_offload", f"{own} moves from {group.offload_device} to {group.onload_device}")
        # What is in no block comes at once, without a stream; and a group of nothing only watches the order.
        is_streamed = blocks is not None and bool(group.modules or group.parameters or group.buffers)
        if (group.stream is not None) != (step.params["use_stream"] and is_streamed):
            raise NotApplied(
                "group_offload", f"{own} comes {'with' if group.stream is not None else 'without'} a stream"
            )
        if blocks is not None and group.low_cpu_mem_usage != _pins_in_turn(step):
            raise NotApplied("group_offload", f"{own} has low_cpu_mem_usage {group.low_cpu_mem_usage}")
        if blocks and is_streamed and bool(group.record_stream) != _records(step):
            raise NotApplied("group_offload", f"{own} has record_stream {group.record_stream}")
    grouped = {id(p) for hook in found.values() for m in hook.group.modules for p in m.parameters()}
    grouped |= {id(p) for hook in found.values() for p in hook.group.parameters}
    if alone := {path for path, p in module.named_parameters() if id(p) not in grouped}:
        raise NotApplied("group_offload", f"{hooks.first(alone)} of {name} is in no group")


def _planned_groups(module: Any, step: Step) -> dict[str, int | None]:
    """Return how many modules the group of each module that has a hook has, by path; None: it is what is in no block.

    Source: `_apply_group_offloading_leaf_level` and `_apply_group_offloading_block_level` of diffusers 0.42.
    """
    if step.params["type"] == "leaf_level":
        return _planned_leaves(module, streamed=bool(step.params["use_stream"]))
    blocks = 1 if step.params["use_stream"] else int(step.params["blocks_per_group"])
    apart = frozenset(getattr(module, "_group_offload_block_modules", None) or ())
    return _planned_blocks(module, "", blocks, apart)


def _planned_leaves(module: Any, *, streamed: bool) -> dict[str, int | None]:
    kinds = hooks.are_layers()
    leaves = {path for path, part in module.named_modules() if isinstance(part, kinds)}
    planned: dict[str, int | None] = dict.fromkeys(leaves, 1)
    for path, part in module.named_modules():
        way = path.split(".")
        is_within = any(".".join(way[: i + 1]) in leaves for i in range(len(way)))
        if not is_within and any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            planned[path] = 0
    if streamed:  # the order is watched from the outermost module
        planned.setdefault("", 0)
    return planned


def _planned_blocks(module: Any, path: str, blocks: int, apart: frozenset[str]) -> dict[str, int | None]:
    from torch import nn

    planned: dict[str, int | None] = {}
    rest = sum(1 for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    for name, child in module.named_children():
        own = f"{path}.{name}" if path else name
        if name in apart:
            planned |= _planned_blocks(child, own, blocks, apart)
        elif isinstance(child, nn.ModuleList | nn.Sequential):
            for i in range(len(child)):
                planned[f"{own}.{i}"] = min(blocks, len(child) - i // blocks * blocks)
        else:
            rest += 1
    if rest:
        planned[path] = None
    return planned
