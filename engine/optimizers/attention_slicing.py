"""`attention_slicing`: a UNet computes the scores of its attention for some heads at a time.

Source of the behaviour: `set_attention_slice` of diffusers 0.42, which UNets have and transformers have not. Its slices
compute attention step by step and hold the matrix of scores: that saves memory where no fused attention kernel fits,
and costs some where one does. Between the steps scores are rounded to the dtype, so that the result is near.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, nothing_to_load
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
        module.set_attention_slice(step.params["slices"])
        for processor in _processors(module):
            # The half of one head is none, and the library would divide by it.
            processor.slice_size = max(1, processor.slice_size)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    told = []
    for name, module in _targets(pipe).items():
        processors = _processors(module)
        whole = [p for p in processors if not type(p).__name__.startswith("SlicedAttn")]
        if whole or not processors:
            raise NotApplied("attention_slicing", f"{len(whole)} of {len(processors)} attentions of {name} are whole")
        told.append(f"{len(processors)} attentions of {name} in slices")
    return "; ".join(told)
