"""Record a run: mark modules and phases, follow storages, and give back a trace."""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from engine import collector
from engine.dryrun import kernels, phases
from engine.dryrun.follow import Follower, Held
from engine.dryrun.operators import Target
from engine.estimate.trace import Alternative, Trace, TracedComponent, TracedModule, Weight
from engine.facts import attention

Enter = Callable[[str], None]

WAYS = {"tiled": ("tiling",), "sliced": ("slicing",), "sliced+tiled": ("slicing", "tiling")}
"""Other ways through a VAE, recorded beside the plain one: what is switched on in each."""


def record(
    pipe: Any, call: dict[str, Any], target: str, ways: Sequence[str] = (), held: Held | None = kernels.held
) -> Trace:
    """Return the trace of one call of a pipeline that is on meta, as `target` ("cuda" or "cpu") would compute it.

    `ways` names what is recorded beside it: keys of `WAYS`. A way that is no other is left out. `held` says what CUDA's
    operators hold while they compute; None for a device whose do not.

    Raises: ValueNeeded, when the call reads a value that a dry run does not have; what the pipeline raises.
    """
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    follower = follower_of(modules, target, held)
    steps = steps_marked(pipe, follower)
    parts = components(modules)  # as they are before the call, which may let go of some weights
    with torch.no_grad(), _autocast_knows_meta(), marked(modules, follower, ways), steps, Target(target), follower:
        with collector.off():
            pipe(**call)
    return trace(pipe, parts, follower)


def follower_of(modules: dict[str, nn.Module], target: str, held: Held | None = kernels.held) -> Follower:
    """Return a follower of modules on meta that sees what `target` would hold."""
    weights = [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    return Follower("meta", weights, held if target == "cuda" else None)


@contextlib.contextmanager
def steps_marked(pipe: Any, follower: Follower) -> Iterator[None]:
    """Let every step of the scheduler mark the end of a denoising step.

    Pipelines copy their scheduler, for sound or frame by frame: a bound method is bound anew to the copy, whose steps
    are its own, and are not marked.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step"):
        yield
        return

    @functools.wraps(type(scheduler).step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = type(self).step(self, *args, **kwargs)
        if self is scheduler:
            follower.builder.step()
        return result

    scheduler.step = types.MethodType(step, scheduler)
    try:
        yield
    finally:
        del scheduler.step


@contextlib.contextmanager
def _autocast_knows_meta() -> Iterator[None]:
    """Let `torch.autocast("meta", …)` be entered: models use it to stay in float32, or to switch autocast off.

    Raises, within: RuntimeError, for an autocast to less than float32, whose casts a dry run would miss.
    """
    real = torch.autocast

    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more: Any) -> Any:
        if device_type != "meta":
            return real(device_type, dtype, enabled, **more)
        if enabled and dtype != torch.float32:
            raise RuntimeError(f"a dry run does not follow an autocast to {dtype}")
        return contextlib.nullcontext()

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def components(modules: dict[str, nn.Module]) -> tuple[TracedComponent, ...]:
    """Return components with their weights as they are now."""
    return tuple(_component(name, module) for name, module in modules.items())


def trace(pipe: Any, parts: tuple[TracedComponent, ...], follower: Follower) -> Trace:
    """Return what a follower recorded of a pipeline with these components."""
    follower.finish()
    modules = {c.name for c in parts}
    chain = [n for n in (pipe.model_cpu_offload_seq or "").split("->") if n in modules]
    return Trace(
        pipeline_class=type(pipe).__name__,
        components=parts,
        offload_chain=tuple(chain),
        offload_excluded=tuple(n for n in pipe._exclude_from_cpu_offload if n in modules),
        **follower.builder.tables(),
    )


_MADE_LATER = "_dg_made_later"


def made_later(weight: torch.Tensor) -> None:
    """Mark a weight that is in no file: an optimizer makes it of others, once they are loaded."""
    setattr(weight, _MADE_LATER, True)


def _component(name: str, module: nn.Module) -> TracedComponent:
    owners = []
    castable = set(_castable(module)) if name in attention.DENOISERS else set()
    layers = _layers()
    for path, owner in module.named_modules():
        weights = tuple(
            Weight(
                name=key,
                storage=tensor.untyped_storage()._cdata,
                size_bytes=tensor.untyped_storage().nbytes(),
                is_buffer=key in owner._buffers,
                is_saved=key not in owner._non_persistent_buffers_set and not hasattr(tensor, _MADE_LATER),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
            for key, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        )
        if weights:
            full = f"{name}.{path}".rstrip(".")
            is_layer = isinstance(owner, layers)
            owners.append(TracedModule(path=full, weights=weights, is_castable=owner in castable, is_layer=is_layer))
    return TracedComponent(name=name, modules=tuple(owners), blocks=tuple(_blocks(name, module)))


def _layers() -> tuple[type[nn.Module], ...]:
    """Return the layers that diffusers 0.42 offloads and casts as they are."""
    from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS

    return tuple(_GO_LC_SUPPORTED_PYTORCH_LAYERS)


def _castable(module: nn.Module, path: str = "", patterns: Sequence[str] | None = None) -> Iterator[nn.Module]:
    """Yield the layers that `enable_layerwise_casting` of diffusers 0.42 acts on, with its default patterns."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN as USUAL

    if patterns is None:
        own = ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns")
        patterns = [*USUAL, *(p for name in own for p in getattr(module, name, None) or ())]
    if any(re.search(p, path) for p in patterns):
        return
    if isinstance(module, _layers()):
        yield module
        return
    for name, child in module.named_children():
        yield from _castable(child, f"{path}.{name}" if path else name, patterns)


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the blocks of each list among a component's direct children."""
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield tuple(f"{name}.{key}.{i}" for i in range(len(child)))


@contextlib.contextmanager
def marked(modules: dict[str, nn.Module], follower: Follower, ways: Sequence[str] = ()) -> Iterator[None]:
    """Let every component, and every module that owns weights, mark its beginning and end while this is active."""
    named = phases.Names()

    def enter(kind: str) -> None:
        name = named.entered(kind)
        if name is not None:
            follower.builder.phase(name)

    handles: list[Any] = []
    wrapped: list[tuple[nn.Module, str]] = []
    for name, component in modules.items():
        blocks = {path for group in _blocks(name, component) for path in group}
        for path, module in component.named_modules():
            full = f"{name}.{path}".rstrip(".")
            if path == "" or full in blocks or _owns_weights(module):
                begin = functools.partial(_begin, follower, enter if path == "" else None, full)
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(functools.partial(_end, follower, full)))
        for method in phases.VAE_METHODS:
            if not phases.is_encoder(name) and callable(getattr(component, method, None)):
                setattr(component, method, _method(component, getattr(component, method), follower, enter, name, ways))
                wrapped.append((component, method))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for component, method in wrapped:
            delattr(component, method)


