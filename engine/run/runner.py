"""The runner that the command line and `plan.run` share: from a plan and its calls to what each of them gave."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import HardwareError, OutOfMemoryError
from engine.optimizers import staged_encoding
from engine.plan import Plan
from engine.run import calls, device, load, lock, media, progress, reading, remember, staged, stages
from engine.run.items import Call, Item
from engine.run.progress import Progress, Quiet
from engine.run.stages import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.run.media import Video

_TRIES = 3
ENCODED_BYTES = 256 * 1024**2
"""What is kept of encoded prompts at a time, in a staged run: 64 prompts of FLUX, whose T5 gives 4 MiB for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What one call gave. Seconds are those of the call, and of what was encoded for it before; bytes its peak."""

    plan: Plan
    call: Call
    outputs: tuple[Image | Video, ...]
    peak_bytes: int | None
    """None without a card."""
    seconds: float

    def each(self) -> Iterator[tuple[Item, Image | Video]]:
        """Yield each output with what it is of."""
        yield from zip(self.call.items, self.outputs, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A pipeline that is ready to be called; in a staged run without text encoders, its prompts encoded."""

    pipe: Any
    calls: tuple[Call, ...]
    """Those that it is for: in a staged run those whose prompts are encoded."""
    before: tuple[Before, ...] = ()
    """What the first stage gave for each of them; none where there was no such stage."""


@dataclass(frozen=True, slots=True)
class Before:
    """What the first stage took for one call, and gave for it. Bytes are the most until all was loaded."""

    encoded: Encoded
    seconds: float
    peak_bytes: int | None


def run(
    plan: Plan,
    wanted: Sequence[Call],
    told: Progress | None = None,
    *,
    again: Callable[[], Plan] | None = None,
    debug: bool = False,
) -> Iterator[Made]:
    """Load, and yield what each call gives, in their order.

    `again` makes the plan anew: what is free is read again and taken while other starts on the card wait.

    Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError.
    """
    told = told or Quiet()
    load.refuse_unfit(plan)
    number, done = len(wanted), 0
    while done < number:
        plan, ready = _taken(plan, wanted[done:], told, again, debug=debug)
        for made in of(plan, ready, told, done, number):
            yield made
            del made
        done += len(ready.calls)
        del ready
        if done < number:  # the prompts that were encoded are drawn, and others are to be
            gc.collect()
            device.empty_cache(plan.torch_device)


def _taken(
    plan: Plan, wanted: Sequence[Call], told: Progress, again: Callable[[], Plan] | None, *, debug: bool
) -> tuple[Plan, Ready]:
    """Return the plan and what draws."""
    if again is None:
        return plan, prepared(plan, wanted, told, debug=debug)
    for _ in range(_TRIES):
        with lock.held(plan.card, told.say):
            now = again()
            if now.device == plan.device:
                told.say(f"plan\n{now.explain()}")
                return now, prepared(now, wanted, told, debug=debug)
        plan = now
    raise HardwareError(
        "the cards change faster than a plan can be made", "each probe preferred another one", "name one: --gpu INDEX"
    )


def prepared(plan: Plan, wanted: Sequence[Call], told: Progress, *, debug: bool = False) -> Ready:
    """Return the plan's pipeline, loaded; with `staged_encoding` as many of the prompts encoded as are kept at a time.

    Raises: as `run`.
    """
    if not staged_encoding.is_in(plan.optimizers):
        pipe = load.load(plan, told, debug=debug)
        _tell_unread(plan, pipe, wanted, told)
        return Ready(pipe=pipe, calls=tuple(wanted))

    def arguments(pipe: Any) -> Iterator[Mapping[str, Any]]:
        _tell_unread(plan, pipe, wanted, told)
        for call in wanted:
            yield calls.arguments(plan.request, pipe, call)

    try:
        found = staged.load_encoded(plan, arguments, told, most_bytes=ENCODED_BYTES, debug=debug)
    except OutOfMemoryError:
        remember.run(plan, None, None, told, out_of_memory=True)
        raise
    before = tuple(
        Before(encoded, seconds, found.peak_bytes)
        for encoded, seconds in zip(found.encoded, found.seconds, strict=True)
    )
    return Ready(pipe=found.pipe, calls=tuple(wanted[: len(before)]), before=before)


def of(plan: Plan, ready: Ready, told: Progress, first: int = 0, number: int | None = None) -> Iterator[Made]:
    """Yield what each call of a pipeline that is ready gives; `first` are done of `number` in all."""
    number = len(ready.calls) if number is None else number
    for k, call in enumerate(ready.calls):
        progress.settle_pipeline(ready.pipe, told, "denoising")
        with told.stage(_doing(call, first + k + 1, number)):
            made = _called(plan, ready.pipe, call, told, ready.before[k] if ready.before else None)
        yield made
        del made


def _doing(call: Call, k: int, number: int) -> str:
    count = len(call.items)
    several = f" ({count} at a time)" if count > 1 else ""
    return f"generating{several}" if number == 1 else f"generating {k} of {number}{several}"


def _called(plan: Plan, pipe: Any, call: Call, told: Progress, before: Before | None) -> Made:
    """Return what one call gives, and remember what it took."""
    start = time.perf_counter()
    try:
        outputs = _outputs(plan, pipe, call, None if before is None else before.encoded)
    except OutOfMemoryError:
        remember.run(plan, None, None, told, out_of_memory=True)
        raise
    seconds, peak_bytes = time.perf_counter() - start, device.peak_allocated_bytes(plan.torch_device)
    if before is not None:
        seconds, peak_bytes = seconds + before.seconds, _larger(peak_bytes, before.peak_bytes)
    if len(call.items) == plan.request.batch:  # what was predicted is a call of so many
        remember.run(plan, peak_bytes, seconds, told)
    for item, output in zip(call.items, outputs, strict=True):
        said = {"prompt": item.prompt, "seed": item.seed, "model": plan.request.model, "plan_digest": plan.digest}
        output.info.update(said)
        if item.negative_prompt is not None:
            output.info["negative_prompt"] = item.negative_prompt
        if item.image is not None:
            output.info["image"] = item.image
    return Made(plan=plan, call=call, outputs=outputs, peak_bytes=peak_bytes, seconds=seconds)


def _larger(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else max(one, other)


def _outputs(plan: Plan, pipe: Any, call: Call, encoded: Encoded | None) -> tuple[Image | Video, ...]:
    arguments = calls.arguments(plan.request, pipe, call)
    device.reset_peak(plan.torch_device)
    do = "take a more frugal profile (`dg-run profiles list`), or a smaller picture"
    doing = "generating" + ("" if encoded is None else " (stage two of staged_encoding)")
    with calls.within(doing, do), calls.refusing(pipe):
        with contextlib.nullcontext() if encoded is None else stages.given(pipe, encoded, plan.torch_device):
            result = pipe(**arguments)
    return tuple(media.outputs(result, pipe, media.frame_rate(pipe, arguments)))


def _tell_unread(plan: Plan, pipe: Any, wanted: Sequence[Call], told: Progress) -> None:
    """Say where a prompt is longer than what the model reads of it."""
    for line in reading.unread(pipe, [c.prompt for c in wanted], plan.request.call):
        told.say(f"note: {line}")
