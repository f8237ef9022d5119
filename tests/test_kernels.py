"""What CUDA's operators hold while they compute, against what torch's CUDA build asked for (`truth/phantom`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.dryrun import kernels
from engine.dryrun.follow import Follower
from engine.estimate.trace import Trace

aten = torch.ops.aten
HALF = torch.bfloat16


def empty(shape: tuple[int, ...], strides: tuple[int, ...] | None = None, dtype: torch.dtype = HALF) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def convolution(given: torch.Tensor, weight: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    n = given.dim() - 2
    rest = ([1] * n, [0] * n, [1] * n, False, [0] * n, 1)
    return aten.convolution.default, (given, weight, None, *rest)


def group_norm(given: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    batch, channels, *size = given.shape
    weight = empty((channels,), dtype=given.dtype)
    pixels = torch.Size(size).numel()
    return aten.native_group_norm.default, (given, weight, weight, batch, channels, pixels, 32, 1e-5)


def layer_norm(given: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    return aten.native_layer_norm.default, (given, [given.shape[-1]], None, None, 1e-5)


def upsampled(given: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    size = [2 * n for n in given.shape[2:]]
    return aten._upsample_nearest_exact2d.default, (given, size, 2.0, 2.0)


CASES = [
    ("planar convolution", *convolution(empty((1, 192, 2, 120, 208)), empty((384, 192, 1, 1, 1))), 0),
    (
        "frames before channels",
        *convolution(empty((1, 192, 2, 120, 208), (9584640, 24960, 4792320, 208, 1)), empty((384, 192, 1, 1, 1))),
        19_169_280,
    ),
    (
        "a picture that does not count as channels-last",
        *convolution(empty((1, 384, 60, 104), (384, 1, 39936, 384)), empty((384, 384, 1, 1))),
        4_792_320,
    ),
    (
        "channels-last, and planar filters",
        *convolution(empty((1, 512, 128, 128), (8388608, 1, 65536, 512)), empty((512, 512, 3, 3))),
        4_718_592,
    ),
    ("group norm", *group_norm(empty((2, 2560, 8, 8))), 41_472),
    ("group norm, float32", *group_norm(empty((2, 2560, 32, 32), dtype=torch.float32)), 40_960),
    ("group norm, channels-last", *group_norm(empty((1, 512, 64, 64), (2097152, 1, 32768, 512))), 4_198_656),
    ("layer norm", *layer_norm(empty((2, 4096, 320))), 0),
    ("layer norm over what was transposed", *layer_norm(empty((2, 4096, 320), (1310720, 1, 4096))), 5_242_880),
    ("layer norm over a part", *layer_norm(empty((2, 4096, 2560), (11468800, 2560, 1))), 41_943_040),
    ("upsampling", *upsampled(empty((4, 192, 240, 416), dtype=torch.float32)), 0),
    (
        "upsampling of channels before frames",
        *upsampled(empty((4, 192, 240, 416), (99840, 399360, 416, 1), torch.float32)),
        306_708_480,
    ),
    ("isinf", aten.isinf.default, (empty((1, 512, 4096), dtype=torch.float16),), 4_194_304),
    ("anything else", aten.relu.default, (empty((2, 3)).t(),), 0),
]


@pytest.mark.parametrize(("func", "args", "executed_bytes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_an_operator_holds_what_was_asked_for(func: Any, args: tuple[Any, ...], executed_bytes: int) -> None:
    before, after = kernels.held(func, args)
    assert sum(before) + sum(after) == executed_bytes


def test_what_is_held_is_there_with_the_result_and_gone_after_it() -> None:
    given = empty((2, 4096, 320), (1310720, 1, 4096))
    follower = Follower("meta", held=kernels.held)
    with torch.no_grad(), follower:
        torch.nn.functional.layer_norm(given, [320])
    made = Trace(pipeline_class="", components=(), offload_chain=(), offload_excluded=(), **follower.builder.tables())
    told = [e.sign + str(e.size_bytes) for e in made.told() if e.sign in "+-"]
    # The copy, the result and its moments (float32, one a row each); the moments go, being nobody's.
    assert told[:4] == ["+5242880", "+5242880", "+32768", "+32768"]
    assert told[4] == "-5242880"
