"""Record a run: mark modules and phases, follow storages, and give back a trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engine.dryrun.follow import Follower
from engine.dryrun.operators import Target
from engine.trace import Trace, TracedComponent, TracedModule, Weight

# Named as the phases that they are.
_VAE_METHODS = ("encode", "decode")
_ENCODERS = ("text_encoder", "image_encoder", "prior")


def record(pipe: Any, call: dict[str, Any], target: str) -> Trace:
    """Return the trace of one call of a pipeline that is on meta, as `target` ("cuda" or "cpu") would compute it.

    Raises: ValueNeeded, when the call reads a value that a dry run does not have; what the pipeline raises.
    """
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    follower = Follower("meta", [t for m in modules.values() for t in (*m.parameters(), *m.buffers())])
    with torch.no_grad(), _autocast_knows_meta(), marked(modules, follower), Target(target), follower:
        pipe(**call)
    return trace(pipe, modules, follower)


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


def trace(pipe: Any, modules: dict[str, nn.Module], follower: Follower) -> Trace:
    """Return what a follower recorded, with the weights of the modules it was recorded on."""
    chain = [n for n in (pipe.model_cpu_offload_seq or "").split("->") if n in modules]
    return Trace(
        pipeline_class=type(pipe).__name__,
        components=tuple(_component(name, module) for name, module in modules.items()),
        offload_chain=tuple(chain),
        offload_excluded=tuple(n for n in pipe._exclude_from_cpu_offload if n in modules),
        events=tuple(follower.finish()),
    )


def _component(name: str, module: nn.Module) -> TracedComponent:
    owners = []
    for path, owner in module.named_modules():
        weights = tuple(
            Weight(
                name=key,
                storage=tensor.untyped_storage()._cdata,
                size_bytes=tensor.untyped_storage().nbytes(),
                is_buffer=key in owner._buffers,
                is_saved=key not in owner._non_persistent_buffers_set,
            )
            for key, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        )
        if weights:
            owners.append(TracedModule(path=f"{name}.{path}".rstrip("."), weights=weights))
    return TracedComponent(name=name, modules=tuple(owners), blocks=tuple(_blocks(name, module)))


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the blocks of each list among a component's direct children."""
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield tuple(f"{name}.{key}.{i}" for i in range(len(child)))


@contextlib.contextmanager
def marked(modules: dict[str, nn.Module], follower: Follower) -> Iterator[None]:
    """Let every component, and every module that owns weights, mark its beginning and end while this is active."""
    phases = _Phases(follower)
    handles: list[Any] = []
    wrapped: list[tuple[nn.Module, str]] = []
    for name, component in modules.items():
        blocks = {path for group in _blocks(name, component) for path in group}
        for path, module in component.named_modules():
            full = f"{name}.{path}".rstrip(".")
            if path == "" or full in blocks or _owns_weights(module):
                begin = functools.partial(_begin, follower, phases if path == "" else None, full)
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(functools.partial(_end, follower, full)))
        for method in _VAE_METHODS:
            if not _is_encoder(name) and callable(getattr(component, method, None)):
                setattr(component, method, _method(getattr(component, method), follower, phases, name, method))
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


def _is_encoder(name: str) -> bool:
    return name.startswith(_ENCODERS)


def _begin(follower: Follower, phases: _Phases | None, path: str, *_: Any) -> None:
    if phases is not None:
        phases.enter("encode" if _is_encoder(path) else "denoise")
    follower.mark(">", path)


def _end(follower: Follower, path: str, *_: Any) -> None:
    follower.mark("<", path)


def _method(real: Any, follower: Follower, phases: _Phases, name: str, method: str) -> Any:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        phases.enter(method)
        follower.mark(">", name)
        try:
            return real(*args, **kwargs)
        finally:
            follower.mark("<", name)

    return call


class _Phases:
    """Names the stretch that a run is in; a phase that comes again gets a number."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.now = ""
        self.times: dict[str, int] = {}

    def enter(self, phase: str) -> None:
        if phase == self.now:
            return
        self.now = phase
        self.times[phase] = self.times.get(phase, 0) + 1
        count = self.times[phase]
        self.follower.mark("=", phase if count == 1 else f"{phase}.{count}")
