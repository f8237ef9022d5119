"""What `model_offload` and `sequential_offload` share: telling a pipeline what its offloads leave on the device."""

from __future__ import annotations

from collections.abc import Collection

from engine.optimizers.spec import Pipeline

_OWN = "_dg_run_own_offload"


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


def kept(pipe: Pipeline) -> set[str]:
    """Return the components that `enable_model_cpu_offload` leaves on the device for good."""
    chain = (pipe.model_cpu_offload_seq or "").split("->")
    return set(pipe._exclude_from_cpu_offload) - set(chain)
