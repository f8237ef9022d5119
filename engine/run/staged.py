"""A run in two stages: the text encoders encode every prompt and are gone before the rest of the pipeline is loaded.

Stage one loads the text encoders alone, weightless twins standing in for the rest, and puts each on the device before
the next one comes. What they make of the prompts is kept on the host. Stage two begins once nothing of them is left:
the rest is loaded, placed and verified as any pipeline is, and is given what was encoded for each prompt.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from engine import optimizers
from engine.facts.casting import is_text_encoder
from engine.optimizers import staged_encoding
from engine.optimizers.spec import Context, NotApplied, names, on
from engine.plan import Plan
from engine.run import calls, device, load, parts, stages
from engine.run.parts import Parts
from engine.run.progress import Progress, Quiet
from engine.run.stages import Encoded
from engine.values import Step

Calls = Callable[[Any], Iterable[Mapping[str, Any]]]
"""Gives the arguments of each call that will be made of a pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """What the first stage leaves behind; `seconds` is what each prompt took."""

    encoded: tuple[Encoded, ...]
    seconds: tuple[float, ...]
    without_weights: Mapping[str, Any]
    """Tokenizers and their like, which the second stage takes over."""
    weights: Mapping[str, Sequence[weakref.ref[Any]]]
    """The weights of the text encoders, by name, so that it can be seen that they are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A pipeline without text encoders, and what its prompts were encoded to."""

    pipe: Any
    encoded: tuple[Encoded, ...]
    seconds: tuple[float, ...]
    peak_bytes: int | None
    """The most on the device until now; None without a card."""


def load_encoded(
    plan: Plan, wanted: Calls, told: Progress | None = None, *, most_bytes: int | None = None, debug: bool = False
) -> Staged:
    """Return the plan's pipeline without text encoders, with what the prompts of these calls were encoded to.

    With `most_bytes` only as many of the calls are encoded, at least one, as that much of the host holds.

    Raises: ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError, UsageError.
    """
    told = told or Quiet()
    load.refuse_unfit(plan)
    with load.opened(plan, told, debug=debug) as source:
        here = load.context(plan)
        device.reset_peak(plan.torch_device)
        whole = source.parts()
        found = first(whole, plan.optimizers, wanted, here, told, most_bytes)
        pipe = second(whole, plan.optimizers, found, here, told, load.idle(plan))
        peak_bytes = device.peak_allocated_bytes(plan.torch_device)
    return Staged(pipe=pipe, encoded=found.encoded, seconds=found.seconds, peak_bytes=peak_bytes)


def first(
    whole: Parts,
    steps: Sequence[Step],
    wanted: Calls,
    here: Context,
    told: Progress,
    most_bytes: int | None = None,
) -> First:
    """Encode the prompts of these calls, or as many as `most_bytes` hold.

    Raises: IncompatibleError, OutOfMemoryError, UsageError; as loading does.
    """
    acting = staged_encoding.first_stage(steps, whole.twins)

    def settle(name: str, module: Any) -> None:
        alone = SimpleNamespace(components={name: module})
        for step in acting:
            if (own := on(step, name) if step.name != "dtype" else step) is not None:
                told.say(f"  {step.name}: {load.apply_one(own, alone, here)}")
        module.to(here.device)

    encoders = [n for n in whole.twins if is_text_encoder(n)]
    with calls.within("the text encoders were loaded (stage one of staged_encoding)"):
        with told.stage(f"loading {names(sorted(encoders))}"):
            found = whole.one_by_one(encoders, {}, settle, told)
            pipe = whole.loaded((), found, told)
    encoded, seconds = [], []
    with calls.within("the prompts were encoded (stage one of staged_encoding)"), told.stage("encoding the prompts"):
        for call in wanted(pipe):
            start = time.perf_counter()
            with calls.refusing(pipe):
                encoded.append(stages.encode(pipe, call, here.device))
            seconds.append(time.perf_counter() - start)
            if most_bytes is not None and sum(e.size_bytes for e in encoded) >= most_bytes:
                break
    return First(
        encoded=tuple(encoded),
        seconds=tuple(seconds),
        without_weights=parts.without_weights(pipe.components),
        weights={n: tuple(map(weakref.ref, _weights(found[n]))) for n in encoders},
    )


def second(
    whole: Parts,
    steps: Sequence[Step],
    before: First,
    here: Context,
    told: Progress,
    idle: Collection[str] = (),
) -> Any:
    """Return the rest of the pipeline, every step applied and seen to hold.

    Raises: NotApplied, when text encoders are still in memory; as `engine.run.load.load`.
    """
    _see_gone(before, here, told)
    rest = [n for n in whole.twins if not is_text_encoder(n)]
    acting = staged_encoding.second_stage(steps, whole.twins)
    with calls.within("the rest was loaded (stage two of staged_encoding)"):
        return load.made(whole, rest, acting, before.without_weights, here, told, idle)


def _weights(module: Any) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def _see_gone(before: First, here: Context, told: Progress) -> None:
    """Give back what is only cached. Raises: NotApplied, when somebody still holds a text encoder."""
    gc.collect()
    device.empty_cache(here.device)
    left = [n for n, weights in before.weights.items() if any(w() is not None for w in weights)]
    if left:
        raise NotApplied(staged_encoding.NAME, f"{names(left)} is still in memory after the prompts were encoded")
    count = len(before.encoded)
    told.say(
        f"  {optimizers.spec(staged_encoding.NAME).name}: {names(sorted(before.weights))} encoded "
        f"{count} prompt{'s' if count != 1 else ''}, and nothing of it is left"
    )
