"""What every run of a trace takes at the least, whatever its placement: arithmetic instead of a replay. No torch.

A replay takes a tenth of a second and more. A candidate whose least is too much already, or whose least time is longer
than what another one takes, need not be replayed. So nothing here may ever be more than the replay's own answer
(`tests/test_bounds.py` holds the two against each other), and it need not be much less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.estimate.clock import Speeds
from engine.estimate.placements import ITEM_BYTES, Casting
from engine.estimate.trace import BEGIN, BORN, DIED, END, GONE, KIND_BITS, KIND_MASK, STEP, Trace, TracedComponent
from engine.facts.casting import is_text_encoder
from engine.optimizers import placing
from engine.optimizers.spec import is_vae
from engine.values import Step, plain

HOST_BASE_BYTES = 1152 * 1024**2
"""Anonymous memory of a process that has run a pipeline on a card, without its weights: 1.00 to 1.32 GiB in 15 runs on
an H200 (torch 2.11 for CUDA 13.0, driver 580.159, Linux), the median 1.13. 438 MiB of it are there once the libraries
are imported, 628 once CUDA's have started; the rest comes with the kernels that are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A component: its weights, what is alive of activations while it computes, and what it would fetch."""

    weights_bytes: int
    castable_bytes: int = 0
    """Of its weights, those that layerwise casting keeps in fewer bits, as they are without it."""
    castable_items: int = 0
    """How many numbers those are."""
    unmatched_bytes: int = 0
    """What belongs to no block, and comes as a whole at block level."""
    activations_bytes: int = 0
    passes: int = 0
    """How often its own forward runs in the traced steps, and (`passes_a_step`) in the last of them."""
    passes_a_step: int = 0
    fetched_bytes: int = 0
    """What its modules fetch in the traced steps, if each fetches what it owns whenever it runs."""
    fetched_bytes_a_step: int = 0
    is_excluded: bool = False
    """Whether the pipeline keeps it on the device under model and sequential offload."""

    def at_rest_bytes(self, storage: str | None) -> int:
        """Return its weights' bytes, castable ones kept in `storage` (None: nothing is cast)."""
        if storage is None:
            return self.weights_bytes
        return self.weights_bytes - self.castable_bytes + self.castable_items * ITEM_BYTES[storage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The least that a run under some steps takes; seconds are None on a card without rates."""

    required_bytes: int
    host_bytes: int
    seconds: float | None
    copied_bytes: int
    """What crosses the bus to the device, all steps counted."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is known of one way through a trace without replaying it."""

    parts: Mapping[str, Part]
    between_bytes: int
    """The most activations while no component computes."""
    traced_steps: int
    usual_steps: int | None

    def to_json(self) -> dict[str, Any]:
        return dict(plain(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Bounds:
        """Return what `to_json` made. Raises: TypeError, KeyError, AttributeError, for anything else."""
        return cls(**{**content, "parts": {n: Part(**p) for n, p in content["parts"].items()}})

    @cached_property
    def _undecoded(self) -> Bounds:
        parts = {n: dataclasses.replace(p, activations_bytes=0) if is_vae(n) else p for n, p in self.parts.items()}
        return dataclasses.replace(self, parts=parts, between_bytes=0)

    def least(
        self,
        steps: Sequence[Step],
        *,
        context_bytes: int,
        computing_s: float | None,
        speed: Speeds | None,
        denoising_steps: int | None,
        is_own: bool = True,
    ) -> Least:
        """Return the least that a run under `steps` takes.

        `computing_s` is how long it computes with everything on the device. `is_own` is False where these bounds are
        of a trace that decodes in other tiles (or none): then what decoding holds is not known.
        """
        if not is_own:
            return self._undecoded.least(
                steps,
                context_bytes=context_bytes,
                computing_s=computing_s,
                speed=speed,
                denoising_steps=denoising_steps,
            )
        cast = next((s for s in steps if s.name == "layerwise_casting"), None)
        storage = None if cast is None else str(cast.params["storage"])
        named = None if cast is None else cast.params.get("components")
        is_staged = any(s.name == "staged_encoding" for s in steps)
        sums = _Sums(self._further(denoising_steps))
        for name, step in placing.holders(steps, self.parts).items():
            is_encoder = is_text_encoder(name)
            # Unless they are named, text encoders are left as they are.
            is_cast = not is_encoder if named is None else name in named
            sums.add(name, self.parts[name], step, storage if is_cast else None, is_alone=is_staged and is_encoder)
        peak = max(sums.alone_bytes, sums.kept_bytes + max(sums.working_bytes, self.between_bytes))
        seconds = computing_s
        if seconds is not None and speed is not None:
            waited = sums.pageable_bytes / speed.to_device_bytes_per_s
            seconds = max(seconds + waited, sums.streamed_bytes / speed.pinned_bytes_per_s)
        return Least(
            required_bytes=context_bytes + peak,
            host_bytes=HOST_BASE_BYTES + sums.host_bytes,
            seconds=seconds,
            copied_bytes=sums.pageable_bytes + sums.streamed_bytes,
        )

    def _further(self, denoising_steps: int | None) -> int:
        """Return how many denoising steps there are beyond those traced (fewer: below zero)."""
        wanted = self.usual_steps if denoising_steps is None else denoising_steps
        return 0 if wanted is None or not self.traced_steps else wanted - self.traced_steps


class _Sums:
    """Adds up what components take under the placement that holds each."""

    def __init__(self, further_steps: int) -> None:
        self.further = further_steps
        self.kept_bytes = 0  # on the device for good
        self.working_bytes = 0  # the most beside it, while a component computes
        self.alone_bytes = 0  # of text encoders that are alone on the device
        self.host_bytes = 0
        self.pageable_bytes = 0
        self.streamed_bytes = 0

    def add(self, name: str, part: Part, step: Step, storage: str | None, *, is_alone: bool) -> None:
        """Add a component that `step` holds, its castable weights kept in `storage`."""
        at_rest = part.at_rest_bytes(storage)
        if is_alone:
            self.alone_bytes += at_rest
            return
        match self._way(name, part, step):
            case "resident":
                self.kept_bytes += at_rest
                self._works(part.activations_bytes)
            case "model":
                self._works(part.activations_bytes + (at_rest if part.passes else 0))
                self.host_bytes += at_rest
                self.pageable_bytes += at_rest if part.passes else 0
            case "sequential":
                self._works(part.activations_bytes)
                self.pageable_bytes += self._fetched(part, at_rest)
            case "group":
                # What is in no block comes as a whole, without the stream.
                rest = part.unmatched_bytes if step.params["type"] == "block_level" else 0
                if storage is not None:
                    rest = 0  # how much of it is cast is not told
                self._works(part.activations_bytes + (rest if part.passes else 0))
                if step.params["use_stream"]:
                    # The first pass learns the order, and what is fetched last may not be waited for.
                    self.streamed_bytes += self._passing(part, at_rest - rest, -2)
                    self.pageable_bytes += self._passing(part, rest, 0)
                    if not step.params.get("low_cpu_mem_usage"):  # else it is pinned while it is copied
                        blocks = step.params["type"] == "block_level"
                        self.host_bytes += max(0, at_rest - (part.unmatched_bytes if blocks else 0))
                else:
                    self.pageable_bytes += self._passing(part, at_rest, 0)
                    self.host_bytes += at_rest

    @staticmethod
    def _way(name: str, part: Part, step: Step) -> str:
        match step.name:
            case "model_offload":
                return "resident" if part.is_excluded else "model"
            case "sequential_offload":
                return "resident" if part.is_excluded else "sequential"
            case "group_offload":
                return "resident" if step.params["type"] == "block_level" and is_vae(name) else "group"
        return "resident"

    def _works(self, held_bytes: int) -> None:
        self.working_bytes = max(self.working_bytes, held_bytes)

    def _fetched(self, part: Part, at_rest: int) -> int:
        fetched = part.fetched_bytes + self.further * part.fetched_bytes_a_step
        return max(0, fetched) * at_rest // part.weights_bytes if part.weights_bytes else 0

    def _passing(self, part: Part, size_bytes: int, more_passes: int) -> int:
        return max(0, part.passes + self.further * part.passes_a_step + more_passes) * size_bytes


def of_trace(trace: Trace) -> Bounds:
    """Return the bounds of one way through a trace (`Trace.along`)."""
    names = [c.name for c in trace.components]
    roots = {i: path for i, path in enumerate(trace.paths) if path in names}
    stand_ins = _stand_ins(trace)
    most, between = dict.fromkeys(names, 0), 0
    live = steps = 0
    open_: list[str] = []
    born: list[int] = []
    counts: dict[int, int] = {}
    in_step: dict[int, int] = {}
    last_step: dict[int, int] = {}
    for word in trace.events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == BORN:
            size = 0 if len(born) in stand_ins else trace.sizes[payload]
            born.append(size)
            live += size
            if not open_:
                between = max(between, live)
            elif live > most[open_[-1]]:
                most[open_[-1]] = live
        elif kind == DIED:
            live -= born[len(born) - 1 - payload]
        elif kind == BEGIN:
            counts[payload] = counts.get(payload, 0) + 1
            in_step[payload] = in_step.get(payload, 0) + 1
            if payload in roots:
                open_.append(roots[payload])
                most[open_[-1]] = max(most[open_[-1]], live)
        elif kind == END and payload in roots:
            open_.pop()
        elif kind == STEP:
            steps += 1
            last_step, in_step = in_step, {}
    parts = {c.name: _part(trace, c, most[c.name], counts, last_step) for c in trace.components}
    return Bounds(parts=parts, between_bytes=between, traced_steps=steps, usual_steps=trace.usual_steps)


def _stand_ins(trace: Trace) -> frozenset[int]:
    """Return the numbers of births that take the place of a weight (a VAE that is widened): these move as it does."""
    if not trace.gone:
        return frozenset()
    storages = {w.storage for c in trace.components for w in c.weights()}
    found, number, before = set(), -1, -1
    for word in trace.events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == BORN:
            number += 1
        elif kind == GONE and before == BORN and trace.gone[payload] in storages:
            found.add(number)
        before = kind
    return frozenset(found)


def _part(
    trace: Trace, component: TracedComponent, held: int, counts: Mapping[int, int], last_step: Mapping[int, int]
) -> Part:
    weights = component.weights()
    casting = Casting(storage="float8_e4m3fn", compute="float32", components=(component.name,))
    cast = [m for m in component.modules if casting.acts_on(component.name, m)]
    castable = {w.storage: w for m in cast for w in m.weights if w.dtype in ITEM_BYTES}
    blocks = tuple(b + "." for several in component.blocks for b in several)
    outside = {
        w.storage: w for m in component.modules if not (m.path + ".").startswith(blocks or ("\0",)) for w in m.weights
    }
    owned = {m.path: sum(w.size_bytes for w in m.weights if not w.is_buffer) for m in component.modules}
    paths = {p: i for i, p in enumerate(trace.paths) if p in owned or p == component.name}
    root = paths.get(component.name, -1)
    return Part(
        weights_bytes=sum(w.size_bytes for w in weights),
        castable_bytes=sum(w.size_bytes for w in castable.values()),
        castable_items=sum(w.size_bytes // ITEM_BYTES[w.dtype] for w in castable.values()),
        unmatched_bytes=sum(w.size_bytes for w in outside.values()),
        activations_bytes=held,
        passes=counts.get(root, 0),
        passes_a_step=last_step.get(root, 0),
        fetched_bytes=sum(owned.get(p, 0) * counts.get(i, 0) for p, i in paths.items()),
        fetched_bytes_a_step=sum(owned.get(p, 0) * last_step.get(i, 0) for p, i in paths.items()),
        is_excluded=component.name in trace.offload_excluded,
    )
