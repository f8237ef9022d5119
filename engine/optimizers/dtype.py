"""`dtype`: the precision the pipeline is loaded and computes in."""

from __future__ import annotations

from typing import Any

from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, modules, names
from engine.values import Step

BFLOAT16_SINCE = (8, 0)

SPEC = Spec(
    name="dtype",
    summary="load and compute in this precision; auto takes what the card computes fastest in without loss of range",
    slot=10,
    scalar=True,
    params=(
        Param(
            name="value",
            kind="word",
            default="auto",
            choices=("auto", "bfloat16", "float16", "float32"),
            about="bfloat16 from compute capability 8.0 on, float16 below, float32 without an accelerator, when auto",
        ),
    ),
)


def resolve_auto(compute_capability: tuple[int, int] | None) -> str:
    """Return the dtype for a card; bfloat16 has tensor-core support from Ampere (8.0) on."""
    if compute_capability is None:
        return "auto"
    return "bfloat16" if compute_capability >= BFLOAT16_SINCE else "float16"


def load_arguments(step: Step, context: Context) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, context.dtype)}


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    """Nothing: precision is settled while loading, where what must stay in float32 is left alone."""


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Nothing, as nothing was done after loading."""


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    # `module.dtype` is the first floating-point parameter's; single layers may be kept in float32 on purpose.
    seen = {n: str(m.dtype).removeprefix("torch.") for n, m in modules(pipe).items() if hasattr(m, "dtype")}
    wrong = {n: d for n, d in seen.items() if d != context.dtype}
    if wrong:
        raise NotApplied("dtype", f"{', '.join(f'{n} is {d}' for n, d in wrong.items())}; planned was {context.dtype}")
    return f"{names(seen)} in {context.dtype}"