def _owns_weights(module: nn.Module) -> bool:
    return any(w is not None for w in (*module._parameters.values(), *module._buffers.values()))


def _begin(follower: Follower, enter: Enter | None, path: str, *_: Any) -> None:
    if enter is not None:
        enter(phases.kind_of(path))
    follower.builder.begin(path)


def _end(follower: Follower, path: str, *_: Any) -> None:
    follower.builder.end(path)


def _method(component: nn.Module, real: Any, follower: Follower, enter: Enter, name: str, ways: Sequence[str]) -> Any:
    builder = follower.builder

    def once(args: Any, kwargs: Any) -> Any:
        builder.begin(name)
        try:
            return real(*args, **kwargs)
        finally:
            builder.end(name)

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        enter(real.__name__)
        others = {}
        for way in ways:
            if all(hasattr(component, f"use_{s}") for s in WAYS[way]):
                with _switched_on(component, WAYS[way]), follower.aside() as (events, survivors):
                    result = once(args, kwargs)
                others[way] = events, survivors
                del result
        start, births = len(builder.events), builder.births
        result = once(args, kwargs)
        plain = builder.events[start:]
        kept = follower.alive_since(births)
        builder.alternatives += [
            Alternative(
                name=way,
                start=start,
                end=len(builder.events),
                events=events,
                outputs=tuple(zip(reversed(kept), reversed(survivors), strict=False)),
            )
            for way, (events, survivors) in others.items()
            if events != plain
        ]
        return result

    return call


@contextlib.contextmanager
def _switched_on(component: nn.Module, switches: Sequence[str]) -> Iterator[None]:
    before = dict(vars(component))
    for switch in switches:
        getattr(component, f"enable_{switch}")()  # more than a flag: some work out the sizes of their tiles anew
    try:
        yield
    finally:
        vars(component).update(before)
