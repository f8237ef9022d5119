"""`dtype`: the precision the pipeline is loaded and computes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.optimizers import hooks
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
    """Every weight is in it, but for those that its class keeps in float32, and layers that are cast."""
    seen = [n for n, m in modules(pipe).items() if hasattr(m, "dtype")]
    wrong: dict[str, str] = {}
    for name in seen:
        for path, found, planned in _otherwise(modules(pipe)[name], context.dtype):
            wrong.setdefault(name, f"{name} is {found} ({path}; planned was {planned})")
    if wrong:
        raise NotApplied("dtype", f"{', '.join(wrong.values())}, under {context.dtype}")
    return f"{names(seen)} in {context.dtype}"


def _otherwise(module: Any, dtype: str) -> Iterator[tuple[str, str, str]]:
    """Yield the weights that are in another precision: the path, what it is in, and what it should be in."""
    kept = _kept_wide(module, dtype)
    cast = {path: hook.storage_dtype for path, hook in hooks.of(module, "layerwise_casting").items()}
    for path, weight in module.named_parameters():
        if not weight.is_floating_point() or weight.dtype == cast.get(path.rpartition(".")[0]):
            continue
        found = str(weight.dtype).removeprefix("torch.")
        is_kept = any(k in path.split(".") for k in kept)
        # The libraries match names in several ways: what may be meant by one of them may be wide.
        may_be_wide = found == "float32" and any(k in path for k in kept)
        if found != ("float32" if is_kept else dtype) and not may_be_wide:
            yield path, found, "float32" if is_kept else dtype


def _kept_wide(module: Any, dtype: str) -> frozenset[str]:
    """Return the names of the layers that loading leaves in float32: T5's `wo` in float16, Wan's norms in both.

    Source: `_keep_in_fp32_modules` of diffusers 0.42, which counts in either narrow precision; of transformers 5.23,
    where it counts in float16, and `_keep_in_fp32_modules_strict` in both.
    """
    lists = [getattr(module, "_keep_in_fp32_modules_strict", None)]
    if dtype == "float16" or not type(module).__module__.startswith("transformers."):
        lists.append(getattr(module, "_keep_in_fp32_modules", None))
    return frozenset(n for found in lists for n in ([found] if isinstance(found, str) else found or ()))
