"""Operators on meta tensors, each kind of call computed once.

On meta, many operators run Python that takes a hundred times as long as making the result, and a model calls the same
few hundred over and over. What a pure operator gives depends on shapes, strides, dtypes and plain arguments alone, so
that the next call of the kind is answered by an empty tensor like the first one's. What is learnt from the first call
is checked on it: that its results are fresh (they share no storage), and that an in-place operator left the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_KINDS = 20_000
_META = torch.device("meta")
_PLAIN = (type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_NUMBERS = (bool, int, float, complex)


class _Like(NamedTuple):
    """A fresh tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=_META)


_ITSELF, _UNKNOWN = object(), object()
_kinds: dict[Any, Any] = {}
"""Of each kind of call: a `_Like`, a tuple of them and plain values, `_ITSELF` (the first argument), `_UNKNOWN`."""


@dataclass(slots=True)
class Operator:
    """What an operator's schema tells."""

    func: Any
    written: tuple[int, ...]
    """Positions of the arguments that it writes to."""
    is_view: bool
    is_pointwise: bool
    is_random: bool
    is_in_place: bool
    """Whether the first argument is written to and returned, and nothing else."""

    def result(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the operator gives."""
        # Views are quick, and what they share matters.
        if self.is_view or (self.written and not self.is_in_place):
            return self.func(*args, **kwargs)
        try:
            named = [(k, _described(v)) for k, v in kwargs.items()] if kwargs else ()
            kind = (id(self), torch.get_default_dtype(), *map(_described, args), *named)
            known = _kinds.get(kind)
        except TypeError:
            return self.func(*args, **kwargs)
        if known is None:
            return self._first(kind, args, kwargs)
        if type(known) is _Like:
            return known.made()
        if known is _ITSELF:
            return args[0]
        if known is _UNKNOWN:
            return self.func(*args, **kwargs)
        return tuple(one.made() if type(one) is _Like else one for one in known)

    def _first(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        before = _place(args[0]) if self.is_in_place else None
        result = self.func(*args, **kwargs)
        if self.is_in_place:
            _kinds[kind] = _ITSELF if result is args[0] and _place(result) == before else _UNKNOWN
            return result
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs.values()))}
        is_one = isinstance(result, Tensor)
        likes = [_like(t, given) for t in ((result,) if is_one else result)]
        if _UNKNOWN in likes:
            _kinds[kind] = _UNKNOWN
        else:
            _kinds[kind] = likes[0] if is_one else tuple(likes) if type(result) is tuple else _UNKNOWN
        return result


def laid_out(result: Any, args: tuple[Any, ...]) -> Any:
    """Return what is computed pointwise of one tensor and numbers as it is laid out on devices: as the tensor is.

    On meta the stride of a dimension of one element comes out as another, and that can tell channels-last from not.
    """
    given = [a for a in args if isinstance(a, Tensor) and a.dim()]
    if len(given) != 1 or type(result) is not Tensor or result.stride() == given[0].stride() or not result.is_meta:
        return result
    if result.shape != given[0].shape:
        return result
    strides = zip(result.shape, result.stride(), given[0].stride(), strict=True)
    if any(size > 1 and mine != its for size, mine, its in strides):
        return result
    return torch.empty_strided(result.shape, given[0].stride(), dtype=result.dtype, device=_META)


# By `id`, since an operator's hash is computed in Python each time; what is kept here keeps its number.
_operators: dict[int, Operator] = {}


def of(func: Any) -> Operator:
    """Return what is known of an operator."""
    known = _operators.get(id(func))
    if known is None:
        known = _operators[id(func)] = _read(func)
    return known


def _read(func: Any) -> Operator:
    taken, given = func._schema.arguments, func._schema.returns
    written = tuple(k for k, a in enumerate(taken) if a.alias_info is not None and a.alias_info.is_write)
    is_in_place = written == (0,) and len(given) == 1 and given[0].alias_info is not None
    # `set_` gives a tensor another storage, which of two that look alike is not told by their looks.
    is_in_place = is_in_place and not func._schema.name.startswith("aten::set_")
    return Operator(
        func=func,
        written=written,
        is_view=not written and any(r.alias_info is not None for r in given),
        is_pointwise=torch.Tag.pointwise in func.tags,
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_in_place=is_in_place,
    )


def _described(item: Any) -> Any:
    """Return what of an argument decides about the result. Raises: TypeError, when that cannot be told."""
    kind = type(item)
    if kind is Tensor or kind is torch.nn.Parameter:
        # A conjugated or negated view computes as what it is a view of would not.
        if not item.is_meta or item.is_neg() or item.is_conj():
            raise TypeError
        return item.dtype, item.shape, item.stride()
    if kind in _NUMBERS:
        return kind, item  # 1, 1.0 and True are equal, and promote otherwise
    if kind in _PLAIN:
        return item
    if kind is list or kind is tuple or kind is torch.Size:
        return tuple(map(_described, item))
    raise TypeError


def _like(tensor: Any, given: set[int]) -> Any:
    """Return how a result is made again, or `_UNKNOWN` when it is not fresh. `given` are storages that are taken."""
    if tensor is None or type(tensor) is int:
        return tensor
    if type(tensor) is not Tensor or not tensor.is_meta or tensor.storage_offset():
        return _UNKNOWN
    storage = tensor.untyped_storage()
    like = _Like(tensor.shape, tensor.stride(), tensor.dtype)
    is_fresh = storage._cdata not in given and not tensor.is_neg() and not tensor.is_conj()
    if not is_fresh or like.made().untyped_storage().nbytes() != storage.nbytes():
        return _UNKNOWN
    given.add(storage._cdata)
    return like


def _place(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata


def _tensors(items: Any) -> list[Tensor]:
    found = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif not isinstance(item, str) and hasattr(item, "__iter__"):
            found += _tensors(item)
    return found
