"""Generate: one call of the pipeline for each prompt, each picture with its own seed."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import IncompatibleError, OutOfMemoryError, UsageError
from engine.optimizers import staged_encoding
from engine.plan import Plan
from engine.run import calls, device, load, progress, remember, staged, stages
from engine.run.progress import Progress, Quiet
from engine.run.staged import Staged
from engine.run.stages import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**32 - 1


def new_seed() -> int:
    """Return a seed for a run that was given none; it is said and saved, so that the run can be repeated."""
    return secrets.randbelow(MAX_SEED + 1)


def run(plan: Plan, prompts: Sequence[str], *, seed: int | None = None) -> Iterator[Image]:
    """Yield every picture of every prompt, in order; picture k (from 0) of all has seed `seed` + k.

    Each picture's `.info` holds what it was made with: `prompt`, `seed`, `model` and `plan_digest`. With
    `staged_encoding` all prompts are encoded before the first picture.

    Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError.
    """
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError("the prompt is empty", do='say what to draw: --prompt "a red circle on a blue background"')
    load.refuse_unfit(plan)
    return _loaded_pictures(plan, prompts, new_seed() if seed is None else seed)


def _loaded_pictures(plan: Plan, prompts: Sequence[str], seed: int) -> Iterator[Image]:
    yield from pictures(plan, ready(plan, prompts, seed), prompts, seed, Quiet())


def ready(
    plan: Plan, prompts: Sequence[str], seed: int, told: Progress | None = None, *, debug: bool = False
) -> Staged | Any:
    """Return what `pictures` draws with: the plan's pipeline; with `staged_encoding` the prompts encoded, too."""
    if not staged_encoding.is_in(plan.optimizers):
        return load.load(plan, told, debug=debug)

    def wanted(pipe: Any) -> Iterator[Mapping[str, Any]]:
        for prompt, seeds in zip(prompts, _seeds(plan, len(prompts), seed), strict=True):
            yield calls.arguments(plan.request, pipe, prompt, seeds)

    try:
        return staged.load_encoded(plan, wanted, told, debug=debug)
    except OutOfMemoryError:
        remember.run(plan, None, None, told or Quiet(), out_of_memory=True)
        raise


def _seeds(plan: Plan, count: int, seed: int) -> Iterator[list[int]]:
    """Yield the seeds of each of `count` calls."""
    batch = plan.request.batch
    for begin in range(seed, seed + count * batch, batch):
        yield [(begin + k) % (MAX_SEED + 1) for k in range(batch)]


def pictures(plan: Plan, made: Staged | Any, prompts: Sequence[str], seed: int, told: Progress) -> Iterator[Image]:
    """Yield every picture of every prompt; `made` is what `ready` gave, or a pipeline that the plan was applied to."""
    is_staged = isinstance(made, Staged)
    pipe = made.pipe if is_staged else made
    for number, (prompt, seeds) in enumerate(zip(prompts, _seeds(plan, len(prompts), seed), strict=True)):
        progress.settle_pipeline(pipe, told, "denoising")
        with told.stage(f"generating {len(seeds)} picture{'s' if len(seeds) > 1 else ''}"):
            images = _remembered(plan, pipe, prompt, seeds, told, _Before.of(made, number) if is_staged else None)
        for image, own in zip(images, seeds, strict=True):
            image.info |= {"prompt": prompt, "seed": own, "model": plan.request.model, "plan_digest": plan.digest}
            yield image


def peak_bytes(plan: Plan, made: Staged | Any) -> int | None:
    """Return the most bytes on the device in the last call, and in the stage before it; None without a card."""
    return _larger(
        device.peak_allocated_bytes(plan.torch_device), made.peak_bytes if isinstance(made, Staged) else None
    )


def _larger(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else max(one, other)


@dataclass(frozen=True, slots=True)
class _Before:
    """What the first stage took of one prompt, and gave for it."""

    encoded: Encoded
    seconds: float
    peak_bytes: int | None

    @classmethod
    def of(cls, made: Staged, number: int) -> _Before:
        return cls(made.encoded[number], made.seconds[number], made.peak_bytes)


def _remembered(
    plan: Plan, pipe: Any, prompt: str, seeds: Sequence[int], told: Progress, before: _Before | None
) -> list[Image]:
    """Return the pictures of one call, and remember what it took."""
    start = time.perf_counter()
    try:
        images = _call(plan, pipe, prompt, seeds, None if before is None else before.encoded)
    except OutOfMemoryError:
        remember.run(plan, None, None, told, out_of_memory=True)
        raise
    seconds, peak = time.perf_counter() - start, device.peak_allocated_bytes(plan.torch_device)
    if before is not None:
        seconds, peak = seconds + before.seconds, _larger(peak, before.peak_bytes)
    remember.run(plan, peak, seconds, told)
    return images


def _call(plan: Plan, pipe: Any, prompt: str, seeds: Sequence[int], encoded: Encoded | None) -> list[Image]:
    arguments = calls.arguments(plan.request, pipe, prompt, seeds)
    device.reset_peak(plan.torch_device)
    do = "take a more frugal profile (`dg-run profiles list`), or a smaller picture"
    doing = "generating" + ("" if encoded is None else " (stage two of staged_encoding)")
    with calls.within(doing, do), calls.refusing(pipe):
        with contextlib.nullcontext() if encoded is None else stages.given(pipe, encoded, plan.torch_device):
            result = pipe(**arguments)
    images = getattr(result, "images", None)
    if not isinstance(images, list) or not all(hasattr(i, "save") for i in images):
        raise IncompatibleError(
            f"{type(pipe).__name__} does not give pictures",
            "this version of dg-run writes pictures only",
            "use an image model",
        )
    return images
