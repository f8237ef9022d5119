"""The library's door to a run: prompts in, one output after another out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engine import pictures
from engine import prompts as said
from engine.plan import Plan
from engine.prompts import Prompt
from engine.run import calls, items, load, runner
from engine.run.items import Call

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.run.media import Video


def run(
    plan: Plan,
    prompts: str | Prompt | Mapping[str, Any] | Iterable[str | Prompt | Mapping[str, Any]],
    *,
    seed: int | None = None,
    num_images: int | None = None,
    image: Any = None,
) -> Iterator[Image | Video]:
    """Yield every picture or video of every prompt, in order; number k (from 0) of all has seed `seed` + k.

    A prompt is a text, or an object with `prompt` and, where they differ from the run's, `negative_prompt`, `seed` and
    `num_images`. `image` is the picture that all of them begin with, as a path or an image of PIL, where the plan
    begins with one. Each output's `.info` holds what it was made with: `prompt`, `seed`, `model` and `plan_digest`.
    With `staged_encoding` prompts are encoded before the first picture.

    Outputs that are not made of numbers, which a computation in too few bits gives, are yielded too, and an
    IncompatibleError at the end names what made them so.

    Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError;
        FileError, for an image.
    """
    wanted = said.of(prompts)
    said.check_seed(seed)
    said.check_count(num_images)
    picture = None if image is None else pictures.read(image)
    calls.refuse_missing(plan.request, picture)
    load.refuse_unfit(plan)
    first = items.new_seed() if seed is None else seed
    return _outputs(plan, items.calls(wanted, first, plan.request.batch, num_images, picture))


def _outputs(plan: Plan, wanted: tuple[Call, ...]) -> Iterator[Image | Video]:
    fault = None
    for made in runner.run(plan, wanted):
        fault = made.fault or fault
        yield from made.outputs
    if fault is not None:
        raise fault
