"""What stands in, in a pipeline that is built for a dry run, for what it would need or do without any use here.

Packages that are not installed, models of packages of their own, loops over values that nobody reads.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Guardrail:
    """Stands in for Cosmos' guardrail, models of a package of its own: everything passes, and it takes no memory."""

    note = "the guardrail models of the package cosmos_guardrail are not in this trace"

    def to(self, *_: Any, **__: Any) -> Guardrail:
        return self

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def guardrail(taken: Mapping[str, inspect.Parameter], parts: Mapping[str, Any]) -> Guardrail | None:
    """Return a guardrail for a pipeline that would make one for itself; `taken` and `parts` are its constructor's."""
    checker = taken.get("safety_checker")
    wants = checker is not None and "CosmosSafetyChecker" in str(checker.annotation)
    return Guardrail() if wants and parts.get("safety_checker") is None else None


@contextlib.contextmanager
def building(pipeline_class: type) -> Iterator[None]:
    """While a pipeline is made: let OmniGen's processor prepare transforms of pictures without torchvision."""
    module: Any = importlib.import_module(pipeline_class.__module__)
    if not pipeline_class.__module__.endswith(".pipeline_omnigen") or hasattr(module, "OmniGenMultiModalProcessor"):
        yield
        return
    processor: Any = importlib.import_module(module.__name__.replace("pipeline_", "processor_"))
    module.OmniGenMultiModalProcessor = processor.OmniGenMultiModalProcessor
    processor.transforms = SimpleNamespace(Compose=_none, Lambda=_none, ToTensor=_none, Normalize=_none)
    try:
        yield
    finally:
        del processor.transforms, module.OmniGenMultiModalProcessor


def _none(*_: Any, **__: Any) -> None:
    return None


def settle(module: nn.Module) -> None:
    """Let a component do without torchvision, and without loops that write a mask row by row."""
    code: Any = inspect.getmodule(type(module))
    if code is not None and type(module).__name__.startswith("Cosmos") and not hasattr(code, "transforms"):
        nearest = SimpleNamespace(NEAREST="nearest")
        code.transforms = SimpleNamespace(functional=SimpleNamespace(resize=_resize), InterpolationMode=nearest)
    for part in module.modules():
        if type(part).__name__ == "HunyuanVideo15AttnBlock":
            part.prepare_causal_attention_mask = _causal_mask  # type: ignore[assignment]


def _resize(picture: Tensor, size: list[int], interpolation: str) -> Tensor:
    """Resize as torchvision does a tensor: half precision by way of float32."""
    is_half = picture.dtype in (torch.float16, torch.bfloat16)
    resized = F.interpolate(picture.float() if is_half else picture, size=size, mode=interpolation)
    return resized.to(picture.dtype) if is_half else resized


def _causal_mask(n_frame: int, n_hw: int, dtype: Any, device: Any, batch_size: int | None = None) -> Tensor:
    """Return the mask that HunyuanVideo 1.5's VAE fills row by row: 111,600 steps for 121 frames of 720p."""
    length = n_frame * n_hw
    mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    mask[:, :n_hw] = 0
    return mask if batch_size is None else mask.unsqueeze(0).expand(batch_size, -1, -1)
