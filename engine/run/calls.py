"""What a pipeline is called with for a prompt, and what it refuses, in words."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import OutOfMemoryError, UsageError
from engine.facts import from_picture
from engine.pictures import Picture
from engine.values import Request


def arguments(
    asked: Request, pipe: Any, prompt: str, seeds: Sequence[int], picture: Picture | None = None
) -> Mapping[str, Any]:
    """Return the arguments of one call; `picture` is what it begins with, where the request says that it does.

    Raises: UsageError, for those that the pipeline does not take, and for a picture that is missing or too much.
    """
    import torch

    begins = _beginning(asked, picture)

    wanted: dict[str, Any] = {
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
        **begins,
    }
    known = inspect.signature(pipe.__call__).parameters
    # Pipelines that take no size go by the picture's, which is that of the request.
    by_picture = {"height", "width"} - set(known) if begins else set()
    given = {k: v for k, v in wanted.items() if v is not None and k not in by_picture}
    unknown = [k for k in given if k not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]
    if unknown:
        raise UsageError(
            f"{type(pipe).__name__} does not take {', '.join(unknown)}", "its call has no such argument", "leave it out"
        )
    return given


def refuse_missing(asked: Request, picture: Picture | None) -> None:
    """Raises: UsageError, where a request begins with a picture and none is there, or the other way round."""
    needed = "image" in asked.call or from_picture.needs_one(asked.pipeline_class or "")
    if needed and picture is None:
        raise UsageError(
            "the plan begins with a picture, and there is none",
            "a plan keeps the size of a picture, not the picture",
            "give it with --image FILE, or plan.run(prompts, image=…)",
        )
    if picture is not None and "image" not in asked.call:
        raise UsageError(
            "there is a picture, and the plan begins with none",
            "a run that begins with a picture takes other memory and other steps",
            "plan with the picture: --image FILE, or call={'image': …}",
        )


def _beginning(asked: Request, picture: Picture | None) -> dict[str, Any]:
    refuse_missing(asked, picture)
    return {} if picture is None else {"image": picture.fitted(asked.call["image"])}


@contextlib.contextmanager
def refusing(pipe: Any) -> Iterator[None]:
    """Say what a pipeline refuses as a mistake of the request. Raises: UsageError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # The pipelines check their inputs with these two; the message is theirs, and to the point.
        raise UsageError(f"{type(pipe).__name__} refuses the request", " ".join(str(error).split())[:400]) from error


@contextlib.contextmanager
def within(doing: str, do: str = "take a more frugal profile (`dg-run profiles list`)") -> Iterator[None]:
    """Say what was being done when the device ran out of memory. Raises: OutOfMemoryError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the device ran out of memory while {doing}", str(error).splitlines()[0], do) from error
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"the device ran out of memory while {doing}", error.why, error.do or do) from error
