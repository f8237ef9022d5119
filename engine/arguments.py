"""The arguments of a request, checked one by one. Each raises UsageError with a sentence about its own argument."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine import optimizers
from engine.errors import UsageError
from engine.facts import from_picture
from engine.facts.model import Model, nearest_sizes
from engine.units import parse_size
from engine.values import Request, Step
from engine.words import did_you_mean, listing

MAX_SIDE_PX = 16_384
MAX_FRAMES = 10_000
MAX_BATCH = 1_024
MAX_STEPS = 10_000
QUALITIES = ("exact", "near", "lossy")
PREFERENCES = ("speed", "quality", "vram")
DEVICES = ("cpu", "cuda")

StepLike = str | Step | Mapping[str, Any]


def count(name: str, value: Any, most: int) -> int | None:
    """Return a whole number from 1 to `most`, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if not 1 <= value <= most:
        raise UsageError(f"{name} is {value}", f"it must lie between 1 and {most:,}", f"give another {name}")
    return value


def number(name: str, value: Any) -> float | None:
    """Return a number of sane size, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e4 <= value <= 1e4:
        raise UsageError(f"{name} must be a number between -10000 and 10000, not {value!r}")
    return float(value)


def choice(name: str, value: str | None, choices: Sequence[str]) -> str | None:
    """Return one of `choices`, or None."""
    if value is not None and value not in choices:
        raise UsageError(f"{name} cannot be {value!r}", do=did_you_mean(str(value), choices))
    return value


def size(name: str, value: int | str | None) -> int | None:
    """Return bytes, from a number of them or text with a unit; or None."""
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
        raise UsageError(f"{name} must be a size in bytes, or text such as '12GiB', not {value!r}")
    return value


def step(given: StepLike) -> Step:
    """Return a checked step from a name, a step, or {"name": …, "params": {…}}."""
    if isinstance(given, str):
        return optimizers.spec(given).step()
    if isinstance(given, Step):
        return optimizers.spec(given.name).step(given.params)
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or set(given) - {"name", "params"}:
        raise UsageError(
            f"{given!r} is not an optimizer",
            do='write "vae_tiling", or {"name": "dtype", "params": {"value": "float16"}}',
        )
    params = given.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise UsageError(f"{given['name']}: params cannot be {params!r}", do='write {"name": value}')
    return optimizers.spec(given["name"]).step(params)


def optimizer_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, all known."""
    return tuple(optimizers.spec(name).name for name in names)


def plain(name: str, value: Any) -> Any:
    """Return a value that JSON has, whole and in UTF-8: what cannot be written cannot be part of a plan."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{name} holds what is no plain value", str(error)[:200], "give numbers, text, lists and mappings of them"
        ) from None
    return value


def picture_size(given: Mapping[str, Any]) -> tuple[int, int]:
    """Return (width, height) of a picture to begin with, of which nothing else is known."""
    if set(given) != {"width", "height"}:
        raise UsageError(
            "the image has more or less than a size", do='write {"width": 640, "height": 480}, or the path of a file'
        )
    wide, high = (count(f"the image's {n}", given[n], MAX_SIDE_PX) for n in ("width", "height"))
    if wide is None or high is None:
        raise UsageError("the image has no size", do='write {"width": 640, "height": 480}')
    return wide, high


def refuse_bad_strength(request: Request) -> None:
    """Refuse a `strength` that nothing takes, or that leaves no step to take."""
    strength, made_by = request.call.get("strength"), request.pipeline_class or ""
    if strength is None:
        return
    if made_by in from_picture.REDRAWING:
        raise UsageError(
            "there is a strength, and no image",
            "it says how much of an image is drawn anew",
            "give one with --image, or leave the strength out",
        )
    if from_picture.pipeline_for(made_by) is None or not from_picture.takes_strength(made_by):
        return  # whether its call takes one is seen there
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise UsageError(
            f"the strength is {strength!r}", "it is a share of the steps, above 0 and at most 1", "give 0.6, say"
        )
    if request.steps is not None and from_picture.steps_taken(made_by, request.steps, strength) < 1:
        raise UsageError(
            f"a strength of {strength:g} leaves none of {request.steps} steps",
            "so large a share of the steps is taken, rounded down",
            f"give at least {math.ceil(1000 / request.steps) / 1000:g}, or more steps",
        )


def refuse_bad_sizes(request: Request, model: Model) -> None:
    """Refuse a size that the pipeline would refuse or change, and say the good ones next to it."""
    multiple = model.size_multiple
    if multiple is None:
        return
    wrong = [
        (name, size)
        for name, size in (("height", request.height), ("width", request.width))
        if size and size % multiple
    ]
    if wrong:
        raise UsageError(
            listing([f"{name} {size}" for name, size in wrong]) + f" cannot be made by {model.pipeline_class}",
            f"its sizes are multiples of {multiple}",
            "; ".join(f"{name}: {listing(map(str, nearest_sizes(size, multiple)), 'or')}" for name, size in wrong),
        )


CALL_NAMES = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
"""What a request says itself, and what a pipeline's call has for it."""


def refuse_contradictions(
    request: Request, given: Mapping[str, Any], call: Mapping[str, Any], listed: Sequence[StepLike] | None
) -> None:
    """Refuse arguments of which only one can be meant; `given` are the sizes and `call` the call as the user gave them.

    Raises: UsageError, naming both.
    """
    for name, theirs in CALL_NAMES.items():
        if given[name] is not None and theirs in call and call[theirs] != given[name]:
            raise UsageError(
                f"{name} {given[name]} and {theirs} {call[theirs]!r} in the call contradict each other",
                "both say the same thing of the picture",
                f"leave {theirs} out of the call",
            )
    for name, value in (("gpu", request.gpu), ("vram", request.vram_bytes)):
        if request.device == "cpu" and value is not None:
            raise UsageError(
                f"device 'cpu' and {name} contradict each other",
                "one leaves the card alone, the other says how to use it",
                "leave one of them out",
            )
    guides = [n for n, value in (("require", request.require), ("forbid", request.forbid)) if value]
    if listed is not None and guides:
        raise UsageError(
            f"optimizers and {listing(guides)} contradict each other",
            "with an exact list there is no choice to guide",
            f"leave {listing(guides)} out, or the list",
        )
    # A list of one's own is judged by a quality that was asked for, and not by the usual one.
    judged = request.require if listed is None else map(step, listed) if request.quality == "exact" else ()
    for asked in judged:
        spec = optimizers.spec(asked.name)
        if QUALITIES.index(spec.quality) > QUALITIES.index(request.quality):
            raise UsageError(
                f"{asked.name} and quality {request.quality!r} contradict each other",
                f"{asked.name} is {spec.quality}: {spec.summary}",
                f"allow quality {spec.quality!r}, or leave {asked.name} out",
            )
