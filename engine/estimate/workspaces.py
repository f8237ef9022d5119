"""What operators take on a card beside their inputs and outputs, by mechanism, for a compute capability. No torch.

The figures and their evidence are data: `gpus/libraries.json`. None is fitted to a published peak of a pipeline. What
was measured of this very card goes before them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine import versions
from engine.calibration import Calibration, Convolution
from engine.estimate.stream import Taken
from engine.estimate.trace import NAMED, Work
from engine.units import MIB

_LIBRARIES = Path(__file__).parents[1] / "gpus" / "libraries.json"
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_INDEX_MAX = 2**31 - 1
_CHANNELS_BYTES = 16
"""Converted tensors have whole groups of channels of so many bytes: measured on 9.0, 3 channels as 8 and as 4."""
_SHARED_FROM = (2, 12)
"""The version of torch from which on cublasLt's products use the workspace of cuBLAS."""
_ALIKE_BYTES, _ALIKE_SHARE = 2 * MIB, 0.02
"""A workspace that was measured is explained by what differs from it by no more: cuDNN takes a little beside."""


@cache
def _libraries() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_LIBRARIES.read_text(encoding="utf-8"))
    return content


def _by_capability(table: dict[str, Any], capability: tuple[int, int]) -> Any:
    """Return the entry of a capability, or of the nearest lower one (of the lowest, for one below all)."""
    known = sorted((tuple(map(int, k.split("."))), k) for k in table)
    lower = [name for number, name in known if number <= capability]
    return table[lower[-1] if lower else known[0][1]]


def context_bytes(
    capability: tuple[int, int], calibration: Calibration | None = None, *, copies_aside: bool = False
) -> int:
    """Return what a process takes on a card before any tensor: the CUDA context and its kernels.

    `copies_aside` says that weights are copied on a stream of their own, for which the driver takes more.
    """
    aside = int(_libraries()["side_stream_bytes"]["value"]) if copies_aside else 0
    if calibration is not None and calibration.context_bytes is not None:
        return calibration.context_bytes + aside
    return int(_by_capability(_libraries()["context_bytes"], capability)["value"]) + aside


def taken(
    work: Work,
    capability: tuple[int, int],
    multiprocessors: int | None = None,
    calibration: Calibration | None = None,
) -> Taken:
    """Return what one operator takes on a card of this capability, with so many multiprocessors, as calibrated."""
    match work.kind:
        case "matmul":
            # One workspace a handle and stream, kept.
            table = _libraries()["cublas_workspace_bytes"]
            return Taken(for_good_bytes=(int(_by_capability(table, capability)["value"]), *_cublaslt_bytes()))
        case "conv":
            if columns := _columns_bytes(work):
                return Taken(bytes=columns)
            return Taken(bytes=convolution_bytes(work, capability, calibration), is_given_up=True)
        case "conv_last":
            return Taken(bytes=converted_bytes(work, broken(work)), is_given_up=True)
        case "attention":
            return Taken(bytes=attention_bytes(work, capability, multiprocessors))
    return Taken()


def _cublaslt_bytes() -> tuple[int, ...]:
    """Return the workspace of cublasLt, where it does not share that of cuBLAS.

    Measured with torch 2.11 on an H200, and executed by its CUDA build without a card (`truth/phantom`): 1 MiB more.
    """
    version = versions.torch()
    return (MIB,) if version is not None and version < _SHARED_FROM else ()


def _columns_bytes(work: Work) -> int:
    """Return the buffer of torch's own 3D convolution, which stands in where cuDNN's is switched off; else 0.

    Source: torch does not use cuDNN 9.8 to 9.14 for planar 3D convolutions in half precision with a kernel larger than
    one (pull request 166480); `slow_conv_dilated3d` then unfolds one sample into columns (NaiveDilatedConvolution.cu).
    """
    version = versions.cudnn()
    per_dimension = (len(work.dims) - 5) // 5
    kernel = work.dims[5 + per_dimension : 5 + 2 * per_dimension]
    item = _ITEM_BYTES.get(work.dtype)
    if per_dimension != 3 or item != 2 or max(kernel) == 1 or version is None or not (9, 8) <= version < (9, 15):
        return 0
    return work.dims[1] * math.prod(kernel) * math.prod(work.dims[-3:]) * item


def convolution_bytes(work: Work, capability: tuple[int, int], calibration: Calibration | None = None) -> int:
    """Return the workspace of cuDNN's first choice for a convolution of planar tensors."""
    if is_product(work, capability):
        return 0
    kind = _kind(work.dtype)
    few = _by_capability(_libraries()["convolution"]["few_channels"], capability)
    names = few[kind] if work.dims[1] <= few["most"] else converts(kind, capability, calibration)
    return converted_bytes(work, names)


