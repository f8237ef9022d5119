"""What an operator computes, as a `Work`: the sizes that decide how long it takes and what workspace it wants."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.dryrun import kernels
from engine.dryrun.tensors import tensors_in
from engine.estimate.trace import NAMED, Work

aten = torch.ops.aten
_CUDA: Any = torch.backends.cuda

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


def _starts_nothing(func: Any) -> bool:
    """Whether an operator only gives another view of what is there."""
    if func in _NOTHING:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, device: str) -> Work | None:
    """Return the work of one operator on `device`, or None where the device has nothing to do."""
    kind = _kind(func)
    if kind == "nothing":
        return None
    if kind == "wait":
        return _WAIT
    moved, dtype = 0, None
    for tensor in tensors_in((result,)):
        if tensor.device.type == device:
            dtype = dtype or tensor.dtype
            moved += tensor.nbytes
    read = 0
    for tensor in tensors_in((*args, *kwargs.values()) if kwargs else args):
        if tensor.device.type == device:
            read += tensor.nbytes
    if dtype is None:
        # A copy to the host: it waits for everything before it.
        return _WAIT if read else None
    if func is not aten.copy_.default:  # which does not read what it writes to
        moved += read
    else:
        moved += read - tensors_in(args[:1])[0].nbytes
    name = _dtype_name(dtype)
    match kind:
        case "matmul":
            return Work("matmul", name, _matmul(args), moved)
        case "conv":
            if kernels.is_last(args[1]):
                copied = sum(kernels.held(func, args)[0])
                return Work("conv_last", name, _conv(args, result), moved + 2 * copied)
            return Work("conv", name, _conv(args, result), moved)
        case "attention":
            query, key = args[0], args[1]
            batch, heads, queries, width = query.shape
            # Where cuDNN's kernel is ruled out, as it is by naming another, it does not take the place of this one.
            kernel = _ATTENTIONS[func] + (0 if _CUDA.cudnn_sdp_enabled() else NAMED)
            return Work("attention", name, (batch, heads, queries, key.shape[2], width, kernel), moved)
        case "group_norm":
            return Work("group_norm", name, (args[3] * args[6],), moved)
    return Work("memory", name, (), moved)


_WAIT = Work("wait", "", (), 0)


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _kind(func: Any) -> str:
    if func in _WAITS:
        return "wait"
    if _starts_nothing(func):
        return "nothing"
    if func in _MATMULS:
        return "matmul"
    if func in _CONVS:
        return "conv"
    if func in _ATTENTIONS:
        return "attention"
    return "group_norm" if func is aten.native_group_norm.default else "memory"


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
