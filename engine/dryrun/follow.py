"""Follow storages: a dispatch mode under which real code runs, on meta tensors or real ones, and every byte is seen.

Each operator's outputs are looked at below autograd, where composite operators have been taken apart. A storage that
was not seen before is born there; it dies when nothing refers to it any more, which is noticed at the next event. What
is recorded is the order of births and deaths, between the beginnings and ends of modules that somebody else marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.dryrun import twins
from engine.trace import Event, Kind


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record births and deaths of storages on `device`, while it is active."""

    def __init__(self, device: str, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.events: list[Event] = []
        self._alive: dict[int, tuple[_Weak, int]] = {}
        self._foreign: dict[int, _Weak] = {}
        self._count = 0
        # Weights are not activations: a policy places them, later. Holding them keeps their keys from being used again.
        self._known = {_key(t): t.untyped_storage() for t in known}

    def mark(self, kind: Kind, name: str) -> None:
        """Record that a module (or a component's method) begins or ends."""
        self._bury()
        self.events.append(Event(kind, name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._bury()
        for tensor in _tensors((args, kwargs)):
            self._met(tensor)
        result = twins.call(func, args, dict(kwargs or {})) if self.device == "meta" else func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.device.type == self.device:
                self._born(tensor)
        return result

    def _met(self, tensor: Tensor) -> None:
        """Take note of a storage that was there before: a scheduler's table, a picture that was handed in."""
        key = _key(tensor)
        if key not in self._known and key not in self._alive and key not in self._foreign:
            self._foreign[key] = _Weak(tensor)

    def _born(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known or key in self._alive or key in self._foreign:
            return
        size = tensor.untyped_storage().nbytes()
        self._count += 1
        self._alive[key] = (_Weak(tensor), self._count)
        self.events.append(Event("+", number=self._count, size_bytes=size))

    def _bury(self) -> None:
        """Record the deaths since the last event, in the order of births."""
        dead = [key for key, (weak, _) in self._alive.items() if weak.is_dead()]
        for key in dead:
            _, number = self._alive.pop(key)
            self.events.append(Event("-", number=number))
        for key in [key for key, weak in self._foreign.items() if weak.is_dead()]:
            del self._foreign[key]

    def finish(self) -> list[Event]:
        """Return the events, what died since the last one included."""
        self._bury()
        return self.events


class _Weak:
    """A reference that does not keep a storage alive. Its number may be used again only after it is given back."""

    def __init__(self, tensor: Tensor) -> None:
        self._cdata = tensor.untyped_storage()._weak_ref()

    def is_dead(self) -> bool:
        return bool(torch.UntypedStorage._expired(self._cdata))

    def __del__(self) -> None:
        torch.UntypedStorage._free_weak_ref(self._cdata)  # type: ignore[no-untyped-call]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        yield from (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
