"""From a trace and a placement to the stream of allocations on the device, and its peaks. No torch.

The stream is what the allocator is asked for, in order: weights as they move, activations as they live, the workspaces
that operators take while they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.estimate.placements import DROP, EMPTY, FETCH, LOAD, STAGE, STORE, Move, Placement
from engine.estimate.trace import BEGIN, BORN, DIED, END, GONE, KIND_BITS, KIND_MASK, PHASE, STEP, WORK, Trace, Work

CUDA_GRANULE_BYTES = 512
"""The caching allocator rounds every request up to this, and counts it so."""

WEIGHT, ACTIVATION, WORKSPACE = range(3)
LOADING = "load"
NEXT_LOADING = "load.2"
"""Between the stages of a run that is made in two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The most bytes on the device during a phase, and what they were."""

    name: str
    peak_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What an operator takes beside its inputs and outputs while it computes.

    Those of `for_good_bytes` are kept from the first such operator on (a library's own workspaces, for all its calls).
    A `given_up` one is done without when there is no room: another algorithm is taken.
    """

    bytes: int = 0
    for_good_bytes: tuple[int, ...] = ()
    is_given_up: bool = False


@dataclass(slots=True)
class Stream:
    """Allocations in order: `key` allocates sizes[key], `-key` frees it, 0 empties the cache. Keys count from 1."""

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [0])
    kinds: bytearray = field(default_factory=lambda: bytearray(1))
    optional: set[int] = field(default_factory=set)
    aside: dict[int, int] = field(default_factory=dict)
    """What is allocated on a stream of copies, and on which, counted from 1: each component has its own (diffusers'
    `apply_group_offloading` makes one), and each stream has pools of its own."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Where each phase begins: an index into `events`, and its name."""
    present: list[frozenset[int]] = field(default_factory=list)
    """The placement's slots that are on the device where each phase begins."""
    interrupted: str = ""
    """The phase that goes on when the next stage is loaded."""
    waiting: list[int] = field(default_factory=list)
    """Births that wait on the host meanwhile, by number."""
    step_ends: list[int] = field(default_factory=list)
    """Where each denoising step has ended: an index into `events`."""
    owners: dict[int, str] = field(default_factory=dict)
    """The component that each allocation of weights belongs to, by key."""

    def allocate(self, size_bytes: int, kind: int, owner: str | None = None) -> int:
        self.sizes.append(size_bytes)
        self.kinds.append(kind)
        key = len(self.sizes) - 1
        if owner is not None:
            self.owners[key] = owner
        self.events.append(key)
        return key


def build(trace: Trace, placement: Placement, takes: Callable[[Work], Taken] | None = None) -> Stream:
    """Return the stream of a trace under a placement; `takes` says what operators take beside their results."""
    made = Stream()
    events, allocate = made.events, made.allocate
    weights: dict[int, int] = {}  # slot → key
    born: list[int] = []
    sizes, paths = trace.sizes, trace.paths
    acts = [placement.acts_on(p) or p in placement.casts for p in paths]
    taken = [takes(w) if takes is not None else None for w in trace.works]
    taken = [t if t is not None and (t.bytes or t.for_good_bytes) else None for t in taken]
    kept: dict[int, int] = {}
    standing_in: dict[int, int] = {}  # births that took a weight's place: number → slot
    copying: dict[str, int] = {}  # the stream of copies of each component

    made.marks.append((0, LOADING))
    made.present.append(frozenset())
    at_rest = placement.resident()
    owners = {s: c.name for c in trace.components for s in placement.slots(c.weights())} if at_rest else {}
    for slot in at_rest:
        weights[slot] = allocate(placement.sizes[slot], WEIGHT, owners.get(slot))

    for word in trace.events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == BORN:
            born.append(allocate(sizes[payload], ACTIVATION))
        elif kind == DIED:
            number = len(born) - 1 - payload
            if number in standing_in:
                _replaced(made, placement, weights, born, standing_in, standing_in.pop(number))
            else:
                events.append(-born[number])
        elif kind == WORK:
            want = taken[payload]
            if want is not None:
                _workspace(made, want, kept)
        elif kind == PHASE:
            made.marks.append((len(events), trace.phases[payload]))
            made.present.append(frozenset(weights))
        elif kind == STEP:
            made.step_ends.append(len(events))
        elif kind == GONE:
            _replaced(made, placement, weights, born, standing_in, placement.slot_of(trace.gone[payload]))
        elif kind == BEGIN and acts[payload]:
            path = paths[payload]
            for move in placement.begin(path):
                if move.verb == STAGE:
                    _between_stages(made, frozenset(weights), born, standing_in)
                else:
                    _moved(made, move, placement, weights, _component(path), copying)
            for cast in placement.casts.get(path, ()):
                wide = allocate(cast.computed_bytes, WEIGHT, _component(path))
                events.append(-weights[cast.slot])
                weights[cast.slot] = wide
        elif kind == END and acts[payload]:
            path = paths[payload]
            for cast in placement.casts.get(path, ()):
                narrow = allocate(cast.stored_bytes, WEIGHT, _component(path))
                events.append(-weights[cast.slot])
                weights[cast.slot] = narrow
            for move in placement.end(path):
                _moved(made, move, placement, weights, _component(path), copying)
    return made


