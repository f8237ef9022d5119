"""What a pipeline is called with for a prompt, and what it refuses, in words."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import OutOfMemoryError, UsageError
from engine.values import Request


def arguments(asked: Request, pipe: Any, prompt: str, seeds: Sequence[int]) -> Mapping[str, Any]:
    """Return the arguments of one call. Raises: UsageError, for those that the pipeline does not take."""
    import torch

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
    }
    given = {k: v for k, v in wanted.items() if v is not None}
    known = inspect.signature(pipe.__call__).parameters
    unknown = [k for k in given if k not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())]
    if unknown:
        raise UsageError(
            f"{type(pipe).__name__} does not take {', '.join(unknown)}", "its call has no such argument", "leave it out"
        )
    return given


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
