"""`layerwise_casting`: keep weights in fewer bits and widen each layer while it computes.

Source of the behaviour: `ModelMixin.enable_layerwise_casting` of diffusers 0.42. Norms, embeddings of patches and
positions, and what the class lists as `_keep_in_fp32_modules` are left alone by the library. Text encoders have no such
method: which of their layers are cast is said here (`engine/facts/casting.py`). It cannot be undone.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.facts import casting
from engine.optimizers import hooks
from engine.optimizers.spec import (
    Context,
    NotApplied,
    Param,
    Pipeline,
    Spec,
    denoisers,
    held,
    modules,
    named,
    names,
    nothing_to_load,
)
from engine.values import Step

SPEC = Spec(
    name="layerwise_casting",
    summary="keep weights in fewer bits and widen each layer while it computes: the denoiser's, or what is named",
    slot=40,
    quality="near",
    changes_weights=True,
    lasts="weights that were narrowed do not get their precision back",
    params=(
        Param(
            name="components",
            kind="names",
            default=None,
            about="the components whose layers are kept so: what denoises, and text encoders; left out: what denoises",
            opens=True,
        ),
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
HOOK = "layerwise_casting"


def _targets(pipe: Pipeline, step: Step) -> dict[str, Any]:
    """Return the components that are cast, by name."""
    return denoisers(pipe) if named(step) is None else held(pipe, step)


def _compute(step: Step, context: Context) -> str:
    compute = str(step.params["compute"])
    return context.dtype if compute == "auto" else compute


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch
    from diffusers.hooks import apply_layerwise_casting

    dtypes = {
        "storage_dtype": getattr(torch, step.params["storage"]),
        "compute_dtype": getattr(torch, _compute(step, context)),
    }
    targets = _targets(pipe, step)
    own = {n for n, m in targets.items() if n in denoisers(pipe) and hasattr(m, "enable_layerwise_casting")}
    others = [n for n in targets if n not in own and not casting.is_text_encoder(n)]
    if others or not targets:
        raise IncompatibleError(
            f"layerwise_casting cannot act on {names(others) if others else type(pipe).__name__}",
            "it casts the layers of a transformer or unet, and of text encoders, one by one",
            "leave layerwise_casting out for this model" if named(step) is None else "name other components",
        )
    for name, module in targets.items():
        if name in own:
            module.enable_layerwise_casting(**dtypes)
        else:
            apply_layerwise_casting(module, skip_modules_pattern=casting.LEFT_ALONE, **dtypes)


def seen(pipe: Pipeline, context: Context) -> str | None:
    cast = [n for n, m in modules(pipe).items() if hooks.of(m, HOOK)]
    return f"layers of {names(cast)} are cast already" if cast else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    """Just the layers that the library would cast are, each in the planned precisions."""
    storage, compute = step.params["storage"], _compute(step, context)
    told = []
    for name, module in _targets(pipe, step).items():
        found, planned = hooks.of(module, HOOK), _layers(name, module)
        if missing := set(planned) - set(found):
            raise NotApplied("layerwise_casting", f"{hooks.first(missing)} of {name} is not cast")
        if more := set(found) - set(planned):
            raise NotApplied("layerwise_casting", f"{hooks.first(more)} of {name} is cast, and should be left alone")
        for path, hook in found.items():
            dtypes = (str(hook.storage_dtype), str(hook.compute_dtype))
            if dtypes != (f"torch.{storage}", f"torch.{compute}"):
                raise NotApplied("layerwise_casting", f"{path} of {name} is cast from {dtypes[0]} to {dtypes[1]}")
        cast = sum(_in_storage(name, path, layer, storage) for path, layer in planned.items())
        if not cast:
            raise NotApplied("layerwise_casting", f"no weight of {name} is in {storage}")
        told.append(f"{cast / sum(p.numel() for p in module.parameters()):.0%} of {name}'s weights in {storage}")
    return "; ".join(told)


def _in_storage(name: str, path: str, layer: Any, storage: str) -> int:
    """Return how many weights of a layer are kept in few bits: all of them. Raises: NotApplied."""
    count = 0
    for own, weight in layer.named_parameters(recurse=False):
        if weight.is_floating_point() and str(weight.dtype) != f"torch.{storage}":
            raise NotApplied("layerwise_casting", f"{path}.{own} of {name} is in {weight.dtype}, not in {storage}")
        count += weight.numel()
    return count


def _layers(name: str, module: Any) -> dict[str, Any]:
    """Return the layers of a component that are cast, by path.

    Source: `enable_layerwise_casting` of diffusers 0.42: no part of the way to a layer is left alone, by the usual
    patterns or those of its class, and no LoRA's layer is cast.
    """
    patterns: tuple[str, ...] = casting.LEFT_ALONE
    if hasattr(module, "enable_layerwise_casting"):
        of_class = (getattr(module, n, None) for n in ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"))
        patterns = (*casting.USUAL, *(p for found in of_class for p in found or ()), "lora_", "hada_", "lokr_")
    kinds = hooks.are_layers()
    return {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, kinds) and not casting.is_left_alone(path, patterns)
    }
