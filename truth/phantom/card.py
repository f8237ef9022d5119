"""The phantom device as its process sees it: what it is told beside CUDA's own functions. Sizes are in bytes.

Runs where the phantom device is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.dryrun import twins

AMPLE_BYTES = 1 << 38
_LIBRARY = ctypes.CDLL("libphantom.so")
_LIBRARY.phantom_set_capacity.argtypes = [ctypes.c_size_t]
_LIBRARY.phantom_answer.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
_LIBRARY.phantom_answers.restype = _LIBRARY.phantom_misses.restype = ctypes.c_size_t

Answer = tuple[int, bytes | None]
"""What a read of the device gives: its bytes, and the value where it is known."""

aten = torch.ops.aten


def set_capacity(size_bytes: int | None) -> None:
    """Let the device have so much memory from now on."""
    _LIBRARY.phantom_set_capacity(AMPLE_BYTES if size_bytes is None else size_bytes)


def tell(answers: list[Answer]) -> None:
    """Let the next reads of the device give these."""
    for size, value in answers:
        _LIBRARY.phantom_answer(value, size)


@contextlib.contextmanager
def weights_keep_theirs() -> Iterator[None]:
    """Give no answer to who moves a module's weights: they are read as well."""
    real: Any = nn.Module._apply

    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        _LIBRARY.phantom_mute(1)
        try:
            return real(self, *args, **kwargs)
        finally:
            _LIBRARY.phantom_mute(0)

    nn.Module._apply = moved  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = real  # type: ignore[method-assign]


def untold() -> tuple[int, int]:
    """Return how many answers are left, and how many reads found none of theirs."""
    return _LIBRARY.phantom_answers(), _LIBRARY.phantom_misses()


@contextlib.contextmanager
def listening() -> Iterator[list[Answer]]:
    """Collect what a dry run reads of the device, in order: kernels do nothing here, and it would not know."""
    heard: list[Answer] = []
    real = twins.call

    def call(func: Any, args: Any, kwargs: Any) -> Any:
        result = real(func, args, kwargs)
        hears = _HEARS.get(func)
        if hears is not None:
            heard.extend(hears(args, result))
        return result

    twins.call = call
    try:
        yield heard
    finally:
        twins.call = real


def _bytes(value: Tensor) -> bytes:
    return bytes(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _scalar(args: Any, result: Any) -> Iterator[Answer]:
    if args[0].is_meta:
        value = _bytes(torch.tensor([result], dtype=args[0].dtype))
        yield len(value), value


def _truth(args: Any, result: Any) -> Iterator[Answer]:
    if args[0].is_meta:
        yield 1, bytes([bool(result)])


def _count(args: Any, result: Any) -> Iterator[Answer]:
    if args[0].is_meta:
        yield 4, len(result).to_bytes(4, "little")


def _repeats(args: Any, result: Any) -> Iterator[Answer]:
    """None is negative; and as many there are."""
    if args[0].is_meta:
        yield 1, b"\1"
        yield 8, len(result).to_bytes(8, "little")


def _extremes(args: Any, result: Any) -> Iterator[Answer]:
    if args[0].is_meta:
        yield 8, bytes(8)
        yield 8, (len(result) - 1).to_bytes(8, "little")


def _counts(args: Any, result: Any) -> Iterator[Answer]:
    """Masks that pick: each is counted first."""
    for mask in args[1]:
        if mask is not None and mask.is_meta and mask.dtype in (torch.bool, torch.uint8):
            value = twins.twin(mask)
            yield 4, None if value is None else int(value.count_nonzero()).to_bytes(4, "little")


def _copy_out(args: Any, result: Any) -> Iterator[Answer]:
    if args[0].is_meta and not result.is_meta:
        yield from _out(args[0])


def _copy_over(args: Any, result: Any) -> Iterator[Answer]:
    if args[1].is_meta and not args[0].is_meta:
        yield from _out(args[1])


def _out(source: Tensor) -> Iterator[Answer]:
    size = source.numel() * source.element_size()
    value = twins.twin(source)
    if size:
        yield size, None if value is None else _bytes(value)


_HEARS: dict[Any, Callable[[Any, Any], Iterator[Answer]]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _truth,
    aten.nonzero.default: _count,
    aten.repeat_interleave.Tensor: _repeats,
    aten.bincount.default: _extremes,
    aten.index.Tensor: _counts,
    aten.index_put_.default: _counts,
    aten.index_put.default: _counts,
    aten._to_copy.default: _copy_out,
    aten.copy_.default: _copy_over,
}
