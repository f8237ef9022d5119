"""A model's pipeline with random weights of its true shapes and dtypes: no hub, no file. Buffers are the real ones."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.dryrun import build
from engine.errors import ModelError
from engine.facts.model import Model

SCALE = 0.02
"""Of the noise in matrices: a product of a thousand terms stays near its input, so that nothing overflows in half."""
_POOL_ELEMENTS = 1 << 22
"""Noise is made once and repeated: drawing it anew for 17 billion weights would take a host minutes."""
_MOST_THREADS = 16
_DRAWN = (torch.float16, torch.bfloat16, torch.float32)
"""What a card draws normal noise in."""


def pipeline(model: Model, dtype: str, device: str) -> Any:
    """Return the model's pipeline with its weights on `device`, allocated in the order that `pipe.to` allocates them.

    Raises: ModelError, for a model that the installed libraries do not have.
    """
    return filled(weightless(model, dtype), device)


def weightless(model: Model, dtype: str) -> Any:
    """Return the model's pipeline with its weights on meta and its buffers on the host. Raises: ModelError."""
    from accelerate import init_empty_weights

    return build.pipeline(model, getattr(torch, dtype), partial(init_empty_weights, include_buffers=False))


def filled(pipe: Any, device: str) -> Any:
    """Return a pipeline that was made weightless, with its weights on `device`."""
    filler = _Filler(device)
    for name, part in sorted(pipe.components.items()):  # `pipe.to` goes by their names
        if isinstance(part, nn.Module):
            filler.fill(name, part)
    filler.finish()
    return pipe


class _Filler:
    """Puts weights in the places of those that are on meta; tied ones stay tied, across components too.

    On the host the noise is copied by threads of Python's, since what a thread waits for there is fresh pages. torch's
    own would do as well, but a fork of this process could then compute with none (`nursery.py`).
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._made: dict[int, nn.Parameter] = {}
        self._kept: list[torch.Tensor] = []  # so that an id stays one tensor's
        self._pools: dict[torch.dtype, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def finish(self) -> None:
        """Copy the noise to where it was promised."""
        copies, self._copies = self._copies, []
        if not copies:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
                for _ in pool.map(_copy, copies, chunksize=8):
                    pass
        finally:
            torch.set_num_threads(threads)

    def fill(self, name: str, part: nn.Module) -> None:
        for module in _children_first(part):
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = self._weight(key, weight)
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if buffer.is_meta:
                    raise ModelError(
                        f"{name}: the buffer {key} of {type(module).__name__} has no values",
                        "its class makes it without a host",
                        "leave this model out of the matrix",
                    )
                module._buffers[key] = buffer.to(self.device)

    def _weight(self, key: str, weight: nn.Parameter) -> nn.Parameter:
        made = self._made.get(id(weight))
        if made is None:
            self._kept.append(weight)
            made = nn.Parameter(self._values(key, weight), requires_grad=weight.requires_grad)
            self._made[id(weight)] = made
        return made

    def _values(self, key: str, like: torch.Tensor) -> torch.Tensor:
        made = _mapped(like) if self.device.type == "cpu" else torch.empty_like(like, device=self.device)
        if like.dim() < 2 or not like.is_floating_point():
            # Scales of norms and their shifts.
            return made.fill_(0 if "bias" in key or not like.is_floating_point() else 1)
        if not made.is_contiguous():
            return made.fill_(SCALE)
        if made.device.type == "cuda" and like.dtype in _DRAWN:
            return made.normal_(0, SCALE)  # in place, so that nothing but the weight itself is ever held
        flat, pool = made.view(-1), self._pool(like.dtype)
        for start in range(0, flat.numel(), pool.numel()):
            piece = flat[start : start + pool.numel()]
            if made.device.type == "cpu":
                self._copies.append((piece, pool[: piece.numel()]))
            else:
                piece.copy_(pool[: piece.numel()])
        return made

    def _pool(self, dtype: torch.dtype) -> torch.Tensor:
        """Return noise on the host: on the device it would count among what is loaded."""
        if dtype not in self._pools:
            noise = torch.randn(_POOL_ELEMENTS, generator=self._generator) * SCALE
            self._pools[dtype] = noise.to(dtype)
        return self._pools[dtype]


def _mapped(like: torch.Tensor) -> torch.Tensor:
    """Return room for a weight on the host in a mapping of its own, as those of files are.

    What the C library gives it would keep, once the weight is on the card, for what comes back from there: that then
    goes into pages that are there already, and not, as in a real run, into new ones at a tenth of the speed.
    """
    if not like.is_contiguous() or like.nbytes < mmap.PAGESIZE:
        return torch.empty_like(like, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, like.nbytes), dtype=like.dtype).view(like.shape)


def _copy(what: tuple[torch.Tensor, torch.Tensor]) -> None:
    into, noise = what
    into.copy_(noise)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order in which `module.to` moves them."""
    for child in module.children():
        yield from _children_first(child)
    yield module
