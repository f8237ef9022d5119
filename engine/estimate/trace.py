"""What a dry run records: which storages live when, and what is computed, between the beginnings and ends of modules.

No torch. The events are a table of numbers, so that a trace of a hundred thousand of them is read in microseconds
and the repetition of a model's blocks is a repetition of bytes.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# An event is one number: its kind in the low three bits, and above them what the kind says.
BORN, DIED, BEGIN, END, PHASE, WORK, STEP, GONE = range(8)
"""
BORN   a storage is born; an index into `sizes`. Its number is the count of births before it.
DIED   a storage dies: how many births ago it was born, the latest being 0
BEGIN  a module begins; an index into `paths` (a component itself: its forward, or a VAE's encode or decode)
END    it ends
PHASE  encode, denoise, decode, then encode.2 and so on; an index into `phases`
WORK   an operator computes; an index into `works`
STEP   a denoising step has ended
GONE   a weight is let go of, since another takes its place (a VAE that is widened); an index into `gone`
"""
KIND_BITS = 3
KIND_MASK = (1 << KIND_BITS) - 1
EVENT_TYPE = "I"
TRACED_STEPS = 2
"""Denoising steps that are traced: what is held differs between the first and the second, and then no more."""

NAMED = 2
"""More than the number of an attention's kernel where it was named, so that nothing else takes its place."""

_SIGNS = {BORN: "+", DIED: "-", BEGIN: ">", END: "<", PHASE: "=", WORK: "*", STEP: "|", GONE: "x"}


class Work(NamedTuple):
    """What one operator computes.

    kind       dims
    matmul     batch, m, n, k
    conv       batch, channels in, channels out, groups, transposed (0 or 1), then in as many numbers as there are
               spatial dimensions each: size in, kernel, stride, dilation, size out
    conv_last  the same, of filters with the channels last: torch hands over all of it in that layout, and what it
               copied for that is read and written in `moved_bytes`
    attention  batch, heads, queries, keys, width, and 1 for the flash kernel, 2 for the memory-efficient one, or
               what a card prefers to it; 3 and 4 for these and no other (`NAMED` more)
    group_norm how many groups are reduced: batch x groups
    memory     nothing: it is bound by the bytes it reads and writes
    wait       nothing: the host reads a value, and waits for it

    `moved_bytes` is what the operator reads and writes.
    """

    kind: str
    dtype: str
    dims: tuple[int, ...]
    moved_bytes: int


class Event(NamedTuple):
    """An event for reading: sign, name (a module's path, a phase), a storage's number, its size in bytes."""

    sign: str
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
    """False for what is not in the checkpoint: some buffers, and weights that an optimizer makes of others."""
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModule:
    """A module that owns weights itself; `path` begins with its component's name."""

    path: str
    weights: tuple[Weight, ...]
    is_castable: bool = False
    """Whether layerwise casting, with the patterns of its class, keeps its weights in fewer bits."""
    is_layer: bool = False
    """Whether diffusers offloads it as one of torch's layers, and not weight by weight."""

    def is_within(self, other: TracedModule) -> bool:
        """Whether this is a module inside another one."""
        return self.path.startswith(other.path + ".")


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

    def moved(self) -> tuple[Weight, ...]:
        """Return all weights, tied ones once, in the order in which `Module.to` moves them: children go first."""
        found: dict[int, Weight] = {}
        open_: list[TracedModule] = []
        for module in (*self.modules, None):
            while open_ and (module is None or not module.is_within(open_[-1])):
                for weight in open_.pop().weights:
                    found.setdefault(weight.storage, weight)
            if module is not None:
                open_.append(module)
        return tuple(found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way through one stretch of a trace: the VAE in tiles, or one picture at a time.

    It stands in for the events from `start` to `end`. Births in it are counted on from those before `start`.
    `outputs` pairs the births that outlive the stretch: the number of a plain one, and of the one that stands for it.
    """

    name: str
    start: int
    end: int
    events: array[int]
    outputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run as recorded: everything a placement policy needs to be replayed."""

    pipeline_class: str
    components: tuple[TracedComponent, ...]
    offload_chain: tuple[str, ...]
    """The pipeline's `model_cpu_offload_seq`, components that are there."""
    offload_excluded: tuple[str, ...]
    events: array[int]
    sizes: tuple[int, ...]
    paths: tuple[str, ...]
    phases: tuple[str, ...]
    works: tuple[Work, ...] = ()
    gone: tuple[int, ...] = ()
    """Storages of weights that are let go of during the run."""
    alternatives: tuple[Alternative, ...] = ()
    asked_steps: int = TRACED_STEPS
    """How many denoising steps were asked for; from pictures fewer are taken, and some schedulers take more calls."""
    usual_steps: int | None = None
    """How many denoising steps the pipeline takes where nobody says."""
    basis: str = "traced"
    assumptions: tuple[str, ...] = ()
    """What the run took as given where a value would have decided."""

    def component(self, name: str) -> TracedComponent:
        """Return a component by name."""
        return next(c for c in self.components if c.name == name)

    def told(self) -> Iterator[Event]:
        """Yield the events for reading, storages by absolute numbers."""
        born: list[int] = []
        for word in self.events:
            kind, payload = word & KIND_MASK, word >> KIND_BITS
            sign = _SIGNS[kind]
            if kind == BORN:
                yield Event(sign, number=len(born), size_bytes=self.sizes[payload])
                born.append(self.sizes[payload])
            elif kind == DIED:
                number = len(born) - 1 - payload
                yield Event(sign, number=number, size_bytes=born[number])
            elif kind in (BEGIN, END):
                yield Event(sign, self.paths[payload])
            else:
                yield Event(sign, self.phases[payload] if kind == PHASE else "")

    def along(self, name: str) -> Trace:
        """Return the trace with every alternative of this name in the place of what it stands in for."""
        chosen = sorted((a for a in self.alternatives if a.name == name), key=lambda a: a.start)
        return replace(self, events=_spliced(self.events, chosen), alternatives=()) if chosen else self

    def without(self, names: Collection[str]) -> Trace:
        """Return the trace of a run that is given what these components would have computed.

        Their weights are gone, and what happened within them; what they gave is there when they would have ended. The
        way through the VAE is to be chosen before: alternatives are gone as well.
        """
        gone = [c.name for c in self.components if c.name in names]
        if not gone:
            return self
        return replace(
            self,
            components=tuple(c for c in self.components if c.name not in gone),
            offload_chain=tuple(n for n in self.offload_chain if n not in gone),
            offload_excluded=tuple(n for n in self.offload_excluded if n not in gone),
            events=_passed_over(self.events, {i for i, path in enumerate(self.paths) if path in gone}),
            alternatives=(),
        )


def _passed_over(events: array[int], roots: Collection[int]) -> array[int]:
    """Return events without those between the beginning and the end of modules with these indices of paths."""
    out = array(EVENT_TYPE)
    renamed: dict[int, int] = {}
    made = born = depth = 0
    inside: dict[int, int] = {}  # births within such a module that are alive: the number, and the word
    for word in events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == DIED:
            number = born - 1 - payload
            if inside.pop(number, None) is None:
                out.append((made - 1 - renamed.pop(number)) << KIND_BITS | DIED)
        elif kind == BORN:
            if depth:
                inside[born] = word
            else:
                renamed[born] = made
                out.append(word)
                made += 1
            born += 1
        elif kind in (BEGIN, END) and payload in roots:
            depth += 1 if kind == BEGIN else -1
            if not depth:
                for number, birth in inside.items():
                    renamed[number] = made
                    out.append(birth)
                    made += 1
                inside.clear()
        elif not depth:
            out.append(word)
    return out


def _spliced(events: array[int], chosen: Sequence[Alternative]) -> array[int]:
    """Return events with alternatives in place, deaths counted anew."""
    out = array(EVENT_TYPE)
    renamed: dict[int, int] = {}  # births of the recorded stream, as numbered in the new one
    born = made = 0

    def copy(stretch: Sequence[int]) -> None:
        nonlocal born, made
        for word in stretch:
            kind = word & KIND_MASK
            if kind == BORN:
                renamed[born] = made
                born += 1
                made += 1
            elif kind == DIED:
                number = renamed.pop(born - 1 - (word >> KIND_BITS), None)
                if number is None:
                    continue  # an output of the plain way that this way has not, or that has died within it
                word = (made - 1 - number) << KIND_BITS | DIED
            out.append(word)

    at = 0
    for alternative in chosen:
        copy(events[at : alternative.start])
        before = born
        copy(alternative.events)
        stands_for = {plain: renamed[other] for plain, other in alternative.outputs}
        for number in range(before, born):
            renamed.pop(number, None)
        # What was recorded plainly has its own births: those that outlive it are the alternative's now.
        born = before + sum(1 for w in events[alternative.start : alternative.end] if w & KIND_MASK == BORN)
        renamed.update(stands_for)
        at = alternative.end
    copy(events[at:])
    return out


@dataclass(slots=True)
class Builder:
    """Collects a trace's events. Storages are known by the numbers it gives out."""

    events: array[int] = field(default_factory=lambda: array(EVENT_TYPE))
    births: int = 0
    alternatives: list[Alternative] = field(default_factory=list)
    _sizes: dict[int, int] = field(default_factory=dict)
    _paths: dict[str, int] = field(default_factory=dict)
    _phases: dict[str, int] = field(default_factory=dict)
    _works: dict[Work, int] = field(default_factory=dict)
    _gone: dict[int, int] = field(default_factory=dict)

    def born(self, size_bytes: int) -> int:
        """Record a birth, and return the storage's number."""
        self._add(BORN, self._index(self._sizes, size_bytes))
        self.births += 1
        return self.births - 1

    def died(self, number: int) -> None:
        self._add(DIED, self.births - 1 - number)

    def begin(self, path: str) -> None:
        self._add(BEGIN, self._index(self._paths, path))

    def end(self, path: str) -> None:
        self._add(END, self._index(self._paths, path))

    def phase(self, name: str) -> None:
        self._add(PHASE, self._index(self._phases, name))

    def work(self, work: Work) -> None:
        self._add(WORK, self._index(self._works, work))

    def step(self) -> None:
        self._add(STEP, 0)

    def gone(self, storage: int) -> None:
        self._add(GONE, self._index(self._gone, storage))

    def _add(self, kind: int, payload: int) -> None:
        self.events.append(payload << KIND_BITS | kind)

    @staticmethod
    def _index(table: dict[Any, int], key: Any) -> int:
        found = table.get(key)
        if found is None:
            found = table[key] = len(table)
        return found

    @contextlib.contextmanager
    def aside(self) -> Iterator[array[int]]:
        """Collect into another array for a while, which is given; the count of births goes back afterwards."""
        kept, births = self.events, self.births
        self.events = array(EVENT_TYPE)
        try:
            yield self.events
        finally:
            self.events, self.births = kept, births

    def tables(self) -> dict[str, Any]:
        """Return the tables that a trace's events index into."""
        return {
            "events": self.events,
            "sizes": tuple(self._sizes),
            "paths": tuple(self._paths),
            "phases": tuple(self._phases),
            "works": tuple(self._works),
            "gone": tuple(self._gone),
            "alternatives": tuple(self.alternatives),
        }
