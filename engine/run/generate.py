"""Generate: one call of the pipeline for each prompt, each picture with its own seed."""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import IncompatibleError, OutOfMemoryError, UsageError
from engine.plan import Plan
from engine.run import device, load, progress, remember
from engine.run.progress import Progress, Quiet

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEED = 2**32 - 1


def new_seed() -> int:
    """Return a seed for a run that was given none; it is said and saved, so that the run can be repeated."""
    return secrets.randbelow(MAX_SEED + 1)


def run(plan: Plan, prompts: Sequence[str], *, seed: int | None = None) -> Iterator[Image]:
    """Yield every picture of every prompt, in order; picture k (from 0) of all has seed `seed` + k.

    Each picture's `.info` holds what it was made with: `prompt`, `seed`, `model` and `plan_digest`.

    Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError.
    """
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError("the prompt is empty", do='say what to draw: --prompt "a red circle on a blue background"')
    load.refuse_unfit(plan)
    return _loaded_pictures(plan, prompts, new_seed() if seed is None else seed)


def _loaded_pictures(plan: Plan, prompts: Sequence[str], seed: int) -> Iterator[Image]:
    yield from pictures(plan, load.load(plan), prompts, seed, Quiet())


def pictures(plan: Plan, pipe: Any, prompts: Sequence[str], seed: int, told: Progress) -> Iterator[Image]:
    """Yield every picture of every prompt from a pipeline that the plan was applied to."""
    for begin, prompt in zip(
        range(seed, seed + len(prompts) * plan.request.batch, plan.request.batch), prompts, strict=True
    ):
        seeds = [(begin + k) % (MAX_SEED + 1) for k in range(plan.request.batch)]
        progress.settle_pipeline(pipe, told, "denoising")
        with told.stage(f"generating {len(seeds)} picture{'s' if len(seeds) > 1 else ''}"):
            images = _remembered(plan, pipe, prompt, seeds, told)
        for image, own in zip(images, seeds, strict=True):
            image.info |= {"prompt": prompt, "seed": own, "model": plan.request.model, "plan_digest": plan.digest}
            yield image


def _remembered(plan: Plan, pipe: Any, prompt: str, seeds: Sequence[int], told: Progress) -> list[Image]:
    """Return the pictures of one call, and remember what it took."""
    start = time.perf_counter()
    try:
        images = _call(plan, pipe, prompt, seeds)
    except OutOfMemoryError:
        remember.run(plan, None, None, told, out_of_memory=True)
        raise
    seconds = time.perf_counter() - start
    remember.run(plan, device.peak_allocated_bytes(plan.torch_device), seconds, told)
    return images


def _call(plan: Plan, pipe: Any, prompt: str, seeds: Sequence[int]) -> list[Image]:
    import torch

    asked = plan.request
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "num_images_per_prompt": asked.batch if asked.batch > 1 else None,
        "height": asked.height,
        "width": asked.width,
        "num_frames": asked.frames,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        # Made on the CPU, so that a seed means the same picture on every device.
        "generator": [torch.Generator("cpu").manual_seed(s) for s in seeds],
        **asked.call,
    }
    given = {k: v for k, v in arguments.items() if v is not None}
    known = inspect.signature(pipe.__call__).parameters
    unknown = [k for k in given if k not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]
    if unknown:
        raise UsageError(
            f"{type(pipe).__name__} does not take {', '.join(unknown)}", "its call has no such argument", "leave it out"
        )
    try:
        device.reset_peak(plan.torch_device)
        result = pipe(**given)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "the device ran out of memory while generating",
            str(error).splitlines()[0],
            "take a more frugal profile (`dg-run profiles list`), or a smaller picture",
        ) from error
    except (ValueError, TypeError) as error:
        # The pipelines check their inputs with these two; the message is theirs, and to the point.
        raise UsageError(f"{type(pipe).__name__} refuses the request", " ".join(str(error).split())[:400]) from error
    images = getattr(result, "images", None)
    if not isinstance(images, list) or not all(hasattr(i, "save") for i in images):
        raise IncompatibleError(
            f"{type(pipe).__name__} does not give pictures",
            "this version of dg-run writes pictures only",
            "use an image model",
        )
    return images
