"""`model_offload`: one component at a time on the device, the others in host memory.

Source of the behaviour: `DiffusionPipeline.enable_model_cpu_offload` of diffusers 0.42, whose chain of components is
the class's `model_cpu_offload_seq`; a component outside it is loaded at its first use and stays until the call ends.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, modules, names, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="model_offload",
    summary="one component at a time on the device, the others in host memory",
    slot=91,
    is_placement=True,
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    if pipe.model_cpu_offload_seq is None:
        raise IncompatibleError(
            f"model_offload cannot act on {type(pipe).__name__}",
            "the pipeline does not say in which order its components are used",
            "use group_offload or sequential_offload",
        )
    pipe.enable_model_cpu_offload(device=context.device)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    kept = set(pipe._exclude_from_cpu_offload)
    found = modules(pipe)
    bare = [
        n for n, m in found.items() if n not in kept and type(getattr(m, "_hf_hook", None)).__name__ != "CpuOffload"
    ]
    if bare:
        raise NotApplied("model_offload", f"{names(bare)} has no offload hook")
    return f"{names([n for n in found if n not in kept])} move to {context.device} one at a time"
