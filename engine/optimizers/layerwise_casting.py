"""`layerwise_casting`: keep the denoiser's weights in fewer bits and widen each layer while it computes.

Source of the behaviour: `ModelMixin.enable_layerwise_casting` of diffusers 0.42. Norms, embeddings of patches and
positions, and what the class lists as `_keep_in_fp32_modules` are left alone by the library. It cannot be undone.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="layerwise_casting",
    summary="keep the denoiser's weights in fewer bits and widen each layer while it computes",
    slot=40,
    quality="near",
    params=(
        Param(
            name="storage",
            kind="word",
            default="float8_e4m3fn",
            choices=("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"),
            about="what weights are kept in",
        ),
        Param(
            name="compute",
            kind="word",
            default="auto",
            choices=("auto", "bfloat16", "float16", "float32"),
            about="what a layer computes in; auto is the pipeline's dtype, and nothing else runs",
        ),
    ),
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch

    compute = context.dtype if step.params["compute"] == "auto" else step.params["compute"]
    targets = denoisers(pipe)
    if not targets or not all(hasattr(m, "enable_layerwise_casting") for m in targets.values()):
        raise IncompatibleError(
            f"layerwise_casting cannot act on {type(pipe).__name__}",
            "it has no transformer or unet that can be cast layer by layer",
            "leave layerwise_casting out for this model",
        )
    for module in targets.values():
        module.enable_layerwise_casting(
            storage_dtype=getattr(torch, step.params["storage"]), compute_dtype=getattr(torch, compute)
        )


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    storage = f"torch.{step.params['storage']}"
    told = []
    for name, module in denoisers(pipe).items():
        weights = list(module.parameters())
        cast = sum(p.numel() for p in weights if str(p.dtype) == storage)
        if not cast:
            raise NotApplied("layerwise_casting", f"no weight of {name} is in {step.params['storage']}")
        told.append(f"{cast / sum(p.numel() for p in weights):.0%} of {name}'s weights in {step.params['storage']}")
    return "; ".join(told)
