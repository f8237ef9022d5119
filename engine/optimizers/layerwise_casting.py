"""`layerwise_casting`: keep weights in fewer bits and widen each layer while it computes.

Source of the behaviour: `ModelMixin.enable_layerwise_casting` of diffusers 0.42. Norms, embeddings of patches and
positions, and what the class lists as `_keep_in_fp32_modules` are left alone by the library. Text encoders have no such
method: which of their layers are cast is said here (`engine/facts/casting.py`). It cannot be undone.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.facts import casting
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


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch
    from diffusers.hooks import apply_layerwise_casting

    compute = context.dtype if step.params["compute"] == "auto" else step.params["compute"]
    dtypes = {"storage_dtype": getattr(torch, step.params["storage"]), "compute_dtype": getattr(torch, compute)}
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


def cast_layers(module: Any) -> dict[str, Any]:
    """Return the hook of each layer of a module that is cast, by the layer's path."""
    found = {}
    for path, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(HOOK)) is not None:
            found[path] = hook
    return found


def seen(pipe: Pipeline, context: Context) -> str | None:
    cast = [n for n, m in modules(pipe).items() if cast_layers(m)]
    return f"layers of {names(cast)} are cast already" if cast else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    storage = f"torch.{step.params['storage']}"
    told = []
    for name, module in _targets(pipe, step).items():
        weights = list(module.parameters())
        cast = sum(p.numel() for p in weights if str(p.dtype) == storage)
        if not cast:
            raise NotApplied("layerwise_casting", f"no weight of {name} is in {step.params['storage']}")
        told.append(f"{cast / sum(p.numel() for p in weights):.0%} of {name}'s weights in {step.params['storage']}")
    return "; ".join(told)
