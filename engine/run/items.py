"""What a run makes, one by one: each output's prompt and seed, and which of them one call of the pipeline makes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import UsageError
from engine.pictures import Picture
from engine.prompts import MAX_SEED, Prompt
from engine.values import Request

MAX_ITEMS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One output; `number` is its place among all of the run, from 0."""

    number: int
    prompt: str
    negative_prompt: str | None
    seed: int
    image: str | None = None
    """The SHA-256 of the picture that it begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the pipeline: the outputs of one prompt that it makes at a time."""

    items: tuple[Item, ...]
    picture: Picture | None = field(default=None, compare=False, repr=False)
    """What it begins with; its items hold what it is known by."""

    @property
    def prompt(self) -> str:
        return self.items[0].prompt

    @property
    def negative_prompt(self) -> str | None:
        return self.items[0].negative_prompt

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(i.seed for i in self.items)


def new_seed() -> int:
    """Return a seed for a run that was given none; it is said and saved, so that the run can be repeated."""
    return secrets.randbelow(MAX_SEED + 1)


def calls(
    prompts: Sequence[Prompt], seed: int, batch: int, num_images: int | None = None, picture: Picture | None = None
) -> tuple[Call, ...]:
    """Return the calls of a run: `num_images` of each prompt (None: as many as `batch`), at most `batch` at a time.

    All of them begin with `picture`, where there is one.

    Output k (from 0) of all has seed `seed` + k, those of a prompt with a seed of its own that seed, and the next ones.
    The calls do not depend on what is there already: a run that goes on where one ended makes the same ones.

    Raises: UsageError, when they are too many.
    """
    counts = [p.num_images or num_images or batch for p in prompts]
    if sum(counts) > MAX_ITEMS:
        raise UsageError(
            f"that is {sum(counts):,} outputs", f"at most {MAX_ITEMS:,} are made in one run", "make several runs"
        )
    return tuple(_calls(prompts, counts, seed, batch, picture))


def _calls(
    prompts: Sequence[Prompt], counts: Sequence[int], seed: int, batch: int, picture: Picture | None
) -> Iterator[Call]:
    number = 0
    for prompt, count in zip(prompts, counts, strict=True):
        first = seed + number if prompt.seed is None else prompt.seed
        own = [
            Item(
                number=number + k,
                prompt=prompt.text,
                negative_prompt=prompt.negative_prompt,
                seed=(first + k) % (MAX_SEED + 1),
                image=None if picture is None else picture.sha256,
            )
            for k in range(count)
        ]
        yield from (Call(items=tuple(own[k : k + batch]), picture=picture) for k in range(0, count, batch))
        number += count


# What was seen, allowed or preferred, and how many are made at a time: not what is drawn.
_HOW = (
    "device",
    "gpu",
    "vram_bytes",
    "host_ram_bytes",
    "headroom_bytes",
    "profile",
    "exact",
    "require",
    "forbid",
    "quality",
    "prefer",
    "prompts_known",
    "batch",
)


def work(request: Request) -> Mapping[str, Any]:
    """Return what of a request decides what is drawn, whatever plan it is drawn by."""
    return {k: v for k, v in dataclasses.asdict(request).items() if k not in _HOW}


def identity(request: Request, item: Item) -> str:
    """Return a digest of what an output shows: of the request's work, and its prompt and seed."""
    return _digest([work(request), item.prompt, item.negative_prompt, item.seed, *_begun(item.image)])


def job(request: Request, prompts: Sequence[Prompt], num_images: int | None, picture: Picture | None = None) -> str:
    """Return a digest of everything that a run makes but its first seed."""
    said = [dataclasses.asdict(p) for p in prompts]
    begun = _begun(None if picture is None else picture.sha256)
    return _digest([work(request), said, num_images or request.batch, *begun])


def _begun(image: str | None) -> list[str]:
    return [] if image is None else [image]


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