def broken(work: Work) -> tuple[str, ...]:
    """Return the tensors of a convolution in channels-last whose channels are no whole groups: cuDNN pads copies.

    Read in what it converts of planar tensors; that it takes nothing for those that are as it wants them is assumed.
    """
    together = _CHANNELS_BYTES // _ITEM_BYTES.get(work.dtype, _CHANNELS_BYTES)
    channels = {"input": work.dims[1], "output": work.dims[2]}
    return tuple(name for name, count in channels.items() if count % together)


def is_product(work: Work, capability: tuple[int, int]) -> bool:
    """Whether cuDNN computes a convolution as a product of matrices over the planar tensors as they are.

    Such a one has filters of one pixel and no stride. The products of half precision load whole 16 bytes.
    """
    per_dimension = (len(work.dims) - 5) // 5
    size_in, kernel, stride = (work.dims[5 + i * per_dimension : 5 + (i + 1) * per_dimension] for i in range(3))
    if work.dims[3:5] != (1, 0) or max(kernel) > 1 or max(stride) > 1:
        return False
    products = _by_capability(_libraries()["convolution"]["pointwise"], capability)["product"]
    is_whole = math.prod(size_in) * _ITEM_BYTES.get(work.dtype, 1) % _CHANNELS_BYTES == 0
    return work.dtype in products or (is_whole and "whole" in products)


def _kind(dtype: str) -> str:
    return "half" if _ITEM_BYTES.get(dtype) == 2 else "float32"


def converts(kind: str, capability: tuple[int, int], calibration: Calibration | None = None) -> tuple[str, ...]:
    """Return which tensors cuDNN converts, by what was measured of this card or else by its capability."""
    seen = None if calibration is None else seen_converted(calibration.convolutions, kind)
    if seen is not None:
        return seen
    return tuple(_by_capability(_libraries()["convolution"][kind], capability)["converts"])


def seen_converted(measured: Sequence[Convolution], kind: str) -> tuple[str, ...] | None:
    """Return which tensors cuDNN was seen to convert in convolutions of a kind ("half" or "float32").

    None where nothing was measured, or where no one set of tensors explains every workspace.
    """
    cases = [(work_of(c), c.workspace_bytes) for c in measured if _kind(c.dtype) == kind]
    sets = [s for n in range(3) for s in itertools.combinations(("input", "output"), n)]
    fitting = [s for s in sets if all(_is_alike(size, converted_bytes(work, s)) for work, size in cases)]
    return fitting[0] if cases and len(fitting) == 1 else None


def _is_alike(measured: int, explained: int) -> bool:
    return abs(measured - explained) <= _ALIKE_BYTES + _ALIKE_SHARE * explained


def work_of(measured: Convolution) -> Work:
    """Return a convolution that was measured as a trace would have it."""
    side, kernel = measured.side_px, 3
    dims = (1, measured.channels_in, measured.channels_out, 1, 0, side, side, kernel, kernel, 1, 1, 1, 1, side, side)
    values = (measured.channels_in + measured.channels_out) * side**2
    values += measured.channels_in * measured.channels_out * kernel**2
    return Work("conv", measured.dtype, dims, values * _ITEM_BYTES[measured.dtype])


def converted_bytes(work: Work, names: Sequence[str]) -> int:
    """Return the bytes of a convolution's tensors ("input", "output") as channels-last, with the filters where any is.

    Nothing is taken where there is no such plan: depthwise convolutions, which torch computes itself, and outputs of
    2^31 elements and more before cuDNN could count so many.
    """
    batch, channels_in, channels_out, groups, _ = work.dims[:5]
    per_dimension = (len(work.dims) - 5) // 5
    size_in = math.prod(work.dims[5 : 5 + per_dimension])
    size_out = math.prod(work.dims[-per_dimension:])
    item = _ITEM_BYTES.get(work.dtype)
    if item is None or not names or (groups > 1 and groups == channels_in):
        return 0
    if batch * channels_out * size_out > _INDEX_MAX and not _counts_beyond():
        return 0
    kernel = math.prod(work.dims[5 + per_dimension : 5 + 2 * per_dimension])
    padded_in, padded_out = (_padded(channels, item) for channels in (channels_in, channels_out))
    sizes = {
        "input": batch * size_in * padded_in * item,
        "output": batch * size_out * padded_out * item,
    }
    # Filters of one pixel are the same in both layouts.
    filters = padded_in * padded_out // groups * kernel * item if kernel > 1 else 0
    return sum(sizes[name] for name in names) + filters


