"""Replay a trace under a placement: which weights move when, with the semantics of the libraries' own hooks. No torch.

A placement says, for each module that begins or ends, what moves. What the moves do to the device's memory is
`stream.py`'s; how long they take is `clock.py`'s. Source of the semantics: diffusers 0.42, accelerate 1.15; what the
hooks do and do not do is written beside each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from engine.estimate.trace import Trace, TracedComponent, TracedModule, Weight
from engine.facts.casting import is_cast, is_text_encoder
from engine.optimizers.spec import is_vae

LOAD, FETCH, DROP, STORE, EMPTY, WAIT, STAGE, PIN = range(8)
"""
LOAD   weights are copied to the device, and the host waits for it (from pageable memory)
FETCH  the same on a stream of its own, from pinned memory, while the device computes; what is there is copied anew
DROP   weights are let go of; the host has kept its copy
STORE  weights are copied back to the host and let go of
EMPTY  the allocator's cache is emptied
WAIT   the host waits for the stream of copies
PIN    weights are copied into pinned memory, for the FETCH that follows
STAGE  one stage of a run is over; the next such move says that the following one has been loaded
"""


class Move(NamedTuple):
    """One thing that a placement does; `slots` are the tensors it does it with."""

    verb: int
    slots: tuple[int, ...] = ()


_EMPTY, _WAIT, _STAGE = Move(EMPTY), Move(WAIT), Move(STAGE)

ITEM_BYTES = {"float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """One tensor of a layer that is kept in fewer bits: its slot, its bytes as stored and while the layer computes."""

    slot: int
    stored_bytes: int
    computed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Casting:
    """`layerwise_casting`: the dtypes that weights of castable layers are kept in, and compute in."""

    storage: str
    compute: str
    components: tuple[str, ...] | None = None
    """What is cast; None: what denoises."""

    def acts_on(self, component: str, module: TracedModule) -> bool:
        """Whether a component's module is kept in fewer bits."""
        if self.components is not None and component not in self.components:
            return False
        if self.components is not None and is_text_encoder(component):
            return module.is_layer and is_cast(module.path.partition(".")[2])
        return module.is_castable

    def stored_bytes(self, weight: Weight) -> int:
        """Return a castable weight's bytes at rest."""
        return weight.size_bytes * ITEM_BYTES[self.storage] // ITEM_BYTES[weight.dtype]

    def computed_bytes(self, weight: Weight) -> int:
        """Return its bytes while its layer computes."""
        return weight.size_bytes * ITEM_BYTES[self.compute] // ITEM_BYTES[weight.dtype]


class Placement:
    """Says what moves when. It has a state, and is good for one pass along a trace."""

    def __init__(self, trace: Trace, casting: Casting | None = None) -> None:
        self.trace = trace
        self.casting = casting
        self.sizes: list[int] = []
        """The bytes of each slot, as they are moved."""
        self.casts: dict[str, tuple[Cast, ...]] = {}
        """What is widened while a module computes, by its path."""
        self._slots: dict[int, int] = {}
        self._cast_slots: dict[int, Cast] = {}
        self._cast_all(trace.components)

    def _cast_all(self, components: Iterable[TracedComponent]) -> None:
        for component in components if self.casting is not None else ():
            for module in component.modules:
                if self.casting is not None and self.casting.acts_on(component.name, module):
                    self.casts[module.path] = self._cast(module)

    def _cast(self, module: TracedModule) -> tuple[Cast, ...]:
        assert self.casting is not None
        found = []
        for weight in module.weights:
            if weight.dtype in ITEM_BYTES:
                stored = self.casting.stored_bytes(weight)
                slot = self._slots.get(weight.storage)
                if slot is None:
                    slot = self._slots[weight.storage] = self._new_slot(stored)
                found.append(Cast(slot=slot, stored_bytes=stored, computed_bytes=self.casting.computed_bytes(weight)))
        return tuple(found)

    def _new_slot(self, size_bytes: int) -> int:
        self.sizes.append(size_bytes)
        return len(self.sizes) - 1

    def slots(self, weights: Iterable[Weight]) -> tuple[int, ...]:
        """Return the slots of weights: one for each storage."""
        found = []
        for weight in weights:
            slot = self._slots.get(weight.storage)
            if slot is None:
                slot = self._slots[weight.storage] = self._new_slot(weight.size_bytes)
            found.append(slot)
        return tuple(dict.fromkeys(found))

    def slot_of(self, storage: int) -> int:
        """Return the slot of a storage; -1 where it has none by now."""
        return self._slots.get(storage, -1)

    def bytes_of(self, slots: Iterable[int]) -> int:
        """Return the bytes of slots as they are moved."""
        return sum(self.sizes[s] for s in slots)

    @property
    def inner(self) -> Placement:
        """The placement of what computes most: itself, or what a wrapper wraps."""
        return self

    def resident(self) -> tuple[int, ...]:
        """Return the slots that are on the device before the call, and stay."""
        return ()

    def loaded(self) -> tuple[int, ...]:
        """Return the slots that loading brings to the device, between the stages of a run too."""
        return self.resident()

    def pinned(self) -> tuple[int, ...]:
        """Return the slots of which the host holds a pinned copy for good."""
        return ()

    def pinned_in_turn(self) -> tuple[tuple[int, ...], ...]:
        """Return the groups of slots of which the host makes a pinned copy each time they come, one after another."""
        return ()

    def brings_back(self, component: str) -> bool:
        """Whether a component's weights come back to the host after they were on the device."""
        return False

    def lets_go(self, component: str) -> bool:
        """Whether the host lets go of a component before the next one is loaded, since it is on the device by then."""
        return False

    def acts_on(self, path: str) -> bool:
        """Whether something can move when a module of this path begins or ends."""
        return False

    def begin(self, path: str) -> Iterable[Move]:
        return ()

    def end(self, path: str) -> Iterable[Move]:
        return ()


