"""What CUDA's operators hold while they compute, beside what they are given and what they give: in bytes.

Below the dispatcher, where a dry run cannot see. Each rule was read off torch's CUDA build (2.14), whose host code ran
every kind of call of the catalogue's models on a device that computes nothing (`truth/phantom`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten

_FLOAT_BYTES = 4


Held = tuple[Sequence[int], Sequence[int]]
"""The bytes of each temporary: of those made before the results, and of those made after them."""
_NOTHING: Held = (), ()


def held(func: Any, args: tuple[Any, ...]) -> Held:
    """Return the bytes of each temporary of one operator."""
    rule = _RULES.get(id(func))
    if rule is None:
        return _NOTHING
    before, after = rule(args)
    return [n for n in before if n], [n for n in after if n]


def laid_out(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Return the result of an operator on `meta` in the layout that a device gives it.

    A convolution's is channels-last where its filters are (`cudnn_conv_suggest_memory_format` of torch's ConvUtils.h,
    and mkldnn's alike); on `meta` it is always planar.
    """
    if func is not aten.convolution.default or not is_last(args[1]):
        return result
    return torch.empty_like(result, memory_format=torch.channels_last)


def is_last(weight: Tensor) -> bool:
    """Whether filters have their channels last."""
    return weight.dim() == 4 and suggest_memory_format(weight) is torch.channels_last


def _copied(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> int:
    """Return the bytes of the copy that is made of a tensor that is not laid out as the kernel reads it."""
    return 0 if tensor.is_contiguous(memory_format=layout) else tensor.numel() * tensor.element_size()


def _convolution(args: tuple[Any, ...]) -> Held:
    """Input and filters come in one layout: channels-last where either is so."""
    given, weight = args[:2]
    layout = torch.contiguous_format
    if torch.float64 not in (given.dtype, weight.dtype):
        formats = (suggest_memory_format(given), suggest_memory_format(weight))
        layout = next((f for f in formats if f is not torch.contiguous_format), layout)
    return [_copied(given, layout), _copied(weight, layout)], ()


def _layer_norm(args: tuple[Any, ...]) -> Held:
    return [_copied(args[0])], ()


def _group_norm(args: tuple[Any, ...]) -> Held:
    """A factor and a shift for each channel of each picture, float32; for half precision the moments in float32 too."""
    given, weight, bias, batch, channels, _, groups = args[:7]
    each = 0 if weight is None and bias is None else batch * channels * _FLOAT_BYTES
    moments = batch * groups * _FLOAT_BYTES if given.element_size() < _FLOAT_BYTES else 0
    return [_copied(given)], [moments, moments, each, each]


def _upsample_nearest(args: tuple[Any, ...]) -> Held:
    return (), [_copied(args[0], suggest_memory_format(args[0]))]


def _isinf(args: tuple[Any, ...]) -> Held:
    """Whether the absolute value is infinite."""
    given = args[0]
    return [given.numel() * given.element_size() if given.dtype.is_floating_point else 0], ()


_BY_OPERATOR: dict[Any, Callable[[tuple[Any, ...]], Held]] = {
    aten.convolution.default: _convolution,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.upsample_nearest1d.default: _upsample_nearest,
    aten.upsample_nearest2d.default: _upsample_nearest,
    aten.upsample_nearest3d.default: _upsample_nearest,
    aten._upsample_nearest_exact1d.default: _upsample_nearest,
    aten._upsample_nearest_exact2d.default: _upsample_nearest,
    aten._upsample_nearest_exact3d.default: _upsample_nearest,
    aten.isinf.default: _isinf,
}
# By `id`, since an operator's hash is computed in Python each time.
_RULES = {id(func): rule for func, rule in _BY_OPERATOR.items()}
