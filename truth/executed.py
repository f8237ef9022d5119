"""What a case really holds: the libraries' own hooks, run on the counted device."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine import optimizers
from engine.optimizers.spec import Context
from truth import device
from truth.cases import Case
from truth.seen import Phase, Seen

_ENCODERS = ("text_encoder", "image_encoder", "prior")


def placed(case: Case) -> tuple[Any, dict[str, Any]]:
    """Return a case's pipeline with its steps applied on the counted device, each seen to hold; and its call.

    Raises: IncompatibleError, for a step that cannot act on it; torch.OutOfMemoryError.
    """
    device.load()
    pipe, call = case.made()
    here = Context(device=device.NAME, dtype=case.dtype)
    for step in case.steps:
        optimizer = optimizers.get(step.name)
        optimizer.apply(pipe, step, here)
        optimizer.verify(pipe, step, here)
    return pipe, call


def executed(case: Case, calls: int = 1) -> list[Seen]:
    """Return what each of some calls in a row held, by the same pipeline. Raises: as `placed`."""
    device.load()
    gc.collect()
    before = device.counts().live_bytes
    device.reset_peak()
    pipe, call = placed(case)
    found: list[Seen] = []
    for _ in range(calls):
        if found:
            gc.collect()
            device.reset_peak()
        with _watched(pipe, before) as watch, torch.no_grad():
            pipe(**call)
        found.append(Seen(phases=tuple(watch.phases), pinned_bytes=device.counts().pinned_bytes))
    return found


class _Watch:
    """Notes what a phase has held when the next one begins."""

    def __init__(self, modules: dict[str, torch.nn.Module], before: int) -> None:
        self.modules = modules
        self.before = before
        self.phases: list[Phase] = []
        self.times: dict[str, int] = {}
        self.now = "load"
        self.resident: frozenset[str] = frozenset()

    def enter(self, kind: str) -> None:
        if kind == self.now.partition(".")[0]:
            return
        self.close()
        self.times[kind] = self.times.get(kind, 0) + 1
        self.now = kind if self.times[kind] == 1 else f"{kind}.{self.times[kind]}"
        self.resident = frozenset(self._resident())

    def close(self) -> None:
        peak = device.counts().peak_bytes - self.before
        self.phases.append(Phase(name=self.now, peak_bytes=peak, resident=self.resident))
        device.reset_peak()

    def _resident(self) -> Iterator[str]:
        for name, module in self.modules.items():
            weights = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
            yield from (f"{name}.{key}" for key, weight in weights if weight.device.type == device.NAME)


@contextlib.contextmanager
def _watched(pipe: Any, before: int) -> Iterator[_Watch]:
    """Watch a call: a phase begins with a component's forward, or with a VAE's `encode` or `decode`."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    watch = _Watch(modules, before)
    handles, wrapped = [], []
    for name, module in modules.items():
        kind = "encode" if name.startswith(_ENCODERS) else "denoise"
        handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: watch.enter(kind)))
        for method in () if name.startswith(_ENCODERS) else ("encode", "decode"):
            real = getattr(module, method, None)
            if callable(real):
                setattr(module, method, _entering(watch, method, real))
                wrapped.append((module, method))
    try:
        yield watch
        watch.close()
    finally:
        for handle in handles:
            handle.remove()
        for module, method in wrapped:
            delattr(module, method)


def _entering(watch: _Watch, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **given: Any) -> Any:
        watch.enter(kind)
        return real(*args, **given)

    return call
