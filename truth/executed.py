"""What a case really holds: the libraries' own hooks, run on the counted device."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import collector, optimizers
from engine.dryrun import phases
from engine.optimizers import placing, staged_encoding
from engine.optimizers.spec import Context
from engine.run import staged, stages, tables
from engine.run.progress import Quiet
from truth import device, saved
from truth.cases import Case
from truth.seen import Phase, Seen

SEED = 0
"""Each call begins at this state of the device's random numbers, so that calls can be compared."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a pipeline: what it drew, as numbers from 0 to 1, and the most on the device meanwhile."""

    picture: np.ndarray
    peak_bytes: int


def _apply(pipe: Any, case: Case) -> None:
    here = Context(device=device.NAME, dtype=case.dtype)
    for step in placing.spread(case.steps, _modules(pipe)):
        optimizer = optimizers.get(step.name)
        optimizer.apply(pipe, step, here)
        optimizer.verify(pipe, step, here)


def _see_settled(pipe: Any, case: Case) -> None:
    here = Context(device=device.NAME, dtype=case.dtype)
    for step in placing.spread(case.steps, _modules(pipe)):
        settled = optimizers.optional(step.name, "settled")
        if settled is not None:
            settled(pipe, step, here)


def executed(case: Case) -> Seen:
    """Return what a case held, from before anything is placed to the end of its call.

    Raises: IncompatibleError, for a step that cannot act on its pipeline; torch.OutOfMemoryError, or our own of stages.
    """
    return drawn(case, 1)[0]


def drawn(case: Case, calls: int) -> tuple[Seen, tuple[Call, ...]]:
    """Return what a case held to the end of its first call, and all its calls, of one pipeline one after the other.

    Raises: as `executed`.
    """
    device.load()
    tables.forget()
    gc.collect()
    before = device.counts().live_bytes
    device.reset_peak()
    pipe, call = case.made()
    run = _run_in_stages if staged_encoding.is_in(case.steps) else _run
    with torch.no_grad(), collector.off():
        watch, first, again = run(case, pipe, call, before)
        seen = Seen(phases=tuple(watch.phases), pinned_bytes=watch.pinned_bytes)
        made = [Call(first, seen.peak_bytes)]
        for _ in range(1, calls):
            device.reset_peak()
            picture = again()
            made.append(Call(picture, device.counts().peak_bytes - before))
    return seen, tuple(made)


_Draw = Callable[[], np.ndarray]


def _run(case: Case, pipe: Any, call: dict[str, Any], before: int) -> tuple[_Watch, np.ndarray, _Draw]:
    _apply(pipe, case)

    def draw() -> np.ndarray:
        return drawing(pipe, call)

    with _watched(_modules(pipe), before) as watch:
        first = draw()
    _see_settled(pipe, case)
    return watch, first, draw


def _run_in_stages(case: Case, pipe: Any, call: dict[str, Any], before: int) -> tuple[_Watch, np.ndarray, _Draw]:
    """The run itself, as it is made: every component is loaded from a folder, in stages."""
    here = Context(device=device.NAME, dtype=case.dtype)
    watch = _Watch({}, before)

    def wanted(_: Any) -> Iterator[dict[str, Any]]:
        yield call
        watch.enter("load")

    whole = saved.parts_of_case(case, pipe, watch.add)
    found = staged.first(whole, case.steps, wanted, here, Quiet())
    rest = staged.second(whole, case.steps, found, here, Quiet())

    def draw() -> np.ndarray:
        with stages.given(rest, found.encoded[0], device.NAME):
            return drawing(rest, call)

    first = draw()
    watch.close()
    return watch, first, draw


def drawing(pipe: Any, call: Mapping[str, Any]) -> np.ndarray:
    """Return what a call of a pipeline draws: pictures, or frames; from the same noise every time."""
    torch.manual_seed(SEED)
    output = pipe(**call)
    return np.asarray(output.images if hasattr(output, "images") else output.frames)


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


class _Watch:
    """Notes what a phase has held when the next one begins."""

    def __init__(self, modules: dict[str, torch.nn.Module], before: int) -> None:
        self.modules = weakref.WeakValueDictionary(modules)  # nobody is kept by being watched
        self.before = before
        self.phases: list[Phase] = []
        self.names = phases.Names(loaded=True)
        self.now = "load"
        self.resident: frozenset[str] = frozenset()
        self.pinned_bytes = 0

    def add(self, name: str, module: torch.nn.Module) -> None:
        """Watch a component that has just been loaded."""
        self.modules[name] = module
        phases.tell(name, module, self.enter)

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