class Resident(Placement):
    """Everything on the device for good. Components are loaded and put there one by one, by their names.

    AnimateDiff's are not: its pipeline makes one component of two. `pipe.to`, which puts them there then, goes by the
    names too. The order shows in what is allocated: each large weight is cut off the rest of a segment, and where what
    is left then is no more than 1 MiB it counts with the weight.
    """

    def resident(self) -> tuple[int, ...]:
        return self.slots(w for c in sorted(self.trace.components, key=_name) for w in c.moved())

    def lets_go(self, component: str) -> bool:
        return all(c.name != "motion_adapter" for c in self.trace.components)


class ModelOffload(Placement):
    """`enable_model_cpu_offload`: a component comes at its first use, once its direct predecessor has gone.

    Nothing happens after its use: it stays until its successor begins, or the call ends. Only the direct predecessor is
    sent away. A component outside the chain has none, and if it is excluded it is on the device for good.
    """

    def __init__(self, trace: Trace, casting: Casting | None = None) -> None:
        super().__init__(trace, casting)
        self.kept = set(trace.offload_excluded) - set(trace.offload_chain)
        self.here: set[str] = set(self.kept)
        self.before = dict(zip(trace.offload_chain[1:], trace.offload_chain, strict=False))
        self.parts = {c.name: self.slots(c.moved()) for c in trace.components}

    def resident(self) -> tuple[int, ...]:
        return tuple(s for c in self.trace.components if c.name in self.here for s in self.parts[c.name])

    def brings_back(self, component: str) -> bool:
        return component not in self.kept

    def acts_on(self, path: str) -> bool:
        return path in self.parts

    def begin(self, path: str) -> Iterable[Move]:
        previous = self.before.get(path)
        if previous in self.here:
            self.here.remove(previous)
            yield Move(STORE, self.parts[previous])
            yield _EMPTY
        if path in self.parts and path not in self.here:
            self.here.add(path)
            yield Move(LOAD, self.parts[path])


