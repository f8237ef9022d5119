"""What a pipeline is called with for a prompt, and what it refuses, in words."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import OutOfMemoryError, UsageError
from engine.facts import from_picture
from engine.pictures import Picture
from engine.run.items import Call
from engine.values import Request

_COPIES = "num_images_per_prompt"


def arguments(asked: Request, pipe: Any, call: Call) -> Mapping[str, Any]:
    """Return the arguments of one call.

    Raises: UsageError, for those that the pipeline does not take, and for a picture to begin with that is missing or
        too much.
    """
    import torch

    refuse_missing(asked, call.picture)
    begins = {} if call.picture is None else {"image": call.picture.fitted(asked.call["image"])}
    known = inspect.signature(pipe.__call__).parameters
    count = len(call.items)
    takes_copies = _COPIES in known or any(p.kind is p.VAR_KEYWORD for p in known.values())
    wanted: dict[str, Any] = {
        # Pipelines of videos set their own number of copies to 1: they are given the prompt as often as it is drawn.
        "prompt": call.prompt if takes_copies or count == 1 else [call.prompt] * count,
        _COPIES: count if takes_copies and count > 1 else None,
        "height": asked.height,
        "width": asked.width,
        "num_frames": asked.frames,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        # Made on the CPU, so that a seed means the same picture on every device.
        "generator": [torch.Generator("cpu").manual_seed(s) for s in call.seeds],
        **asked.call,
        **begins,
    }
    if call.negative_prompt is not None:
        wanted["negative_prompt"] = call.negative_prompt
    if isinstance(wanted["prompt"], list) and isinstance(wanted.get("negative_prompt"), str):
        wanted["negative_prompt"] = [wanted["negative_prompt"]] * count
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
    try:
        yield
    except RuntimeError as error:
        import torch  # which may not be there before: where it is started, signals are held back

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise OutOfMemoryError(f"the device ran out of memory while {doing}", str(error).splitlines()[0], do) from error
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"the device ran out of memory while {doing}", error.why, error.do or do) from error
