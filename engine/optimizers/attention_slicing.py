"""`attention_slicing`: a UNet computes the scores of its attention for some heads at a time.

Source of the behaviour: `set_attention_slice` of diffusers 0.42, which UNets have and transformers have not. Its slices
compute attention step by step and hold the matrix of scores: that saves memory where no fused attention kernel fits,
and costs some where one does. Between the steps scores are rounded to the dtype, so that the result is near.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, names, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="attention_slicing",
    summary="a UNet computes the scores of its attention for some heads at a time",
    slot=35,
    quality="near",
    changes_computing=True,
    params=(
        Param(
            name="slices",
            kind="word",
            default="auto",
            choices=("auto", "max"),
            about="auto takes half of the heads at a time, max one head",
        ),
    ),
)
load_arguments = nothing_to_load
_BEFORE: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""What attended in a module before its attention was sliced, for `undo`."""


def _targets(pipe: Pipeline) -> dict[str, Any]:
    return {n: m for n, m in denoisers(pipe).items() if hasattr(m, "set_attention_slice")}


def _processors(module: Any) -> list[Any]:
    return list(module.attn_processors.values())


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    targets = _targets(pipe)
    if not targets:
        raise IncompatibleError(
            f"attention_slicing cannot act on {type(pipe).__name__}",
            "its denoiser has no sliced attention: only UNets have it",
            "leave attention_slicing out for this model",
        )
    for module in targets.values():
        _BEFORE[module] = dict(module.attn_processors)
        module.set_attention_slice(step.params["slices"])
        for processor in _processors(module):
            # The half of one head is none, and the library would divide by it.
            processor.slice_size = max(1, processor.slice_size)


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    for module in _targets(pipe).values():
        module.set_attn_processor(_BEFORE.pop(module))


def seen(pipe: Pipeline, context: Context) -> str | None:
    sliced = [n for n, m in _targets(pipe).items() if any(_is_sliced(p) for p in _processors(m))]
    return f"attentions of {names(sliced)} are in slices" if sliced else None


def _is_sliced(processor: Any) -> bool:
    return type(processor).__name__.startswith("SlicedAttn")


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    told = []
    for name, module in _targets(pipe).items():
        processors = _processors(module)
        whole = [p for p in processors if not _is_sliced(p)]
        if whole or not processors:
            raise NotApplied("attention_slicing", f"{len(whole)} of {len(processors)} attentions of {name} are whole")
        for path, part in module.named_modules():
            if not hasattr(part, "sliceable_head_dim") or not hasattr(part, "processor"):
                continue
            planned = 1 if step.params["slices"] == "max" else max(1, part.sliceable_head_dim // 2)
            if part.processor.slice_size != planned:
                raise NotApplied(
                    "attention_slicing",
                    f"{name}.{path} takes {part.processor.slice_size} heads at a time; planned was {planned}",
                )
        told.append(f"{len(processors)} attentions of {name} in slices")
    return "; ".join(told)
