"""What a change of profiles changes in plans: the same requests under two sets of profiles, and where they part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import api, profiles
from engine.errors import DgRunError
from engine.values import Step

_MODELS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
)
_CARDS = ("RTX 4060", "RTX 3060", "RTX 4090", "A100 80GB")

USUAL: tuple[Mapping[str, Any], ...] = tuple(
    {"id": f"{model.rpartition('/')[2]} on {card}", "model": model, "gpu": card, "host_ram": "64GiB"}
    for model in _MODELS
    for card in _CARDS
)
"""Requests to look at where none are given: usual models, whose traces are shipped, on usual cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two: a folder of profiles (beside the built-in ones, and no others), or one profile by name."""

    folder: Path | None = None
    profile: str | None = None

    def arguments(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's arguments on this side."""
        return {**request} if self.profile is None else {**request, "profile": self.profile}

    def searched(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this side's profiles are those that are found."""
        return contextlib.nullcontext() if self.folder is None else profiles.only(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What of a plan a review is about; `error` where the request is refused."""

    profile: str | None = None
    fits: bool | None = None
    optimizers: tuple[Step, ...] = ()
    required_bytes: int | None = None
    host_bytes: int | None = None
    seconds: float | None = None
    quality: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A request whose plan is another one."""

    id: str
    before: Answer
    after: Answer


def compare(
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    before: Side,
    after: Side,
    told: Callable[[str], None] | None = None,
) -> tuple[Changed, ...]:
    """Return the requests (an id, and the arguments of `engine.resolve`) whose plans are not the same on both sides.

    A request with an exact list takes no profile, and is the same.
    """
    asked = [(name, given) for name, given in requests if "optimizers" not in given]
    answers = [list(_answers(asked, side, told)) for side in (before, after)]
    return tuple(
        Changed(id=name, before=one, after=other)
        for (name, _), one, other in zip(asked, *answers, strict=True)
        if one != other
    )


def _answers(
    requests: Sequence[tuple[str, Mapping[str, Any]]], side: Side, told: Callable[[str], None] | None
) -> Iterator[Answer]:
    with side.searched():
        for _, given in requests:
            yield _answer(side.arguments(given), told)


def _answer(given: Mapping[str, Any], told: Callable[[str], None] | None) -> Answer:
    try:
        plan = api.resolve(**given, told=told)
    except DgRunError as error:
        return Answer(error=error.what)
    return Answer(
        profile=None if plan.profile is None else plan.profile.name,
        fits=plan.fits,
        optimizers=plan.optimizers,
        required_bytes=plan.estimate.required_bytes,
        host_bytes=plan.estimate.host_bytes,
        seconds=plan.estimate.seconds,
        quality=plan.estimate.quality,
    )
