"""`tf32`: products of float32 matrices are computed in TF32, which keeps 10 of the 23 bits behind the point.

Source of the behaviour: torch 2.13, `torch.backends.cuda.matmul.allow_tf32` and `torch.backends.cudnn.allow_tf32`. The
switch of products is off unless somebody sets it, and that of convolutions is on. Setting the older of torch's two
kinds of switch sets the newer as well, and not the other way round: whoever reads the older one then meets an error.
Both are the process's. What they were is put back when the last pipeline that asked for them has taken it back.
"""

from __future__ import annotations

import weakref
from typing import Any

from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="tf32",
    summary="products of float32 matrices are computed in TF32, on tensor cores",
    slot=2,
    quality="near",
    is_of_process=True,
)
load_arguments = nothing_to_load

_TF32 = "tf32"
_holders: list[weakref.ref[Any]] = []
"""The pipelines that asked for it."""
_before: list[dict[str, str]] = []
"""What the switches were before the first of them did; empty while none does."""


def _switches() -> dict[str, Any]:
    """Return what has a `fp32_precision` of its own, by name."""
    import torch

    cudnn: Any = torch.backends.cudnn
    return {"products": torch.backends.cuda.matmul, "convolutions": cudnn.conv, "recurrences": cudnn.rnn}


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch

    if not _before:
        _before.append({name: switch.fp32_precision for name, switch in _switches().items()})
    if not any(held() is pipe for held in _holders):
        _holders.append(weakref.ref(pipe))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    switches = _switches()
    other = {n: switches[n].fp32_precision for n in ("products", "convolutions")}
    plain = [f"{name} of float32 are computed in {how}" for name, how in other.items() if how != _TF32]
    if plain:
        raise NotApplied(SPEC.name, "; ".join(plain))
    return "products and convolutions of float32 are computed in TF32"


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Put the switches back, unless another pipeline still asks for them."""
    import torch

    _holders[:] = [held for held in _holders if held() is not None and held() is not pipe]
    if _holders or not _before:
        return
    before = _before.pop()
    if before["products"] != _TF32:
        torch.backends.cuda.matmul.allow_tf32 = False
    for name, switch in _switches().items():
        switch.fp32_precision = before[name]
