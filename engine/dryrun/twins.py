"""Real values beside small meta tensors, so that code which looks at values runs without any.

A scheduler's time steps, token ids, masks, scalars: a pipeline reads them (`item`, `nonzero`, index look-ups,
branches), and they are small. Each small tensor on `meta` carries a twin on the CPU that takes part in the same
operations, as long as every input of an operation has one. A large tensor has a twin only where it is one value all
over (zeros that stand for a picture that was not given); otherwise it has no value.

Where code routes by a value that is not there (experts, chosen by `topk`), one is assumed; `assumed` collects what was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves, tree_map

from engine.dryrun import shapes

MAX_ELEMENTS = 32_768
MAX_WHOLE_ELEMENTS = 1_048_576
"""Positions, masks and routes are worth more room than noise."""

_TWIN = "_dg_twin"
# Marks on storages, so that every view of one has them: a value that is gone; one value in one place for all elements;
# a host's copy of what has no value.
_STALE, _UNIFORM, _HOLLOW = "_dg_stale", "_dg_uniform", "_dg_hollow"
_VALUELESS, _FROM_HOST = 1, 2
"""A tensor without a value; a hollow one, which has none either."""
_META = torch.device("meta")
_CPU = torch.device("cpu")
aten = torch.ops.aten


class ValueNeeded(RuntimeError):
    """Code asked for the value of a tensor that has none: it is too large, or computed from what is."""


_assumptions: set[str] | None = None


@contextlib.contextmanager
def assumed() -> Iterator[set[str]]:
    """Collect, while this is active, which values were assumed that a run would have computed, as sentences."""
    global _assumptions
    before, _assumptions = _assumptions, set()
    try:
        yield _assumptions
    finally:
        _assumptions = before


def twin(tensor: Tensor) -> Tensor | None:
    """Return a tensor's real value: its twin on meta, itself elsewhere, None when it has none."""
    if not tensor.is_meta:
        return None if hasattr(tensor.untyped_storage(), _HOLLOW) else tensor
    value: Tensor | None = getattr(tensor, _TWIN, None)
    return None if value is None or hasattr(value.untyped_storage(), _STALE) else value


def give(tensor: Tensor, value: Tensor) -> Tensor:
    """Attach a real value to a meta tensor, and return the tensor."""
    setattr(tensor, _TWIN, value)
    return tensor


def hollow(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the host for what left the device without a value: zeros that take no memory.

    numpy sees the zeros, which no value was promised to be; an operator that reads them in a dry run is refused.
    """
    one = torch.zeros((), dtype=dtype)
    setattr(one.untyped_storage(), _HOLLOW, True)
    return one.expand(tuple(shape))


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an operator's result on meta tensors, with twins where every input has one.

    Raises: ValueNeeded, naming the operator, when it reads a value that is not there.
    """
    seen = _seen(args) | _seen(kwargs.values()) if kwargs else _seen(args)
    has_values = not seen & _VALUELESS
    answer = _ANSWERS.get(id(func))
    if answer is not None:
        answered = answer(func, args, kwargs, has_values)
        if answered is not NotImplemented:
            return answered
    if seen & _FROM_HOST:
        return _hollowed(func, args, kwargs)
    return _computed(func, args, kwargs, has_values)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_values: bool) -> Any:
    operator = shapes.of(func)
    result = operator.result(args, kwargs)
    if operator.is_pointwise:
        result = shapes.laid_out(result, args)
    # Noise is what nobody knows: a dry run goes the same way each time, whatever its size.
    has_values = has_values and not operator.is_random
    if operator.written:
        # One element in memory stands for all of a uniform value: it cannot be written to in part.
        is_followed = has_values and _is_small(result) and not any(_is_uniform(args[k]) for k in operator.written[:1])
        if is_followed:
            _pair(func, result, args, kwargs)
        else:
            _forget(operator.written, args)
    elif has_values:
        if _is_small(result):
            _pair(func, result, args, kwargs)
        elif isinstance(result, Tensor) and result.is_meta:
            _pair_uniform(operator, result, args, kwargs)
    return result


