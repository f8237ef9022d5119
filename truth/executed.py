"""What a case really holds: the libraries' own hooks, run on the counted device."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import Any

import torch

from engine import optimizers
from engine.dryrun import phases
from engine.dryrun.record import no_collection
from engine.facts.casting import is_text_encoder
from engine.optimizers import placing
from engine.optimizers.spec import Context
from engine.run import stages
from truth import device
from truth.cases import Case
from truth.seen import Phase, Seen

STAGED = "staged_encoding"


def _apply(pipe: Any, case: Case) -> None:
    here = Context(device=device.NAME, dtype=case.dtype)
    for step in placing.spread(case.steps, _modules(pipe)):
        if step.name == STAGED:
            continue
        optimizer = optimizers.get(step.name)
        optimizer.apply(pipe, step, here)
        optimizer.verify(pipe, step, here)


def executed(case: Case) -> Seen:
    """Return what a case held, from before anything is placed to the end of its call.

    Raises: IncompatibleError, for a step that cannot act on its pipeline; torch.OutOfMemoryError.
    """
    device.load()
    gc.collect()
    before = device.counts().live_bytes
    device.reset_peak()
    pipe, call = case.made()
    run = _run_in_stages if any(s.name == STAGED for s in case.steps) else _run
    with torch.no_grad(), no_collection():
        watch = run(case, pipe, call, before)
    return Seen(phases=tuple(watch.phases), pinned_bytes=watch.pinned_bytes)


def _run(case: Case, pipe: Any, call: dict[str, Any], before: int) -> _Watch:
    _apply(pipe, case)
    with _watched(_modules(pipe), before) as watch:
        pipe(**call)
    return watch


def _run_in_stages(case: Case, pipe: Any, call: dict[str, Any], before: int) -> _Watch:
    """The prompts are encoded while nothing else has weights; then the text encoders go, and the rest comes."""
    modules = _modules(pipe)
    encoders = {n: m for n, m in modules.items() if is_text_encoder(n)}
    rest = {n: m for n, m in modules.items() if n not in encoders}
    with _watched(modules, before) as watch:
        for name, module in rest.items():
            setattr(pipe, name, copy.deepcopy(module).to("meta"))
        for module in encoders.values():
            module.to(device.NAME)
        encoded = stages.encode(pipe, call, device.NAME)
        watch.enter("load")
        for name, module in encoders.items():
            module.to("meta")
            setattr(pipe, name, None)
        for name, module in rest.items():
            setattr(pipe, name, module)
        _apply(pipe, case)
        with stages.given(pipe, encoded, device.NAME):
            pipe(**call)
    return watch


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


class _Watch:
    """Notes what a phase has held when the next one begins."""

    def __init__(self, modules: dict[str, torch.nn.Module], before: int) -> None:
        self.modules = modules
        self.before = before
        self.phases: list[Phase] = []
        self.names = phases.Names(loaded=True)
        self.now = "load"
        self.resident: frozenset[str] = frozenset()
        self.pinned_bytes = 0

    def enter(self, kind: str) -> None:
        name = self.names.entered(kind)
        if name is not None:
            self.close()
            self.now = name
            self.resident = frozenset(self._resident())

    def close(self) -> None:
        peak = device.counts().peak_bytes - self.before
        self.pinned_bytes = max(self.pinned_bytes, device.counts().pinned_peak_bytes)
        self.phases.append(Phase(name=self.now, peak_bytes=peak, resident=self.resident))
        device.reset_peak()

    def _resident(self) -> Iterator[str]:
        for name, module in self.modules.items():
            weights = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
            yield from (f"{name}.{key}" for key, weight in weights if weight.device.type == device.NAME)


@contextlib.contextmanager
def _watched(modules: dict[str, torch.nn.Module], before: int) -> Iterator[_Watch]:
    """Watch a call, phase by phase."""
    watch = _Watch(modules, before)
    with phases.told(modules, watch.enter):
        yield watch
        watch.close()
