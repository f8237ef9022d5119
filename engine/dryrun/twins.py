"""Real values beside small meta tensors, so that code which looks at values runs without any.

A scheduler's time steps, token ids, masks, scalars: a pipeline reads them (`item`, `nonzero`, index look-ups,
branches), and they are small. Each small tensor on `meta` carries a twin on the CPU that takes part in the same
operations, as long as every input of an operation has one. Large tensors have no twins, and no values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

MAX_ELEMENTS = 65_536
_ATTRIBUTE = "_dg_twin"
_STALE = "_dg_stale"
aten = torch.ops.aten

# These give Python values; on meta they have nothing to give.
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
# These give tensors whose shape depends on values.
_SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}


class ValueNeeded(RuntimeError):
    """Code asked for the value of a tensor that has none: it is too large, or computed from what is."""


def twin(tensor: Tensor) -> Tensor | None:
    """Return a tensor's real value: its twin on meta, itself elsewhere, None when it has none."""
    if tensor.device.type != "meta":
        return tensor
    value: Tensor | None = getattr(tensor, _ATTRIBUTE, None)
    return None if value is None or hasattr(value.untyped_storage(), _STALE) else value


def give(tensor: Tensor, value: Tensor) -> Tensor:
    """Attach a real value to a meta tensor, and return the tensor."""
    setattr(tensor, _ATTRIBUTE, value)
    return tensor


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an operator's result on meta tensors, with twins where every input has one.

    Raises: ValueNeeded, naming the operator, when it reads a value that is not there.
    """
    flat, shape = tree_flatten((args, kwargs))
    values = [twin(a) if isinstance(a, Tensor) else a for a in flat]
    has_values = all(v is not None or a is None for v, a in zip(values, flat, strict=True))
    if func in _READS or func in _SHAPED_BY_VALUES:
        if not has_values:
            raise ValueNeeded(f"{func} reads a tensor that has no value in a dry run")
        result = _real(func, values, shape)
        return _on_meta(result) if func in _SHAPED_BY_VALUES else result
    if func is aten.index.Tensor:
        args = (args[0], [position for index in args[1] for position in _positions(index)])
        flat, shape = tree_flatten((args, kwargs))
        values = [twin(a) if isinstance(a, Tensor) else a for a in flat]
        has_values = all(v is not None or a is None for v, a in zip(values, flat, strict=True))
    if _leaves_meta(func, flat, kwargs):
        return _copied_out(func, flat, values, shape, has_values)
    result = func(*args, **kwargs)
    if not has_values or not _is_small(result):
        _forget(func, args)
        return result
    _pair(func, result, values, shape, flat)
    return result


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """Return a mask as the positions that it picks, one list a dimension, so that the result's shape is known.

    Raises: ValueNeeded, when the mask has no value.
    """
    if index is None or index.dtype != torch.bool or index.device.type != "meta":
        return [index]
    value = twin(index)
    if value is None:
        raise ValueNeeded("aten.index picks by a mask that has no value in a dry run")
    return [give(torch.empty_like(p, device="meta"), p) for p in value.nonzero(as_tuple=True)]


def _real(func: Any, values: list[Any], shape: Any) -> Any:
    """Run an operator on the real values, on the CPU."""
    args, kwargs = tree_unflatten(values, shape)
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs["device"] = torch.device("cpu")
    return func(*args, **kwargs)


def _on_meta(result: Any) -> Any:
    """Return real tensors as meta tensors with twins."""
    leaves, shape = tree_flatten(result)
    moved = [give(torch.empty_like(v, device="meta"), v) if isinstance(v, Tensor) else v for v in leaves]
    return tree_unflatten(moved, shape)


def _leaves_meta(func: Any, flat: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator copies a meta tensor to the host."""
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        return device is not None and device.type != "meta" and flat[0].device.type == "meta"
    return func is aten.copy_.default and flat[0].device.type != "meta" and flat[1].device.type == "meta"


def _copied_out(func: Any, flat: list[Any], values: list[Any], shape: Any, has_values: bool) -> Any:
    """Return the host's copy: the value, or zeros that take no memory where there is none.

    Pictures leave the device so. Code that looks at such a copy sees zeros, which no value was promised to be.
    """
    if has_values:
        return _real(func, values, shape)
    if func is aten.copy_.default:
        return flat[0]
    source: Tensor = flat[0]
    _, kwargs = tree_unflatten(flat, shape)
    return torch.zeros((), dtype=kwargs.get("dtype") or source.dtype).expand(source.shape)


def _is_small(result: Any) -> bool:
    return all(t.numel() <= MAX_ELEMENTS for t in tree_leaves(result) if isinstance(t, Tensor))


def _forget(func: Any, args: tuple[Any, ...]) -> None:
    """What was written to from something without a value has none any more, and nor has any view that shares it."""
    if not func._schema.is_mutable:
        return
    for argument, given in zip(func._schema.arguments, args, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        value = getattr(given, _ATTRIBUTE, None) if is_written and isinstance(given, Tensor) else None
        if value is not None:
            setattr(value.untyped_storage(), _STALE, True)


def _pair(func: Any, result: Any, values: list[Any], shape: Any, flat: list[Any]) -> None:
    """Give each meta tensor of a result its value."""
    meta = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.device.type == "meta"]
    if not meta:
        return
    real = [t for t in tree_leaves(_real(func, values, shape)) if isinstance(t, Tensor)]
    for tensor, value in zip(meta, real, strict=True):
        if not any(tensor is a for a in flat):  # in-place: its twin was written to already
            give(tensor, value)
