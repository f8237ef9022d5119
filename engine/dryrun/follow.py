"""Follow storages: a dispatch mode under which real code runs, on meta tensors or real ones, and every byte is seen.

Each operator's outputs are looked at below autograd, where composite operators have been taken apart. A storage that
was not seen before is born there; it dies when nothing refers to it any more. What is recorded is the order of births
and deaths, and what is computed, between the beginnings and ends of modules that somebody else marks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.dryrun import kernels, twins, works
from engine.dryrun.tensors import tensors_in
from engine.estimate.trace import Builder, Work

# Written as other operators for every device, below where a dispatch mode looks: what they hold on the way is seen only
# when they are taken apart here. (`CompositeExplicitAutograd` in torch's native_functions.yaml, without a CUDA kernel.)
_TAKEN_APART = {torch.ops.aten._safe_softmax.default}
_PARTS: Any = torch._C.DispatchKey.CompositeExplicitAutograd

Held = Callable[[Any, tuple[Any, ...]], tuple[Sequence[int], Sequence[int]]]
"""What an operator holds while it computes, of its arguments: bytes of what is made before its results, and after."""


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record births and deaths of storages on `device`, while it is active."""

    def __init__(self, device: str, known: Iterable[Tensor] = (), held: Held | None = None) -> None:
        """`held` says what an operator holds while it computes, where a dispatch mode cannot see it."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self._held = held
        self.builder = Builder()
        self._alive: dict[int, _Ref] = {}
        self._foreign: dict[int, _Ref] = {}
        # Weights are not activations: a policy places them, later.
        self._known = {s._cdata: _Ref(s, self._gone, s._cdata, -1) for s in (t.untyped_storage() for t in known)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and being wrapped against it costs as much as the rest

    @contextlib.contextmanager
    def aside(self) -> Iterator[tuple[Any, list[int]]]:
        """Record a stretch that stands beside the run: gives its events, and fills in what is alive at its end.

        What is born in it must be let go of after it, before anything else happens.
        """
        outside, self._alive = self._alive, dict(self._alive)
        survivors: list[int] = []
        with self.builder.aside() as events:
            yield events, survivors
            survivors += [ref.number for key, ref in self._alive.items() if key not in outside]
        self._alive = outside
        for ref in [r for r in outside.values() if r() is None]:
            self._died(ref)

    def finish(self) -> None:
        """Look no further: what dies from now on dies unseen."""
        self._known, self._alive, self._foreign = {}, {}, {}

    def alive_since(self, number: int) -> list[int]:
        """Return the storages that are alive and were born since that number, in the order of births."""
        return [ref.number for ref in self._alive.values() if ref.number >= number]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: dict[str, Any] = {} if kwargs is None else dict(kwargs)
        for tensor in tensors_in(args):
            self._met(tensor)
        for tensor in tensors_in(given.values()):
            self._met(tensor)
        is_dry = self.device == "meta"
        if func in _TAKEN_APART:
            with self:
                return func._op_dk(_PARTS, *args, **given)
        result = kernels.laid_out(func, args, twins.call(func, args, given)) if is_dry else func(*args, **given)
        outputs = [t for t in tensors_in((result,)) if t.device.type == self.device]
        before, after = self._held(func, args) if self._held is not None and outputs else ((), ())
        temporaries = [self.builder.born(size) for size in before]
        for tensor in outputs:
            self._born(tensor)
        temporaries += [self.builder.born(size) for size in after]
        if is_dry and (work := works.of(func, args, given, result, self.device)) is not None:
            self.builder.work(work)
        for number in reversed(temporaries):
            self.builder.died(number)
        return result

    def computed(self, work: Work) -> None:
        """Record what a stand-in for an operator would have computed."""
        self.builder.work(work)

    def _met(self, tensor: Tensor) -> None:
        """Take note of a storage that was there before: a scheduler's table, a picture that was handed in."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._alive and key not in self._foreign:
            self._foreign[key] = _Ref(storage, self._left, key, -1)

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive or key in self._foreign:
            return
        self._alive[key] = _Ref(storage, self._died, key, self.builder.born(storage.nbytes()))

    def _died(self, ref: _Ref) -> None:
        # A storage's Python object lives as long as the storage itself, so that this is called when the bytes go.
        if self._alive.get(ref.key) is ref:
            del self._alive[ref.key]
            self.builder.died(ref.number)

    def _gone(self, ref: _Ref) -> None:
        if self._known.get(ref.key) is ref:
            del self._known[ref.key]
            self.builder.gone(ref.key)

    def _left(self, ref: _Ref) -> None:
        if self._foreign.get(ref.key) is ref:
            del self._foreign[ref.key]


class _Ref(weakref.ref[torch.UntypedStorage]):
    """A reference that does not keep a storage alive, with the key it is known by and its number in the trace."""

    __slots__ = ("key", "number")

    def __new__(cls, storage: torch.UntypedStorage, left: Callable[[Any], None], key: int, number: int) -> _Ref:
        return super().__new__(cls, storage, left)

    def __init__(self, storage: torch.UntypedStorage, left: Callable[[Any], None], key: int, number: int) -> None:
        super().__init__(storage, left)  # type: ignore[call-arg]  # typeshed has no __init__ of weakref.ref
        self.key = key
        self.number = number
