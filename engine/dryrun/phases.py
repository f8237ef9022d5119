"""The phases of a pipeline's call: `encode`, `denoise`, `decode`, and `encode.2` where one comes again.

One begins with a component's forward, or with a VAE's `encode` or `decode`, which no hook on a forward sees. A dry run
names them so, and whoever executes a call names them alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

VAE_METHODS = ("encode", "decode")
"""Named as the phases that they are."""
_ENCODERS = ("text_encoder", "image_encoder", "prior")


def is_encoder(component: str) -> bool:
    """Whether a component encodes what is asked for, by its name."""
    return component.startswith(_ENCODERS)


def kind_of(component: str) -> str:
    """Return the phase that a component's forward is, by its name."""
    return "encode" if is_encoder(component) else "denoise"


class Names:
    """Names the stretch that a call is in."""

    def __init__(self, *, loaded: bool = False) -> None:
        """`loaded`: a phase `load` has been before the first one."""
        self._now = "load" if loaded else ""
        self._times = {"load": 1} if loaded else {}

    def entered(self, kind: str) -> str | None:
        """Return the name of the phase that begins now; None where the call goes on in the one it is in."""
        if kind == self._now:
            return None
        self._now = kind
        count = self._times[kind] = self._times.get(kind, 0) + 1
        return kind if count == 1 else f"{kind}.{count}"


@contextlib.contextmanager
def told(modules: Mapping[str, nn.Module], enter: Callable[[str], None]) -> Iterator[None]:
    """Let `enter` be called with the phase each time that one of these components, by name, is used."""
    undone = [tell(name, module, enter) for name, module in modules.items()]
    try:
        yield
    finally:
        for undo in undone:
            undo()


def tell(name: str, module: nn.Module, enter: Callable[[str], None]) -> Callable[[], None]:
    """Let `enter` be called so of one component, and return what ends that. Nothing else keeps the component alive."""
    handle = module.register_forward_pre_hook(functools.partial(_forward, enter, kind_of(name)))
    wrapped: list[str] = []
    for method in () if is_encoder(name) else VAE_METHODS:
        real = getattr(module, method, None)
        if callable(real):
            setattr(module, method, _entering(enter, method, real))
            wrapped.append(method)

    def undo() -> None:
        handle.remove()
        for method in wrapped:
            delattr(module, method)

    return undo


def _forward(enter: Callable[[str], None], kind: str, *_: Any) -> None:
    enter(kind)


def _entering(enter: Callable[[str], None], kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **given: Any) -> Any:
        enter(kind)
        return real(*args, **given)

    return call
