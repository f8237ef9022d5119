"""The phantom device as its process sees it: what it is told beside CUDA's own functions. Sizes are in bytes.

Runs where the phantom device is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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


def untold() -> tuple[int, int]:
    """Return how many answers are left, and how many reads found none of theirs."""
    return _LIBRARY.phantom_answers(), _LIBRARY.phantom_misses()


@contextlib.contextmanager
def listening() -> Iterator[list[Answer]]:
    """Collect what a dry run reads of the device, in order: kernels do nothing on the phantom, and it would not know."""
    heard: list[Answer] = []
    before = dict(twins._ANSWERS)
    for function, hears in _HEARS.items():
        twins._ANSWERS[id(function)] = _heard(before[id(function)], hears, heard)
    try:
        yield heard
    finally:
        twins._ANSWERS.update(before)


def _heard(real: Callable[..., Any], hears: Callable[..., Answer | None], heard: list[Answer]) -> Callable[..., Any]:
    def answer(func: Any, args: Any, kwargs: Any, has_values: bool) -> Any:
        result = real(func, args, kwargs, has_values)
        if (said := hears(args, kwargs, result)) is not None:
            heard.append(said)
        return result

    return answer


def _bytes(value: Tensor) -> bytes:
    return bytes(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _scalar(args: Any, kwargs: Any, result: Any) -> Answer | None:
    if not args[0].is_meta:
        return None
    value = _bytes(torch.tensor([result], dtype=args[0].dtype))
    return len(value), value


def _truth(args: Any, kwargs: Any, result: Any) -> Answer | None:
    return (1, bytes([bool(result)])) if args[0].is_meta else None


def _count(args: Any, kwargs: Any, result: Any) -> Answer | None:
    if not args[0].is_meta:
        return None
    return 4, len(result).to_bytes(4, "little")


def _copy_out(args: Any, kwargs: Any, result: Any) -> Answer | None:
    if result is NotImplemented or not args[0].is_meta or result.is_meta:
        return None
    return _out(args[0], result)


def _copy_over(args: Any, kwargs: Any, result: Any) -> Answer | None:
    if result is NotImplemented or args[0].is_meta or not args[1].is_meta:
        return None
    return _out(args[1], result)


def _out(source: Tensor, result: Tensor) -> Answer | None:
    size = source.numel() * source.element_size()
    value = twins.twin(source)
    return (size, None if value is None else _bytes(value)) if size else None


_HEARS: dict[Any, Callable[..., Answer | None]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _truth,
    aten.nonzero.default: _count,
    aten._to_copy.default: _copy_out,
    aten.copy_.default: _copy_over,
}