def values_of(work: Work) -> int:
    """Return how many numbers a convolution's tensors and its filters have."""
    batch, channels_in, channels_out, groups, _ = work.dims[:5]
    per_dimension = (len(work.dims) - 5) // 5
    size_in, kernel = (math.prod(work.dims[5 + i * per_dimension : 5 + (i + 1) * per_dimension]) for i in range(2))
    size_out = math.prod(work.dims[-per_dimension:])
    filters = channels_in * channels_out // groups * kernel
    return batch * (channels_in * size_in + channels_out * size_out) + filters


def output_bytes(work: Work) -> int:
    """Return the bytes of a convolution's output."""
    per_dimension = (len(work.dims) - 5) // 5
    return work.dims[0] * work.dims[2] * math.prod(work.dims[-per_dimension:]) * _ITEM_BYTES.get(work.dtype, 4)


def _counts_beyond() -> bool:
    """Whether cuDNN takes tensors of 2^31 elements. A cuDNN that is not seen is taken to be a recent one."""
    version = versions.cudnn()
    return version is None or version >= tuple(_libraries()["convolution"]["large"]["below_cudnn"])


def _padded(channels: int, item_bytes: int) -> int:
    together = _CHANNELS_BYTES // item_bytes
    return -(-channels // together) * together


def attention_bytes(work: Work, capability: tuple[int, int], multiprocessors: int | None = None) -> int:
    """Return what an attention kernel accumulates in, float32.

    The memory-efficient one: outputs, for half precision and widths over 128 (`needs_output_accumulator` of torch's
    kernel_forward.h). The flash kernel: outputs and a log-sum-exp a query, of each split of the keys; none is taken to
    be split where the count of multiprocessors is not known. Before 8.0 the former takes the flash kernel's place. On
    9.0 and 10.0 cuDNN's own takes that of both where it can; of an H200 it wants 1.5 KiB, which is nothing.
    """
    batch, heads, queries, keys, width, kernel = work.dims
    is_half = _ITEM_BYTES.get(work.dtype) == 2
    if kernel <= NAMED and is_half and width % 8 == 0 and width <= 256 and cudnn_attends(capability):
        return 0
    if kernel % NAMED == 1 and capability >= (8, 0):
        splits = 1 if multiprocessors is None else _flash_splits(batch * heads, queries, keys, width, multiprocessors)
        return 0 if splits == 1 else splits * batch * heads * queries * 4 * (_flash_width(width) + 1)
    return batch * heads * queries * width * 4 if is_half and width > 128 else 0


def cudnn_attends(capability: tuple[int, int]) -> bool:
    """Whether torch prefers cuDNN's attention: executed (`truth/phantom`) on 9.0, with cuDNN 9.15.1 and not with 9.10.

    That 10.0 is as 9.0 is recalled. A cuDNN that is not seen is taken to be a recent one.
    """
    version = versions.cudnn()
    return capability in ((9, 0), (10, 0)) and (version is None or version > (9, 15, 0))


def _flash_width(width: int) -> int:
    return -(-width // 32) * 32 if width <= 128 else 192 if width <= 192 else 256


_FLASH_MOST_SPLITS = 128
_FLASH_FULL = 0.8
_FLASH_GOOD_ENOUGH = 0.85


def _flash_splits(batch_heads: int, queries: int, keys: int, width: int, multiprocessors: int) -> int:
    """Return into how many parts the flash kernel splits the keys, where there are too few queries to fill the card.

    `num_splits_heuristic` and `set_params_splitkv` of torch's flash_api.cpp: blocks of 64 queries and of 256, 128 or 64
    keys, two blocks of threads a multiprocessor; the fewest parts that fill whole waves nearly as well as the best.
    """
    blocks = batch_heads * -(-queries // 64)
    key_blocks = -(-keys // (256 if width <= 64 else 128 if width <= 128 else 64))
    slots = 2 * multiprocessors
    if blocks >= _FLASH_FULL * slots:
        return 1
    parts = [
        n
        for n in range(1, min(_FLASH_MOST_SPLITS, slots, key_blocks) + 1)
        if n == 1 or -(-key_blocks // n) != -(-key_blocks // (n - 1))
    ]
    filled = {n: blocks * n / slots / math.ceil(blocks * n / slots) for n in parts}
    best = max(filled.values())
    return next(n for n in parts if filled[n] >= _FLASH_GOOD_ENOUGH * best)