class SequentialOffload(Placement):
    """`enable_sequential_cpu_offload`: each module that owns weights fetches them for its own forward.

    Buffers are put on the device when it is enabled and stay, unless the component owns parameters itself: then those
    of the checkpoint are fetched too. Tied weights are fetched by each owner, a copy each. The cache is emptied after
    each tensor (`set_module_tensor_to_device`, `clear_cache`).
    """

    def __init__(self, trace: Trace, casting: Casting | None = None) -> None:
        super().__init__(trace, casting)
        self.fetched: dict[str, tuple[int, ...]] = {}
        self.kept: list[int] = []
        for component in trace.components:
            if component.name in trace.offload_excluded:
                self.kept += self.slots(component.moved())
            else:
                self._split(component)

    def _split(self, component: TracedComponent) -> None:
        roots = [m for m in component.modules if m.path == component.name]
        fetches_buffers = any(not w.is_buffer for m in roots for w in m.weights)
        taken: set[int] = set()
        for module in component.modules:
            moving = [w for w in module.weights if not w.is_buffer or (fetches_buffers and w.is_saved)]
            slots = []
            for weight in moving:
                slot = self.slots([weight])[0]
                slots.append(self._new_slot(self.sizes[slot]) if slot in taken else slot)
                taken.add(slot)
            if slots:
                self.fetched[module.path] = tuple(slots)
            self.kept += self.slots(w for w in module.weights if w not in moving)

    def resident(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.kept))

    def acts_on(self, path: str) -> bool:
        return path in self.fetched

    def begin(self, path: str) -> Iterable[Move]:
        for slot in self.fetched.get(path, ()):
            yield Move(LOAD, (slot,))
            yield _EMPTY

    def end(self, path: str) -> Iterable[Move]:
        if path in self.fetched:
            yield Move(DROP, self.fetched[path])


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How a component's weights are grouped, as the parameters of `enable_group_offload` say it."""

    block_level: bool = False
    use_stream: bool = True
    blocks_per_group: int = 1
    low_cpu_mem_usage: bool = False