def _replaced(
    made: Stream, placement: Placement, weights: dict[int, int], born: list[int], standing_in: dict[int, int], slot: int
) -> None:
    """Let what was born last take the place of a weight that is let go of: it is where that was, and moves as that did.

    So a VAE is widened that is on the host: its weights are made there, and come as wide as they are by then.
    """
    if slot < 0:  # of a component that is not there
        return
    events, before = made.events, weights.pop(slot, None)
    key = born[-1] if born and events and events[-1] == born[-1] else None
    if key is not None:
        standing_in[len(born) - 1] = slot
        placement.sizes[slot] = made.sizes[key]
        if before is None:
            events.pop()
        else:
            weights[slot] = key
            made.kinds[key] = WEIGHT
            made.owners[key] = made.owners[before]
    if before is not None:
        events.append(-before)


def _workspace(made: Stream, want: Taken, kept: dict[int, int]) -> None:
    for size in want.for_good_bytes:
        if size not in kept:
            kept[size] = made.allocate(size, WORKSPACE)
    if want.bytes:
        key = made.allocate(want.bytes, WORKSPACE)
        made.events.append(-key)
        if want.is_given_up:
            made.optional.add(key)


def _component(path: str) -> str:
    """Return the component that a module belongs to. What comes when a module begins is its own component's."""
    return path.partition(".")[0]


def _moved(
    made: Stream,
    move: Move,
    placement: Placement,
    weights: dict[int, int],
    component: str,
    copying: dict[str, int],
) -> None:
    verb = move.verb
    if verb in (LOAD, FETCH):
        for slot in move.slots:
            before = weights.get(slot)
            if before is not None and verb == LOAD:
                continue
            key = weights[slot] = made.allocate(placement.sizes[slot], WEIGHT, component)
            if verb == FETCH:
                made.aside[key] = copying.setdefault(component, len(copying) + 1)
            if before is not None:
                made.events.append(-before)
    elif verb in (DROP, STORE):
        for slot in move.slots:
            if slot in weights:
                made.events.append(-weights.pop(slot))
    elif verb == EMPTY:
        made.events.append(0)


def _between_stages(made: Stream, present: frozenset[int], born: list[int], standing_in: Mapping[int, int]) -> None:
    """Let a phase of loading begin, or end, between what was before and the phase that a run is in.

    A phase that has begun and held nothing yet begins after the loading; one that has is continued under its next name.
    What was computed waits on the host meanwhile.
    """
    start, name = made.marks[-1]
    if name == NEXT_LOADING:
        for number in made.waiting:
            born[number] = made.allocate(made.sizes[born[number]], ACTIVATION)
        made.marks.append((len(made.events), made.interrupted))
        made.present.append(present)
        return
    dead = {-key for key in made.events if key < 0}
    made.waiting = [number for number, key in enumerate(born) if key not in dead and number not in standing_in]
    at = len(made.events)
    made.events += [-born[number] for number in made.waiting]
    if start == at:
        made.interrupted = name
        made.marks[-1] = len(made.events), NEXT_LOADING
    else:
        kind, _, times = name.partition(".")
        made.interrupted = f"{kind}.{int(times or 1) + 1}"
        made.marks.append((len(made.events), NEXT_LOADING))
        made.present.append(present)


def peaks(stream: Stream, granule_bytes: int = CUDA_GRANULE_BYTES) -> tuple[PhasePeak, ...]:
    """Return the peak of each phase of allocated bytes, in order, as `torch.cuda.max_memory_allocated` counts."""
    rounded = [-(-s // granule_bytes) * granule_bytes for s in stream.sizes]
    kinds = stream.kinds
    live = [0, 0, 0]
    total = 0
    found: list[PhasePeak] = []
    ends = [index for index, _ in stream.marks[1:]] + [len(stream.events)]
    for (start, name), end in zip(stream.marks, ends, strict=True):
        most, at = total, tuple(live)
        for key in stream.events[start:end]:
            if key > 0:
                size = rounded[key]
                total += size
                live[kinds[key]] += size
                if total > most:
                    most, at = total, tuple(live)
            elif key < 0:
                size = rounded[-key]
                total -= size
                live[kinds[-key]] -= size
        found.append(
            PhasePeak(
                name=name,
                peak_bytes=most,
                weights_bytes=at[WEIGHT],
                activation_bytes=at[ACTIVATION],
                workspace_bytes=at[WORKSPACE],
            )
        )
    return tuple(found)


def later_peak_bytes(stream: Stream, granule_bytes: int = CUDA_GRANULE_BYTES) -> int:
    """Return the most bytes on the device at once in a call after the first, which loads nothing.

    What is left of the first one is there from its beginning, where that made it as it went on: tables that a model
    keeps (of positions, say), workspaces of libraries. Where weights are is what it was in the first.
    """
    rounded = [-(-s // granule_bytes) * granule_bytes for s in stream.sizes]
    gone = {-key for key in stream.events if key < 0}
    left = {k for k in range(1, len(rounded)) if stream.kinds[k] != WEIGHT and k not in gone}
    loaded = max(i for i, (_, name) in enumerate(stream.marks) if name in (LOADING, NEXT_LOADING))
    called = stream.marks[loaded + 1][0] if loaded + 1 < len(stream.marks) else len(stream.events)
    total, most = sum(rounded[k] for k in left), 0
    for at, key in enumerate(stream.events):
        if key < 0:
            total -= rounded[-key]
        elif key not in left:
            total += rounded[key]
        if at >= called and total > most:
            most = total
    return most


def peak_bytes(phases: Sequence[PhasePeak]) -> int:
    """Return the most bytes on the device at once."""
    return max(p.peak_bytes for p in phases)
