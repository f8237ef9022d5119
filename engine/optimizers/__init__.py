"""The optimizers, one module each. To add one: write the module, and name it in `_MODULES`.

Nothing here imports torch until an optimizer is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any, cast

from engine.errors import UsageError
from engine.optimizers.spec import Optimizer, Spec
from engine.values import FrozenDict, Step
from engine.words import did_you_mean, listing

_MODULES = (
    "allocator",
    "tf32",
    "staged_encoding",
    "dtype",
    "fuse_qkv",
    "attention_slicing",
    "attention_backend",
    "channels_last",
    "layerwise_casting",
    "cache",
    "vae_slicing",
    "vae_tiling",
    "xdit",
    "compile",
    "resident",
    "model_offload",
    "sequential_offload",
    "group_offload",
)
NAMES = _MODULES


@cache
def get(name: str) -> Optimizer:
    """Return an optimizer by name. Raises: UsageError, offering the nearest name."""
    if name not in _MODULES:
        raise UsageError(
            f"there is no optimizer {name!r}",
            f"there are {listing(NAMES)}",
            did_you_mean(name, NAMES) or "name one of them",
        )
    return cast(Optimizer, import_module(f"engine.optimizers.{name}"))


def optional(name: str, function: str) -> Callable[..., Any] | None:
    """Return one of the functions that only some optimizers' modules have; None where this one has it not."""
    found = getattr(get(name), function, None)
    return cast("Callable[..., Any] | None", found)


def spec(name: str) -> Spec:
    """Return an optimizer's spec by name. Raises: UsageError."""
    return get(name).SPEC


def specs() -> tuple[Spec, ...]:
    """Return all specs in the order of their slots."""
    return tuple(sorted((spec(n) for n in NAMES), key=lambda s: s.slot))


def in_order(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps in the order that `dg-run` itself writes: for flags, which come in none."""
    return tuple(sorted(steps, key=lambda s: spec(s.name).slot))


def changing(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps that change what is computed, and so what is traced."""
    return tuple(s for s in steps if spec(s.name).changes(s))


def placement(steps: Iterable[Step]) -> Step | None:
    """Return the step that says where the weights are that no other step names, if any does (`placing`)."""
    return next((s for s in steps if spec(s.name).is_placement and s.params.get("components") is None), None)


def short(step: Step) -> str:
    """Return a step for reading, without the parameters that have their usual value."""
    usual = {p.name: p.default for p in spec(step.name).params}
    given = {k: v for k, v in step.params.items() if k not in usual or v != usual[k]}
    named = given.pop("components", None)
    of = f" of {listing(named)}" if isinstance(named, tuple) else ""
    return str(Step(name=step.name + of, params=FrozenDict(given)))