def _seen(items: Iterable[Any]) -> int:
    """Return what is among an operator's arguments, as flags."""
    flags = 0
    for item in items:
        if isinstance(item, Tensor):
            if item.is_meta:
                if not flags & _VALUELESS and twin(item) is None:
                    flags |= _VALUELESS
            elif hasattr(item.untyped_storage(), _HOLLOW):
                flags |= _VALUELESS | _FROM_HOST
        elif isinstance(item, list | tuple):
            flags |= _seen(item)
    return flags


def _is_small(result: Any) -> bool:
    if isinstance(result, Tensor):
        is_whole = not (result.dtype.is_floating_point or result.dtype.is_complex)
        return result.numel() <= (MAX_WHOLE_ELEMENTS if is_whole else MAX_ELEMENTS)
    return all(_is_small(t) for t in tree_leaves(result) if isinstance(t, Tensor))


def _real(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the real values, on the CPU."""
    if not kwargs:
        return func(*_values(args))
    named = {k: _value(v) for k, v in kwargs.items()}
    if named.get("device") is not None:
        named["device"] = _CPU
    return func(*_values(args), **named)


def _values(items: Iterable[Any]) -> list[Any]:
    return [_value(item) for item in items]


def _value(item: Any) -> Any:
    if isinstance(item, Tensor):
        return twin(item)
    return _values(item) if isinstance(item, list | tuple) else item


def _pair(func: Any, result: Any, args: Any, kwargs: Any) -> None:
    """Give each meta tensor of a result its value."""
    if isinstance(result, Tensor):
        if result.is_meta:
            value = _real(func, args, kwargs)
            if not (args and result is args[0]):  # in-place: its twin was written to already
                give(result, value)
        return
    meta = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_meta]
    if not meta:
        return
    given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
    real = [t for t in tree_leaves(_real(func, args, kwargs)) if isinstance(t, Tensor)]
    for tensor, value in zip(meta, real, strict=True):
        if id(tensor) not in given:
            give(tensor, value)


def _forget(written: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """What was written to from something without a value has none any more, and nor has any view that shares it."""
    for k in written:
        value = getattr(args[k], _TWIN, None) if k < len(args) and isinstance(args[k], Tensor) else None
        if value is not None:
            setattr(value.untyped_storage(), _STALE, True)


# One value all over: as large as it likes, it is one element in memory.

# What fills with one value: that value, or the position and name of the argument that says it.
_FILLS: dict[Any, float | tuple[int, str]] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full.default: (1, "fill_value"),
    aten.full_like.default: (1, "fill_value"),
    aten.new_full.default: (2, "fill_value"),
}


def _is_uniform(item: Any) -> bool:
    value = twin(item) if isinstance(item, Tensor) else None
    return value is not None and hasattr(value.untyped_storage(), _UNIFORM)


def _pair_uniform(operator: shapes.Operator, result: Tensor, args: Any, kwargs: Any) -> None:
    """Give a large tensor its value where that is one value all over; do nothing where it is not."""
    func = operator.func
    fill = _FILLS.get(func)
    if fill is not None:
        if isinstance(fill, tuple):
            position, name = fill
            fill = args[position] if len(args) > position else kwargs[name]
        one = torch.full((), fill, dtype=result.dtype)
    elif operator.is_view or operator.is_pointwise or func is aten._to_copy.default:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not tensors or not all(_is_uniform(t) or t.numel() == 1 for t in tensors):
            return
        if operator.is_view:
            give(result, _real(func, args, kwargs))
            return
        elements = tree_map(_element, (args, kwargs))
        one = _real(func, *elements).to(result.dtype)
    else:
        return
    setattr(one.untyped_storage(), _UNIFORM, True)
    give(result, one.expand(result.shape))


def _element(item: Any) -> Any:
    """Return the one value of a uniform tensor, on the host; anything else as it is."""
    value = twin(item) if isinstance(item, Tensor) else None
    return item if value is None else value.as_strided((), ())


# What leaves the device without a value.


def _hollowed(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on what has no value: nothing is made on the host, and what comes back onto the device has no value."""
    stays = kwargs.get("device") is not None and kwargs["device"].type == "meta"
    stays = stays or any(t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    written = [args[k] for k in shapes.of(func).written if k < len(args)]
    on_meta, named = tree_map(lambda t: _empty(t) if isinstance(t, Tensor) and not t.is_meta else t, (args, kwargs))
    if named.get("device") is not None:
        named["device"] = _META
    result = _computed(func, on_meta, named, has_values=False)
    for target in written:
        if not target.is_meta:
            setattr(target.untyped_storage(), _HOLLOW, True)
            return target
    return result if stays else tree_map(lambda t: hollow(t.shape, t.dtype) if isinstance(t, Tensor) else t, result)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)


# Operators that need an answer of their own: NotImplemented is "as any other".


def _read(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Give Python values; on meta there are none to give."""
    if not has_values:
        raise ValueNeeded(f"{func} reads a tensor that has no value in a dry run")
    return _real(func, args, kwargs)


def _shaped_by_values(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Give tensors whose shape depends on values."""
    is_host = not any(t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    result = _read(func, args, kwargs, has_values)
    if is_host:
        return result
    return tree_map(lambda v: give(torch.empty_like(v, device=_META), v) if isinstance(v, Tensor) else v, result)


def _picked(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Pick by masks through the positions that they pick, one list a dimension, so that the shape is known."""
    if all(i is None or i.dtype not in (torch.bool, torch.uint8) or not i.is_meta for i in args[1]):
        return NotImplemented
    picks = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8) or not index.is_meta:
            picks.append(index)
            continue
        value = twin(index)
        if value is None:
            raise ValueNeeded("aten.index picks by a mask that has no value in a dry run")
        picks += [give(torch.empty_like(p, device=_META), p) for p in value.nonzero(as_tuple=True)]
    args = (args[0], picks)
    return _computed(func, args, kwargs, not _seen(args) & _VALUELESS)


def _copied_out(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Copy from the device to the host: the value, or a hollow copy where there is none. Pictures leave so."""
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        if device is None or device.type == "meta" or not args[0].is_meta:
            return NotImplemented
        return _real(func, args, kwargs) if has_values else hollow(args[0].shape, kwargs.get("dtype") or args[0].dtype)
    if args[0].is_meta or not args[1].is_meta:
        return NotImplemented
    if has_values:
        return _real(func, args, kwargs)
    setattr(args[0].untyped_storage(), _HOLLOW, True)
    return args[0]


def _spread(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Choose the largest of what has no value: every one as often as any other. So tokens are routed to experts."""
    chosen_dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    scores = args[0]
    if has_values or not scores.is_meta or chosen_dim not in (-1, scores.dim() - 1):
        return NotImplemented
    result = _computed(func, args, kwargs, has_values)
    places = result[1]
    if _is_small(places):
        of = scores.shape[-1]
        give(places, (torch.arange(places.numel()) % of).view(places.shape))
        if _assumptions is not None:
            _assumptions.add(f"{places.shape[-1]} of {of} chosen by topk: every one as often as any other")
    return result


def _convolved(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
    """Lay a convolution's result out channels-last where its input or weight is: on meta it is always contiguous.

    As cuDNN and oneDNN do (`_conv_suggest_memory_format_impl` of torch's ConvUtils.h); a norm then copies it.
    """
    result = _computed(func, args, kwargs, has_values)
    formats = (suggest_memory_format(t) for t in args[:2])
    wanted = next((f for f in formats if f is not torch.contiguous_format), None)
    if wanted is None or not result.is_meta or result.dtype == torch.float64:
        return result
    value = twin(result)
    laid_out = torch.empty_like(result, memory_format=wanted)
    return laid_out if value is None else give(laid_out, value)


_ANSWERED: dict[Any, Callable[[Any, Any, Any, bool], Any]] = {
    aten._local_scalar_dense.default: _read,
    aten.equal.default: _read,
    aten.is_nonzero.default: _read,
    aten.nonzero.default: _shaped_by_values,
    aten.masked_select.default: _shaped_by_values,
    aten.unique_consecutive.default: _shaped_by_values,
    aten._unique2.default: _shaped_by_values,
    aten.repeat_interleave.Tensor: _shaped_by_values,
    aten.bincount.default: _shaped_by_values,
    aten.index.Tensor: _picked,
    aten._to_copy.default: _copied_out,
    aten.copy_.default: _copied_out,
    aten.topk.default: _spread,
    aten.convolution.default: _convolved,
}
# By `id`, since an operator's hash is computed in Python each time.
_ANSWERS = {id(func): answer for func, answer in _ANSWERED.items()}