class GroupOffload(Placement):
    """`enable_group_offload`: groups of weights come for the forward of the module that leads them.

    `groupings` says of every component how it is grouped; None is a component that is on the device for good. They are
    put there in that mapping's order, after the VAEs that block level leaves there.

    At leaf level a group is what a module owns itself. At block level it is `blocks_per_group` blocks of a list among a
    component's direct children (one, with a stream), and what is in no list forms one more group, led by the component,
    which moves without the stream. A VAE's root forward never runs, so that at block level it is resident here, as the
    optimizer leaves it.

    With a stream the order of groups is learnt in a component's first forward. From its second on, a group fetches the
    next one before it computes, even if that is there already (a module that is called more than once); the component
    itself fetches the first. Until then, and where the order was not kept, a group comes by itself: on the same stream,
    but waited for. With `low_cpu_mem_usage` a group is pinned each time that it comes, and no pinned copy is kept. The
    buffers of blocks and of torch's layers stay, once they have come with the stream; those of
    other modules go with the rest.
    """

    def __init__(
        self,
        trace: Trace,
        casting: Casting | None = None,
        groupings: Mapping[str, Grouping | None] | None = None,
        **all_alike: Any,
    ) -> None:
        """Without `groupings` every component is grouped as the fields of a `Grouping` say that follow."""
        super().__init__(trace, casting)
        self.how = {c.name: Grouping(**all_alike) for c in trace.components} if groupings is None else dict(groupings)
        self.kept: list[int] = []
        self.groups: dict[str, tuple[int, ...]] = {}
        self.stays: dict[str, tuple[int, ...]] = {}
        self.never: dict[str, tuple[int, ...]] = {}
        """What a VAE itself owns (statistics of its latents, mostly) is pinned like the rest, and never comes."""
        self.copies: dict[str, tuple[int, ...]] = {}
        self.last: dict[str, str] = {}
        self.unmatched: set[str] = set()
        for component in trace.components:
            how = self.how[component.name]
            if how is None or self._is_left(component.name):
                continue
            if how.block_level:
                self._blocks(component, how)
            else:
                self._leaves(component, how)
        left = sorted((n for n in self.how if self._is_left(n) or self.how[n] is None), key=self._is_left, reverse=True)
        for name in left:
            self.kept += self.slots(trace.component(name).moved())
        self.in_turn = {
            n for n, how in self.how.items() if how is not None and how.use_stream and how.low_cpu_mem_usage
        }
        pinned = [
            g
            for path, g in (*self.groups.items(), *self.never.items())
            if self._is_streamed(path) and _root(path) not in self.in_turn
        ]
        self.all_slots = tuple(dict.fromkeys(s for group in pinned for s in group))
        self.order: dict[str, list[str]] = {}
        self.following: dict[str, str] = {}
        self.learning: str | None = None
        self.here: set[str] = set()
        self.roots = {n for n, how in self.how.items() if how is not None and not is_vae(n)}
        """Components whose own forward runs the hooks on them."""

    def _is_left(self, component: str) -> bool:
        """Whether a component is in no groups, since block level leaves it on the device."""
        how = self.how[component]
        return how is not None and how.block_level and is_vae(component)

    def _leaves(self, component: TracedComponent, how: Grouping) -> None:
        for module in component.modules:
            slots = self.slots(module.weights)
            if is_vae(component.name) and module.path == component.name:
                self.never[module.path] = slots
                continue
            self.groups[module.path] = slots
            if how.use_stream and module.is_layer:
                self.stays[module.path] = self.slots(w for w in module.weights if w.is_buffer)

    def _blocks(self, component: TracedComponent, how: Grouping) -> None:
        count = 1 if how.use_stream else how.blocks_per_group
        left = {m.path: m.weights for m in component.modules}
        for paths in component.blocks:
            for start in range(0, len(paths), count):
                group = paths[start : start + count]
                inside = [p for p in left if any(p == g or p.startswith(g + ".") for g in group)]
                weights = [w for p in inside for w in left.pop(p)]
                self.groups[group[0]] = self.slots(weights)
                if how.use_stream:
                    self.stays[group[0]] = self.slots(w for w in weights if w.is_buffer)
                self.last[group[-1]] = group[0]
        rest = [w for weights in left.values() for w in weights]
        self.groups[component.name] = self.slots(rest)
        # The group lists the buffers of its modules once more by themselves. Moving a module back makes new buffers, so
        # that from then on the listed ones are old objects, which are moved as well: they are here twice.
        twice = [w for path, weights in left.items() if path != component.name for w in weights if w.is_buffer]
        self.copies[component.name] = tuple(self._new_slot(w.size_bytes) for w in twice)
        self.unmatched.add(component.name)

    def resident(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.kept))

    def pinned(self) -> tuple[int, ...]:
        return self.all_slots

    def pinned_in_turn(self) -> tuple[tuple[int, ...], ...]:
        called = set(self.trace.paths)
        streamed = [path for path in self.groups if self._is_streamed(path) and _root(path) in self.in_turn]
        return tuple(self.groups[path] for path in streamed if path in called)

    def brings_back(self, component: str) -> bool:
        how = self.how[component]
        return how is not None and not how.use_stream

    def acts_on(self, path: str) -> bool:
        return path in self.groups or path in self.last or path in self.roots

    def _is_streamed(self, path: str) -> bool:
        how = self.how[_root(path)]
        return how is not None and how.use_stream and path not in self.unmatched

    def _come(self, path: str) -> Iterator[Move]:
        """Bring a group for its own sake, if it is not there."""
        if path in self.here or path not in self.groups:
            return
        self.here.add(path)
        if self._is_streamed(path):
            yield from self._copy(path)
            yield _WAIT
        else:
            yield Move(LOAD, self.groups[path])

    def _fetch(self, path: str) -> Iterator[Move]:
        """Bring a group ahead: nobody looks whether it is there."""
        self.here.add(path)
        yield from self._copy(path)

    def _copy(self, path: str) -> Iterator[Move]:
        if _root(path) in self.in_turn:
            yield Move(PIN, self.groups[path])
        yield Move(FETCH, self.groups[path])

    def _go(self, path: str) -> Iterator[Move]:
        if path not in self.here:
            return
        self.here.remove(path)
        group = self.groups[path]
        if self._is_streamed(path):
            stays = self.stays.get(path, ())
            yield Move(DROP, tuple(s for s in group if s not in stays))
        else:
            yield Move(STORE, group)
            self.groups[path] += self.copies.pop(path, ())

    def begin(self, path: str) -> Iterable[Move]:
        root = _root(path)
        how = self.how[root]
        use_stream = how is not None and how.use_stream
        if use_stream and path in self.roots:
            known = self.order.get(root)
            if known is None:
                self.learning = root
                self.order[root] = []
            elif known:
                yield from self._come(path)
                yield from self._fetch(known[0])
                return
        if path not in self.groups:
            return
        if path in self.here:  # it was fetched ahead
            yield _WAIT
        yield from self._come(path)
        if not use_stream or path == root:
            return
        if self.learning == root:
            self.order[root].append(path)
        elif path in self.following:
            yield from self._fetch(self.following[path])

    def end(self, path: str) -> Iterable[Move]:
        if path == self.learning:
            self.learning = None
            order = self.order[path]
            self.following.update(itertools.pairwise(order))
        # A group of several blocks goes when its last one ends, and not when its leader does.
        how = self.how[_root(path)]
        is_inner = how is not None and how.block_level and path not in self.unmatched
        leader = self.last.get(path) if is_inner else path
        if leader is not None and leader in self.groups:
            yield from self._go(leader)


