"""`group_offload`: groups of layers come to the device in turn, copied ahead on a stream of their own.

Source of the behaviour: diffusers 0.42, `hooks/group_offloading.py`. At block level a VAE is left resident: its
`decode` never runs the hook on the module itself, and would meet weights that are still on the host.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, modules, names, nothing_to_load
from engine.values import Step

HOOK = "group_offloading"

SPEC = Spec(
    name="group_offload",
    summary="groups of layers come to the device in turn, copied ahead on a stream of their own",
    slot=93,
    is_placement=True,
    params=(
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
    ),
)
load_arguments = nothing_to_load


def _is_vae(name: str) -> bool:
    return name in ("vae", "vqvae", "audio_vae")


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch

    refusing = [n for n, m in modules(pipe).items() if getattr(m, "_supports_group_offloading", True) is False]
    if refusing:
        raise IncompatibleError(
            f"group_offload cannot act on {names(refusing)} of {type(pipe).__name__}",
            "its class says that it does not support it",
            "use model_offload or sequential_offload",
        )
    is_block = step.params["type"] == "block_level"
    pipe.enable_group_offload(
        onload_device=torch.device(context.device),
        offload_device=torch.device("cpu"),
        offload_type=step.params["type"],
        num_blocks_per_group=step.params["blocks_per_group"] if is_block else None,
        use_stream=step.params["use_stream"],
        exclude_modules=[n for n in modules(pipe) if _is_vae(n)] if is_block else None,
    )


def _has_hook(module: Any) -> bool:
    registries = (getattr(m, "_diffusers_hook", None) for m in module.modules())
    return any(r is not None and r.get_hook(HOOK) is not None for r in registries)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    is_block = step.params["type"] == "block_level"
    targets = {n: m for n, m in modules(pipe).items() if not (is_block and _is_vae(n))}
    bare = [n for n, m in targets.items() if not _has_hook(m)]
    if bare:
        raise NotApplied("group_offload", f"{names(bare)} has no group-offloading hook")
    return f"{names(targets)} in groups, {step.params['type']}{', streamed' if step.params['use_stream'] else ''}"
