"""Replay a trace under a placement: who is on the device when, and the most bytes that are there at once. No torch.

Each placement moves weights when modules begin and end, with the semantics of the libraries' own hooks (diffusers 0.42,
accelerate 1.15). What they do and do not do is written beside each; activations are the trace's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.trace import Event, Trace, TracedComponent, Weight

CUDA_GRANULE_BYTES = 512
"""The caching allocator rounds every request up to this, and counts it so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The most bytes on the device during a phase, and what they were."""

    name: str
    peak_bytes: int
    weights_bytes: int
    activation_bytes: int


class Placement:
    """Moves weights when modules begin and end. `begin` and `end` yield the bytes that come (negative: that go)."""

    def __init__(self, trace: Trace, granule_bytes: int = CUDA_GRANULE_BYTES) -> None:
        self.trace = trace
        self.granule = granule_bytes
        self.paths = {m.path: m for c in trace.components for m in c.modules}

    def rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self.granule) * self.granule

    def size(self, weights: Iterable[Weight]) -> int:
        """Return the device bytes of weights, each rounded as the allocator does."""
        return sum(self.rounded(w.size_bytes) for w in weights)

    def resident(self) -> int:
        """Return the bytes that are on the device before the call, and stay."""
        return 0

    def begin(self, path: str) -> Iterator[int]:
        yield from ()

    def end(self, path: str) -> Iterator[int]:
        yield from ()


class Resident(Placement):
    """Everything on the device for good."""

    def resident(self) -> int:
        return sum(self.size(c.weights()) for c in self.trace.components)


class ModelOffload(Placement):
    """`enable_model_cpu_offload`: a component comes at its first use, once its direct predecessor has gone.

    Nothing happens after its use: it stays until its successor begins, or the call ends. Only the direct predecessor is
    sent away. A component outside the chain has none, and excluded ones are on the device for good.
    """

    def __init__(self, trace: Trace, granule_bytes: int = CUDA_GRANULE_BYTES) -> None:
        super().__init__(trace, granule_bytes)
        self.here: set[str] = set()
        self.before = dict(zip(trace.offload_chain[1:], trace.offload_chain, strict=False))
        self.sizes = {c.name: self.size(c.weights()) for c in trace.components}

    def resident(self) -> int:
        self.here = set(self.trace.offload_excluded)
        return sum(self.sizes[name] for name in self.here)

    def begin(self, path: str) -> Iterator[int]:
        if path not in self.sizes:
            return
        previous = self.before.get(path)
        if previous in self.here:
            self.here.remove(previous)
            yield -self.sizes[previous]
        if path not in self.here:
            self.here.add(path)
            yield self.sizes[path]


class SequentialOffload(Placement):
    """`enable_sequential_cpu_offload`: each module that owns weights fetches them for its own forward.

    Buffers are put on the device when it is enabled and stay, unless the component owns parameters itself: then those
    of the checkpoint are fetched too. Tied weights are fetched by each owner, a copy each.
    """

    def __init__(self, trace: Trace, granule_bytes: int = CUDA_GRANULE_BYTES) -> None:
        super().__init__(trace, granule_bytes)
        self.fetched: dict[str, int] = {}
        self.kept = 0
        for component in trace.components:
            if component.name in trace.offload_excluded:
                self.kept += self.size(component.weights())
            else:
                self._split(component)

    def _split(self, component: TracedComponent) -> None:
        roots = [m for m in component.modules if m.path == component.name]
        fetches_buffers = any(not w.is_buffer for m in roots for w in m.weights)
        for module in component.modules:
            moving = [w for w in module.weights if not w.is_buffer or (fetches_buffers and w.is_saved)]
            self.fetched[module.path] = self.size(moving)
            self.kept += self.size(w for w in module.weights if w not in moving)

    def resident(self) -> int:
        return self.kept

    def begin(self, path: str) -> Iterator[int]:
        yield self.fetched.get(path, 0)

    def end(self, path: str) -> Iterator[int]:
        yield -self.fetched.get(path, 0)


class GroupOffload(Placement):
    """`enable_group_offload`: groups of weights come for the forward of the module that leads them.

    At leaf level a group is what a module owns itself. At block level it is `blocks_per_group` blocks of a list among a
    component's direct children (one, with a stream), and what is in no list forms one more group, led by the component.
    A VAE's root forward never runs, so that at block level it is resident here, as the optimizer leaves it.

    With a stream the order of groups is learnt in a component's first forward. From its second on, a group fetches the
    next one before it computes; the component itself fetches the first. Block groups keep their buffers.
    """

    def __init__(
        self,
        trace: Trace,
        granule_bytes: int = CUDA_GRANULE_BYTES,
        *,
        block_level: bool = False,
        use_stream: bool = True,
        blocks_per_group: int = 1,
        excluded: tuple[str, ...] = (),
    ) -> None:
        super().__init__(trace, granule_bytes)
        self.use_stream = use_stream
        self.block_level = block_level
        self.kept = 0
        self.sizes: dict[str, int] = {}
        self.stays: dict[str, int] = {}
        self.last: dict[str, str] = {}
        for component in trace.components:
            if component.name in excluded or (block_level and component.name == "vae"):
                self.kept += self.size(component.weights())
            elif block_level:
                self._blocks(component, 1 if use_stream else blocks_per_group)
            else:
                for module in component.modules:
                    self.sizes[module.path] = self.size(module.weights)
        self.order: dict[str, list[str]] = {}
        self.learning: str | None = None
        self.here: set[str] = set()

    def _blocks(self, component: TracedComponent, count: int) -> None:
        left = {m.path: m.weights for m in component.modules}
        for paths in component.blocks:
            for start in range(0, len(paths), count):
                group = paths[start : start + count]
                inside = [p for p in left if any(p == g or p.startswith(g + ".") for g in group)]
                weights = {w.storage: w for p in inside for w in left.pop(p)}
                self.sizes[group[0]] = self.size(weights.values())
                self.stays[group[0]] = self.size(w for w in weights.values() if w.is_buffer) if self.use_stream else 0
                self.last[group[-1]] = group[0]
        rest = {w.storage: w for weights in left.values() for w in weights}
        # The group lists the buffers of its modules once more by themselves. Moving a module makes new buffers, so that
        # the listed ones are old objects, which are then moved as well: while the group is here they are here twice.
        twice = (w for path, weights in left.items() if path != component.name for w in weights if w.is_buffer)
        self.sizes[component.name] = self.size(rest.values()) + self.size(twice)

    def resident(self) -> int:
        return self.kept

    def _come(self, path: str) -> Iterator[int]:
        if path not in self.here:
            self.here.add(path)
            yield self.sizes[path]

    def _go(self, path: str) -> Iterator[int]:
        if path in self.here:
            self.here.remove(path)
            stays = self.stays.pop(path, 0)  # after the first time they are there
            self.sizes[path] -= stays
            yield -(self.sizes[path])

    def begin(self, path: str) -> Iterator[int]:
        root = path.partition(".")[0]
        if self.use_stream and path == root and root != "vae":
            known = self.order.get(root)
            if known is None:
                self.learning = root
                self.order[root] = []
            elif known:
                yield from self._come(path) if path in self.sizes else ()
                yield from self._come(known[0])
                return
        if path not in self.sizes:
            return
        yield from self._come(path)
        if not self.use_stream or path == root:
            return
        if self.learning == root:
            self.order[root].append(path)
        elif path in self.order.get(root, ()):
            order = self.order[root]
            following = order.index(path) + 1
            if following < len(order):
                yield from self._come(order[following])

    def end(self, path: str) -> Iterator[int]:
        if path == self.learning:
            self.learning = None
        # A group of several blocks goes when its last one ends, and not when its leader does.
        is_inner = self.block_level and path != path.partition(".")[0]
        leader = self.last.get(path) if is_inner else path
        if leader is not None and leader in self.sizes:
            yield from self._go(leader)


def peaks(trace: Trace, placement: Placement) -> tuple[PhasePeak, ...]:
    """Return the peak of each phase, in order; the first, "start", is from the call's beginning to its first phase."""
    phases: dict[str, PhasePeak] = {}
    weights, live = placement.resident(), 0
    sizes: dict[int, int] = {}
    phase = "start"

    def seen() -> None:
        best = phases.get(phase)
        if best is None or weights + live > best.peak_bytes:
            phases[phase] = PhasePeak(
                name=phase, peak_bytes=weights + live, weights_bytes=weights, activation_bytes=live
            )

    seen()
    for event in trace.events:
        match event.kind:
            case "+":
                sizes[event.number] = placement.rounded(event.size_bytes)
                live += sizes[event.number]
            case "-":
                live -= sizes.pop(event.number)
            case "=":
                phase = event.name
            case _:
                for change in _moves(placement, event):
                    weights += change
                    seen()
        seen()
    return tuple(phases.values())


def _moves(placement: Placement, event: Event) -> Iterator[int]:
    return placement.begin(event.name) if event.kind == ">" else placement.end(event.name)


def peak_bytes(trace: Trace, placement: Placement) -> int:
    """Return the most bytes on the device at once: what `torch.cuda.max_memory_allocated` would say."""
    return max(p.peak_bytes for p in peaks(trace, placement))
