"""What `model_offload` and `sequential_offload` share: telling a pipeline what its offloads leave on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from engine.optimizers.spec import NotApplied, Pipeline, names

_OWN = "_dg_run_own_offload"
_TOLD = ("model_cpu_offload_seq", "_exclude_from_cpu_offload")


def leave_on_device(pipe: Pipeline, components: Collection[str]) -> None:
    """Let the pipeline's own offloads leave these components on the device, beside those that its class leaves there.

    Both are class attributes, and are set on the instance: `enable_model_cpu_offload` is called again at the end of
    each call, and reads them again. A component of the chain is offloaded even where it is excluded (diffusers 0.42),
    so that it leaves the chain too. What an earlier call of this said is forgotten.
    """
    chain, excluded = getattr(pipe, _OWN, (pipe.model_cpu_offload_seq, pipe._exclude_from_cpu_offload))
    setattr(pipe, _OWN, (chain, excluded))
    if chain is not None:
        pipe.model_cpu_offload_seq = "->".join(n for n in chain.split("->") if n not in components)
    pipe._exclude_from_cpu_offload = [*excluded, *(n for n in components if n not in excluded)]


def undo(pipe: Pipeline) -> None:
    """Take accelerate's hooks from every component, and bring all of them back to the host.

    Source: `remove_all_hooks` of diffusers 0.42. A hook that was wrapped around them afterwards goes with them. What
    the pipeline was told of what its offloads leave on the device is forgotten.
    """
    pipe.remove_all_hooks()
    pipe.to("cpu", silence_dtype_warnings=True)
    own = pipe.__dict__
    for name in ("_offload_device", "_offload_gpu_id"):
        own.pop(name, None)
    for name, value in zip(_TOLD, own.pop(_OWN, ()), strict=False):
        own.pop(name, None)
        if getattr(pipe, name) != value:
            setattr(pipe, name, value)


def kind(module: Any) -> str | None:
    """Return the name of the class of accelerate's hook on a component as a whole; None where it has none."""
    hook = getattr(module, "_hf_hook", None)
    return None if hook is None else type(hook).__name__


def device_type(device: Any) -> str:
    """Return the kind of a device that a hook names, as "cuda"; a number is a card's."""
    import torch

    return str(torch.device(device).type)


def refuse_elsewhere(owner: str, components: Mapping[str, Any], where: str) -> None:
    """Raises: NotApplied, when weights of a component are anywhere but there."""
    for name, module in components.items():
        found = {p.device.type for p in module.parameters()} - {where}
        if found:
            raise NotApplied(owner, f"after a call weights of {name} are on {names(sorted(found))}, not on {where}")


def kept(pipe: Pipeline) -> set[str]:
    """Return the components that `enable_model_cpu_offload` leaves on the device for good."""
    chain = (pipe.model_cpu_offload_seq or "").split("->")
    return set(pipe._exclude_from_cpu_offload) - set(chain)
