"""`cache`: steps of the denoiser that would change little are answered with what an earlier step gave.

Source of the behaviour: `CacheMixin.enable_cache` of diffusers 0.42. It has more kinds than are offered here. MagCache
wants ratios that somebody measured of just this model; FasterCache wants functions; and pyramid attention broadcast
counts calls, not steps, so that a pipeline which calls its denoiser twice a step (with guidance) gives one of them the
other's attention. What is kept is let go of at the end of each call of the pipeline (`maybe_free_model_hooks`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import IncompatibleError, UsageError
from engine.optimizers import hooks
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, names, nothing_to_load
from engine.values import Step

THRESHOLD, INTERVAL = 0.05, 5
"""diffusers' own."""

SPEC = Spec(
    name="cache",
    summary="steps of the denoiser that would change little are answered with what an earlier step gave",
    slot=45,
    quality="lossy",
    changes_computing=True,
    params=(
        Param(
            name="method",
            kind="word",
            default="first_block",
            choices=("first_block", "taylor_seer"),
            about=(
                "first_block skips the other blocks where what the first one adds is nearly that of the step before;"
                " taylor_seer computes attention every few steps, and extrapolates it in between"
            ),
        ),
        Param(
            name="threshold",
            kind="share",
            default=None,
            about=f"first_block: by how large a share it may differ; left out: {THRESHOLD}",
        ),
        Param(
            name="interval",
            kind="count",
            default=None,
            about=f"taylor_seer: every which step is computed, after the first three; left out: {INTERVAL}",
        ),
    ),
)
load_arguments = nothing_to_load
_OF = {"threshold": "first_block", "interval": "taylor_seer"}


def not_estimated(step: Step) -> str | None:
    """Return why there is no estimate of a run with it; None where there is one.

    What is kept of the first block is the same in each step, and a dry run in which nothing is skipped holds the most.
    """
    if step.params["method"] == "first_block":
        return None
    return "cache with taylor_seer keeps more with each of its first steps, and a dry run makes only two"


def _config(step: Step) -> Any:
    import diffusers

    for name, method in _OF.items():
        if step.params.get(name) is not None and step.params["method"] != method:
            raise UsageError(
                f"cache: {name} belongs to {method}",
                f"the method is {step.params['method']}",
                f"leave {name} out, or take {method}",
            )
    if step.params["method"] == "first_block":
        return diffusers.FirstBlockCacheConfig(threshold=step.params.get("threshold") or THRESHOLD)
    return diffusers.TaylorSeerCacheConfig(cache_interval=step.params.get("interval") or INTERVAL)


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    config = _config(step)
    targets = denoisers(pipe)
    because = _refused(pipe, targets, step)
    if because is not None:
        raise IncompatibleError(f"cache cannot act on {type(pipe).__name__}", because, "leave cache out for this model")
    for module in targets.values():
        module.enable_cache(config)


def apply_dry(pipe: Pipeline, step: Step, context: Context) -> None:
    """Let every block compute, beside what is kept: whether one may be skipped depends on values that are not there."""
    apply(pipe, step, context)
    for module in denoisers(pipe).values():
        for hook in hooks.of(module, _LEADER).values():
            hook._should_compute_remaining_blocks = _always(hook._should_compute_remaining_blocks)


def _always(real: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the decision of a first block with what it computes to come to it, and never to skip."""

    def decide(residual: Any) -> bool:
        state = real.__self__.state_manager.get_state()  # type: ignore[attr-defined]
        if (before := state.head_block_residual) is not None:
            (residual - before).abs().mean() / before.abs().mean()
        return True

    return decide


_LEADER, _BLOCK, _TAYLOR = "fbc_leader_block_hook", "fbc_block_hook", "taylorseer_cache"


def _refused(pipe: Pipeline, targets: Mapping[str, Any], step: Step) -> str | None:
    """Return why a cache cannot act on a pipeline, or None."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    if not targets or not all(hasattr(m, "enable_cache") for m in targets.values()):
        return "the class of its denoiser has no cache"
    call = inspect.unwrap(type(pipe).__call__)
    if "cache_context" not in inspect.getsource(call):
        return "it does not tell its denoiser which call a cache is for (`cache_context`)"
    for name, module in targets.items():
        if not _planned(module, step):
            return f"{name} has no blocks that this cache acts on"
        try:
            for block in _blocks(module).values() if step.params["method"] == "first_block" else ():
                TransformerBlockRegistry.get(type(block))
        except ValueError as error:
            return " ".join(str(error).split())
    return None


def _blocks(module: Any) -> dict[str, Any]:
    """Return the blocks of a denoiser that are computed one after another, by path."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
    from torch import nn

    return {
        f"{name}.{i}": block
        for name, child in module.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
    }


def _planned(module: Any, step: Step) -> dict[str, str]:
    """Return the name of the hook of each part of a denoiser that has one, by path."""
    if step.params["method"] == "first_block":
        paths = list(_blocks(module))
        return {path: _BLOCK if i else _LEADER for i, path in enumerate(paths)} if len(paths) > 1 else {}
    from diffusers.hooks.taylorseer_cache import _TRANSFORMER_BLOCK_IDENTIFIERS as PATTERNS

    return {path: _TAYLOR for path, _ in module.named_modules() if any(re.fullmatch(p, path) for p in PATTERNS)}


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    for module in denoisers(pipe).values():
        module.disable_cache()


def seen(pipe: Pipeline, context: Context) -> str | None:
    cached = [n for n, m in denoisers(pipe).items() if getattr(m, "is_cache_enabled", False)]
    return f"{names(cached)} has a cache already" if cached else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    """Just the parts that the library would put the cache's hooks on have them, with the planned numbers."""
    config, told = _config(step), []
    for name, module in denoisers(pipe).items():
        found = {path: kind for kind in (_LEADER, _BLOCK, _TAYLOR) for path in hooks.of(module, kind)}
        planned = _planned(module, step)
        if missing := {path for path, kind in planned.items() if found.get(path) != kind}:
            raise NotApplied("cache", f"{hooks.first(missing)} of {name} has no hook of the cache")
        if more := set(found) - set(planned):
            raise NotApplied("cache", f"{hooks.first(more)} of {name} has a hook of a cache of its own")
        numbers = {"threshold": _LEADER} if step.params["method"] == "first_block" else {"cache_interval": _TAYLOR}
        for number, kind in numbers.items():
            for path, hook in hooks.of(module, kind).items():
                if getattr(hook, number) != getattr(config, number):
                    raise NotApplied("cache", f"{number} of {path} of {name} is {getattr(hook, number)}")
        told.append(f"{len(planned)} parts of {name} answer from {step.params['method']}")
    return "; ".join(told)


def settled(pipe: Pipeline, step: Step, context: Context) -> str:
    """After a call nothing is kept: the next one begins anew."""
    for name, module in denoisers(pipe).items():
        for kind in (_LEADER, _BLOCK, _TAYLOR):
            if kept := {path for path, hook in hooks.of(module, kind).items() if hook.state_manager._state_cache}:
                raise NotApplied("cache", f"after a call {hooks.first(kept)} of {name} keeps what it gave")
    return f"nothing is kept in {names(denoisers(pipe))}"
