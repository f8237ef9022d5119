"""One run, twice: predicted from a dry run, and executed by torch's CUDA build on the phantom device. In bytes.

Runs where the phantom device is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from engine import optimizers
from engine.dryrun import build, inputs, phases, record, run
from engine.estimate import allocator, stream, workspaces
from engine.estimate.stream import Taken
from engine.estimate.trace import Trace, Work
from engine.estimate.ways import way
from engine.estimate.whole import placed
from engine.facts.model import Model
from engine.optimizers.spec import Context
from engine.values import Request, Step
from truth.phantom import card

Made = tuple[Any, dict[str, Any]]


@dataclass
class Peaks:
    """The most bytes in each phase, by its name, and of the whole call."""

    allocated: dict[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        return max(self.allocated.values())


def steps(*named: tuple[str, dict[str, Any]]) -> list[Step]:
    """Return the steps of these names, with these parameters, in their order."""
    made = [optimizers.spec(name).step(params) for name, params in named]
    return sorted(made, key=lambda s: optimizers.spec(s.name).slot)


def changing(chosen: Sequence[Step]) -> list[Step]:
    """Return the steps that a dry run applies too."""
    return list(optimizers.changing(chosen))


def loaded_as(pipe: Any, dtype: str) -> Any:
    """Return a pipeline in the precision that loading it so would give it."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            build.as_loaded(component, getattr(torch, dtype))
    return pipe


def dry(made: Made, chosen: Sequence[Step], dtype: str) -> tuple[Trace, list[card.Answer]]:
    """Return the trace of a pipeline with weights, which go to meta, and what was read of the device in it."""
    pipe, call = made
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to("meta")
            getattr(component, "tie_weights", lambda: None)()
    run.change(pipe, changing(chosen), dtype)
    name = way(chosen)
    if name:  # the other way is recorded first
        with card.listening() as plainly:
            made_trace = record.record(pipe, call, "cuda", [name])
        return made_trace, plainly
    with card.listening() as heard:
        return record.record(pipe, call, "cuda"), heard


def predicted(
    trace: Trace, chosen: Sequence[Step], dtype: str, capability: tuple[int, int], multiprocessors: int
) -> Peaks:
    """Return the peaks that the engine replays. Convolutions want no workspace: the phantom's cuDNN asks for none."""

    def takes(work: Work) -> Taken:
        return Taken() if work.kind == "conv" else workspaces.taken(work, capability, multiprocessors)

    along = trace.along(way(chosen))
    asked = stream.build(along, placed(along, chosen, dtype), functools.cache(takes))
    found = allocator.replay(asked.events, asked.sizes, marks=[i for i, _ in asked.marks], aside=asked.aside)
    names = [name for _, name in asked.marks]
    return Peaks(dict(zip(names, found.allocated_bytes, strict=True)), found.peak_reserved_bytes)


def executed(made: Made, chosen: Sequence[Step], dtype: str, answers: list[card.Answer]) -> Peaks:
    """Return the peaks of torch's own allocator while a pipeline runs on the phantom device.

    `answers` are what the host reads of the device: nothing is computed on it.
    """
    pipe, call = made
    context = Context(device="cuda", dtype=dtype)
    for step in chosen:
        optimizer = optimizers.get(step.name)
        optimizer.apply(pipe, step, context)
        optimizer.verify(pipe, step, context)
    found = Peaks()
    watch = _Watch(found)
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    card.tell(answers)
    with torch.no_grad(), card.weights_keep_theirs(), phases.told(modules, watch.enter):
        pipe(**call)
    watch.close()
    return found


class _Watch:
    """Takes the peak of a phase where the next begins."""

    def __init__(self, found: Peaks) -> None:
        self.found = found
        self.names = phases.Names()
        self.now = stream.LOADING

    def enter(self, kind: str) -> None:
        name = self.names.entered(kind)
        if name is not None:
            self.close()
            self.now = name

    def close(self) -> None:
        self.found.allocated[self.now] = torch.cuda.max_memory_allocated()
        self.found.reserved_bytes = max(self.found.reserved_bytes, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()


def catalogued(model: Model, request: Request, dtype: str) -> Made:
    """Return a model of the catalogue at its true size, with weights that nobody has written, and its call."""
    from accelerate import init_empty_weights

    pipe = build.pipeline(model, getattr(torch, dtype), functools.partial(init_empty_weights, include_buffers=False))
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            _fill(component)
    call = inputs.call(
        model,
        pipe,
        height=request.height,
        width=request.width,
        frames=request.frames,
        batch=request.batch,
        steps=run._steps(pipe, request),
        guidance=request.guidance,
        extra=request.call,
    )
    return pipe, call


def _fill(component: nn.Module) -> None:
    """Put untouched memory of the host in the place of every weight on meta; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in component.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