class StagedEncoding(Placement):
    """The text encoders are alone on the device first, and gone before anything else is loaded.

    No hook of a library does this. It is a run in two stages: the prompts are encoded, the text encoders are let go of,
    the cache is emptied, and only then the rest is loaded and placed, as `rest` places it (all of it on the device, or
    by any other placement). What the encoders gave waits on the host meanwhile, and is an activation again then.

    A trace is of one call, and some pipelines encode a picture before the text. A text encoder that begins when the
    others are gone comes for that once, beside the rest: more than a staged run would hold.

    The host holds the encoders and the rest one after the other too, and of the encoders one at a time.
    """

    def __init__(self, trace: Trace, rest: Callable[[Trace], Placement] = Resident) -> None:
        encoders = [c for c in trace.components if is_text_encoder(c.name)]
        names = {c.name for c in encoders}
        self.rest = rest(
            replace(
                trace,
                components=tuple(c for c in trace.components if c.name not in names),
                offload_chain=tuple(n for n in trace.offload_chain if n not in names),
                offload_excluded=tuple(n for n in trace.offload_excluded if n not in names),
            )
        )
        super().__init__(trace)
        self.casting = self.rest.casting
        # One numbering of slots for both: what the encoders have is added to what the rest has.
        self.sizes, self.casts, self._slots = self.rest.sizes, self.rest.casts, self.rest._slots
        self._cast_all(encoders)
        self.encoders = {c.name: self.slots(c.moved()) for c in sorted(encoders, key=_name)}
        self.is_encoded = not encoders
        self.again: str | None = None

    @property
    def inner(self) -> Placement:
        return self.rest

    def resident(self) -> tuple[int, ...]:
        if not self.encoders:
            return self.rest.resident()
        return tuple(dict.fromkeys(s for slots in self.encoders.values() for s in slots))

    def loaded(self) -> tuple[int, ...]:
        return (*self.resident(), *self.rest.resident()) if self.encoders else self.rest.resident()

    def lets_go(self, component: str) -> bool:
        return component in self.encoders or self.rest.lets_go(component)

    def pinned(self) -> tuple[int, ...]:
        return self.rest.pinned()

    def pinned_in_turn(self) -> tuple[tuple[int, ...], ...]:
        return self.rest.pinned_in_turn()

    def acts_on(self, path: str) -> bool:
        return True  # whichever module is the first of the rest brings it

    def begin(self, path: str) -> Iterable[Move]:
        root = _root(path)
        if root in self.encoders:
            if self.is_encoded and self.again is None:
                self.again = path
                yield Move(LOAD, self.encoders[root])
            return
        if not self.is_encoded:
            self.is_encoded = True
            yield _STAGE
            yield Move(DROP, self.resident())
            yield _EMPTY
            yield Move(LOAD, self.rest.resident())
            yield _STAGE
        if self.rest.acts_on(path):
            yield from self.rest.begin(path)

    def end(self, path: str) -> Iterable[Move]:
        root = _root(path)
        if root not in self.encoders:
            if self.rest.acts_on(path):
                yield from self.rest.end(path)
        elif path == self.again:
            self.again = None
            yield Move(DROP, self.encoders[root])
            yield _EMPTY


def keeping(trace: Trace, components: Sequence[str]) -> Trace:
    """Return a trace whose pipeline's own offloads leave these components on the device (`optimizers/offload.py`)."""
    return replace(
        trace,
        offload_chain=tuple(n for n in trace.offload_chain if n not in components),
        offload_excluded=(*trace.offload_excluded, *(n for n in components if n not in trace.offload_excluded)),
    )


def _root(path: str) -> str:
    """Return the component that a module belongs to."""
    return path.partition(".")[0]


def _name(component: TracedComponent) -> str:
    return component.name
