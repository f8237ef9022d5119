"""What a dry run records: which storages live when, between the beginnings and ends of modules. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["+", "-", ">", "<", "="]


class Event(NamedTuple):
    """One thing that happened.

    kind  name                          number
    +     (empty)                       a storage is born: its number; `size_bytes` is its size
    -     (empty)                       a storage dies: its number
    >     a module's path               it begins (a component itself: its forward, or a VAE's encode or decode)
    <     a module's path               it ends
    =     a phase                       encode, denoise, decode, then encode.2 and so on
    """

    kind: Kind
    name: str = ""
    number: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A parameter or buffer. Tied ones share `storage`."""

    name: str
    storage: int
    size_bytes: int
    is_buffer: bool
    is_saved: bool = True
    """False for a buffer that is not in the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModule:
    """A module that owns weights itself; `path` begins with its component's name."""

    path: str
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedComponent:
    """A component with its modules, in the order of `named_modules`."""

    name: str
    modules: tuple[TracedModule, ...]
    blocks: tuple[tuple[str, ...], ...] = ()
    """Paths of the blocks in each list of blocks among its direct children: what block-level offload groups."""

    def weights(self) -> tuple[Weight, ...]:
        """Return all weights, tied ones once."""
        found = {w.storage: w for m in self.modules for w in m.weights}
        return tuple(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run as recorded: everything a placement policy needs to be replayed."""

    pipeline_class: str
    components: tuple[TracedComponent, ...]
    offload_chain: tuple[str, ...]
    """The pipeline's `model_cpu_offload_seq`, components that are there."""
    offload_excluded: tuple[str, ...]
    events: tuple[Event, ...]

    def component(self, name: str) -> TracedComponent:
        """Return a component by name."""
        return next(c for c in self.components if c.name == name)
