"""`fuse_qkv`: the denoiser's attention projects queries, keys and values in one product instead of three.

Source of the behaviour: `fuse_qkv_projections` of diffusers 0.42. The old weights stay beside the fused ones, so that
it costs memory. On a part of the classes that have the method it does nothing, or fuses what nobody uses, or raises
(`engine/facts/attention.py`): a rule says so before the run.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.facts import attention
from engine.optimizers import hooks
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, denoisers, names, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="fuse_qkv",
    summary="the denoiser's attention projects queries, keys and values in one product instead of three",
    slot=30,
    changes_computing=True,
    changes_weights=True,
)
load_arguments = nothing_to_load


def _targets(pipe: Pipeline) -> dict[str, Any]:
    return {
        n: m
        for n, m in denoisers(pipe).items()
        if hasattr(m, "fuse_qkv_projections") and attention.fuses_qkv(type(m).__name__, m.config) is not False
    }


def _fused(module: Any) -> list[Any]:
    return [m for m in module.modules() if _is_fused(m)]


def _is_fused(part: Any) -> bool:
    return getattr(part, "fused_projections", False) is True


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    because = "the attention of its denoiser has no fused projections that it would compute with"
    targets = _targets(pipe)
    try:
        for module in targets.values():
            module.fuse_qkv_projections()
    except (AttributeError, ValueError) as error:
        because, targets = " ".join(str(error).split()), {}
    if not targets:
        raise IncompatibleError(
            f"fuse_qkv cannot act on {type(pipe).__name__}", because, "leave fuse_qkv out for this model"
        )


_ADDED = ("to_qkv", "to_kv", "to_added_qkv")
"""The layers that fusing adds to an attention."""


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Compute with the old weights again, and let go of the fused ones: of the classes that have kept their attention
    of older versions (UNets, SD3, PixArt, ...) the library itself only takes the processors back."""
    for module in _targets(pipe).values():
        module.unfuse_qkv_projections()
        if getattr(module, "original_attn_processors", None) is not None:
            module.original_attn_processors = None  # the library has emptied it while it set them
        for attention_module in _fused(module):
            for name in _ADDED:
                if hasattr(attention_module, name):
                    delattr(attention_module, name)
            attention_module.fused_projections = False


def seen(pipe: Pipeline, context: Context) -> str | None:
    fused = [n for n, m in denoisers(pipe).items() if _fused(m)]
    return f"attentions of {names(fused)} have fused projections" if fused else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    """Every attention that can be fused is, and its processor computes with the fused weights."""
    told = []
    for name, module in _targets(pipe).items():
        fused = {path for path, part in module.named_modules() if _is_fused(part)}
        if not fused:
            raise NotApplied("fuse_qkv", f"no attention of {name} has fused projections")
        whole = {path for path, part in module.named_modules() if _can_fuse(part)}
        if missing := whole - fused:
            raise NotApplied("fuse_qkv", f"{hooks.first(missing)} of {name} has no fused projections")
        told.append(f"{len(fused)} attentions of {name} project queries, keys and values at once")
    return "; ".join(told)


def _can_fuse(part: Any) -> bool:
    return hasattr(part, "fuse_projections") and getattr(part, "_supports_qkv_fusion", True)
