"""Operators that a device computes in another way than `meta` does: answered by the device's own, above the dispatcher.

On `meta` some functions are taken apart into steps that a device fuses into one, and each step would hold memory that
the device never holds. A function mode sees the call before it is taken apart. Each row of `ROWS` says which function,
for which target, under which condition (in the answer itself), and on what evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map

from engine.dryrun import twins
from engine.dryrun.follow import Follower
from engine.estimate.trace import Work

aten = torch.ops.aten
_CUDA: Any = torch.backends.cuda


@dataclass(frozen=True, slots=True)
class Row:
    """One function on one target: `answer` returns NotImplemented where its condition does not hold."""

    function: Callable[..., Any]
    target: str
    answer: Callable[..., Any]
    evidence: str
    is_followers: bool = False
    """Whether following changes the function, on any device, and not `meta`."""


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    """Return an untouched CPU tensor of the same shape and strides: pages that are never written take no memory."""
    if tensor is None:
        return None
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Ask the CPU's own chooser which kernel it would take; 1 is the flash kernel."""
    # The chooser's stub lacks arguments that it takes.
    chooser: Any = torch._fused_sdp_choice
    stand_ins = [_on_cpu(t) for t in (query, key, value, attn_mask)]
    choice = chooser(*stand_ins, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if choice != 1:
        return NotImplemented
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        # The composite turns a boolean mask into an additive one of the query's dtype first.
        mask = torch.zeros_like(mask, dtype=query.dtype)
    result = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
    )
    return result[0]


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Flash for half precision without a mask, the memory-efficient kernel for the rest that fits it, else taken apart.

    Both hold the output and one float32 log-sum-exp a query and head; neither holds the matrix of scores. On 9.x and
    10.x with a recent cuDNN its own kernel goes first, which holds the same: 1.5 KiB more were measured on an H200.
    Kernels can be ruled out (`torch.nn.attention.sdpa_kernel`), and it is an error then where none that is left fits.
    """
    is_plain = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    if not is_plain or dropout_p:
        return _taken_apart()
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.shape[-1]
    is_cudnns = _CUDA.cudnn_sdp_enabled() and is_half and width % 8 == 0 and width <= 256
    has_flash = _CUDA.flash_sdp_enabled() or is_cudnns
    has_efficient = _CUDA.mem_efficient_sdp_enabled() or is_cudnns
    if attn_mask is None and is_half and width <= 256 and has_flash:
        # The flash kernel wants multiples of 8: others are padded before, and cut after.
        query, key, value = (t if width % 8 == 0 else F.pad(t, (0, -width % 8)) for t in (query, key, value))
        scale = width**-0.5 if scale is None else scale
        padded = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
        return padded if width % 8 == 0 else padded[..., :width]
    if enable_gqa:  # fewer keys than queries have heads: the flash kernel shares them, the other does not
        return _taken_apart()
    # From compute capability 8.0 on the memory-efficient kernel wants rows of whole 16 bytes.
    is_whole = (is_half and width % 8 == 0) or (query.dtype == torch.float32 and width % 4 == 0)
    if not is_whole or not has_efficient:
        return _taken_apart()
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype)
        bias = _aligned(bias).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, False, 0.0, is_causal, scale=scale)[0]


def _taken_apart() -> Any:
    """Leave an attention to torch's own steps. Raises: RuntimeError, as torch does, where they are ruled out too."""
    if not _CUDA.math_sdp_enabled():
        raise RuntimeError("no kernel of attention that is allowed takes these sizes, this mask or this precision")
    return NotImplemented


def _aligned(bias: Tensor) -> Tensor:
    """The memory-efficient kernel wants rows of a mask to begin at whole eights: others are copied so.

    `preprocess_mask` of torch's transformers/attention.cpp. A last row of eights is made longer by eight as well.
    """
    if bias.stride(-1) == 1 and all(s % 8 == 0 for s in bias.stride()[:-1]):
        return bias
    length = bias.shape[-1]
    return F.pad(bias, (0, 8 - length % 8))[..., :length]


def _cuda_rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    """CUDA fuses it for inputs whose weight is of the same dtype: the output, and one float32 a row while it computes.

    `_fused_rms_norm` itself is taken apart on meta, so that its two results are made here.
    """
    if weight is not None and weight.dtype != input.dtype:
        return NotImplemented
    rows = input.shape[: input.dim() - len(normalized_shape)]
    out = torch.empty_like(input, memory_format=torch.contiguous_format)
    per_row = torch.empty((*rows, *(1 for _ in normalized_shape)), dtype=torch.float32, device=input.device)
    follower = _get_current_dispatch_mode()
    if isinstance(follower, Follower):
        moved = 2 * input.numel() * input.element_size()
        follower.computed(Work("memory", str(input.dtype).removeprefix("torch."), (), moved))
    del per_row
    return out


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A bias that is not fused is added in place: under a dispatch mode torch adds it out of place instead.

    It is fused for a matrix, and for what is contiguous.
    """
    if bias is None or input.dim() == 2 or (input.dim() > 2 and input.is_contiguous()):
        return NotImplemented
    return F.linear(input, weight).add_(bias)


_LINEAR = "read in torch's Linear.cpp (isTensorSubclassLike); allocations counted on a device without a dispatch mode"
_RMS_NORM = (
    "bf16 [1, 4608, 3072]: 27 MiB fused, 162 MiB taken apart, as reported; FLUX.1-dev equal to the byte on an H200"
)
ROWS = (
    Row(F.scaled_dot_product_attention, "cpu", _cpu_attention, "the CPU's own chooser, asked in each call"),
    Row(
        F.scaled_dot_product_attention,
        "cuda",
        _cuda_attention,
        "read in torch's transformers/cuda/sdp_utils.cpp (widths, alignment from 8.0 on); models are equal on an H200",
    ),
    Row(F.linear, "cpu", _linear, _LINEAR, is_followers=True),
    Row(F.linear, "cuda", _linear, _LINEAR, is_followers=True),
    Row(F.rms_norm, "cuda", _cuda_rms_norm, _RMS_NORM),
    Row(torch.rms_norm, "cuda", _cuda_rms_norm, _RMS_NORM),
)


def _value(item: Any) -> Any:
    """Return the number in a small meta tensor of one element; anything else as it is."""
    is_number = isinstance(item, Tensor) and item.device.type == "meta" and item.numel() == 1
    value = twins.twin(item) if is_number else None
    return item if value is None else value.item()


_MAKE_TENSORS = (torch.tensor, torch.as_tensor)


class Target(TorchFunctionMode):
    """Compute on meta as `target` ("cpu" or "cuda") would."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._rows = {row.function: row for row in ROWS if row.target == target}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {} if kwargs is None else kwargs
        row = self._rows.get(func)
        if row is not None:
            first = next((a for a in (*args, *given.values()) if isinstance(a, Tensor)), None)
            if first is not None and (row.is_followers or first.device.type == "meta"):
                result = row.answer(*args, **given)
                if result is not NotImplemented:
                    return result
        elif func in _MAKE_TENSORS and args:
            return _made(func, args, given)
        return func(*args, **given)


def _made(func: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
    """Make a tensor of values. It works beneath every mode: hand it values, and keep the value of what it makes."""
    args = (tree_map(_value, args[0]), *args[1:])
    made = func(*args, **given)
    if made.device.type == "meta" and twins.twin(made) is None and not isinstance(args[0], Tensor):
        twins.give(made, func(*args, **{**given, "device": "cpu"}))
    return made
