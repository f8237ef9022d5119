"""What an operator computes, as a `Work`: the sizes that decide how long it takes and what workspace it wants."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.dryrun.tensors import tensors_in
from engine.estimate.trace import Work

aten = torch.ops.aten

# They make room or another view, and start nothing on the device.
_NOTHING = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
    aten.set_.source_Storage,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
}
_WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default}
_MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_CONVS = {aten.convolution.default, aten.convolution_overrideable.default}
_ATTENTIONS = {
    aten._scaled_dot_product_flash_attention.default: 1,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 1,
    aten._scaled_dot_product_efficient_attention.default: 2,
}


@cache
def _starts_nothing(func: Any) -> bool:
    """Whether an operator only gives another view of what is there."""
    if func in _NOTHING:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, device: str) -> Work | None:
    """Return the work of one operator on `device`, or None where the device has nothing to do."""
    if func in _WAITS:
        return Work("wait", "", (), 0)
    if _starts_nothing(func):
        return None
    out = [t for t in tensors_in((result,)) if t.device.type == device]
    read = [t for t in (*tensors_in(args), *tensors_in(kwargs.values())) if t.device.type == device]
    if not out:
        # A copy to the host: it waits for everything before it.
        return Work("wait", "", (), 0) if read else None
    is_written_in_place = any(o is t for o in out for t in read)
    moved = sum(t.numel() * t.element_size() for t in read) + sum(
        t.numel() * t.element_size() for t in out if not (is_written_in_place and func is aten.copy_.default)
    )
    dtype = str(out[0].dtype).removeprefix("torch.")
    if func in _MATMULS:
        return Work("matmul", dtype, _matmul(args), moved)
    if func in _CONVS:
        return Work("conv", dtype, _conv(args, out[0]), moved)
    if func in _ATTENTIONS:
        query, key = args[0], args[1]
        batch, heads, queries, width = query.shape
        return Work("attention", dtype, (batch, heads, queries, key.shape[2], width, _ATTENTIONS[func]), moved)
    if func is aten.native_group_norm.default:
        return Work("group_norm", dtype, (args[3] * args[6],), moved)
    return Work("memory", dtype, (), moved)


def _matmul(args: tuple[Any, ...]) -> tuple[int, ...]:
    left, right = [a for a in args if isinstance(a, Tensor)][-2:]
    batch = left.shape[0] if left.dim() == 3 else 1
    return batch, left.shape[-2], right.shape[-1], left.shape[-1]


def _conv(args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
    given, weight, _, stride, _, dilation, is_transposed, _, groups = args[:9]
    spatial = range(given.dim() - 2)

    def each(values: Any) -> list[int]:
        return [int(values[i] if len(values) > 1 else values[0]) for i in spatial]

    channels_out = weight.shape[1] * groups if is_transposed else weight.shape[0]
    return (
        given.shape[0],
        given.shape[1],
        channels_out,
        int(groups),
        int(is_transposed),
        *given.shape[2:],
        *weight.shape[2:],
        *each(stride),
        *each(dilation),
        *out.shape[2:],
    )
