"""The runner that the command line and `plan.run` share: from a plan and its calls to what each of them gave."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import rungs
from engine.errors import HardwareError, IncompatibleError, OutOfMemoryError
from engine.optimizers import staged_encoding
from engine.plan import Plan
from engine.run import (
    calls,
    device,
    fallback,
    load,
    lock,
    media,
    overflow,
    preview,
    progress,
    reading,
    remember,
    staged,
    stages,
    tables,
    world,
)
from engine.run.fallback import Descent
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
    broken: tuple[bool, ...] = ()
    """Which outputs are not made of numbers, and black; () where none is."""
    fault: IncompatibleError | None = None
    """What made them so, and what helps."""

    def is_broken(self, item: Item) -> bool:
        return bool(self.broken) and self.broken[self.call.items.index(item)]

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
    preview_at: Callable[[Call], Path] | None = None,
    debug: bool = False,
) -> Iterator[Made]:
    """Load, and yield what each call gives, in their order.

    `again` makes the plan anew, at the first load; else it is solved anew where it does not fit any more. What is free
    is read again and taken while other starts on the card wait. When memory runs out, everything is given back and the
    run goes on with a plan that needs less, twice at most; what was yielded is not made again. `preview_at` says where
    a call is previewed while it is made; None is nowhere.

    Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError.
    """
    told = told or Quiet()
    load.refuse_unfit(plan)
    tables.forget()  # those of an earlier run in this process
    descent, number, done = Descent(told), len(wanted), 0
    while done < number:
        lost = ready = None
        try:
            with _settled(plan, told, again) as plan:
                ready = prepared(plan, wanted[done:], told, debug=debug)
            for made in of(plan, ready, told, done, number, preview_at):
                yield made
                done += 1
                del made
        except OutOfMemoryError as error:
            lost = fallback.seen(plan, error)
            fallback.forget(error)
        again = ready = None
        if lost is not None:
            device.release(plan.torch_device)
            device.reset_peak(plan.torch_device)
            plan = descent.after(lost)
        elif done < number:  # the prompts that were encoded are drawn, and others are to be
            device.release(plan.torch_device)


@contextlib.contextmanager
def _settled(plan: Plan, told: Progress, again: Callable[[], Plan] | None) -> Iterator[Plan]:
    """Give the plan for what is free now, and hold the lock of its card: what is free is taken before others look."""
    load.refuse_unfit(plan)
    load.fetched(plan, told)  # a download may take an hour: who waits for the card does not wait for that
    if again is None:
        with lock.held(plan.card, told.say):
            now = world.current(plan, told)
            load.refuse_unfit(now)
            yield now
        return
    for _ in range(_TRIES):
        with lock.held(plan.card, told.say):
            now = again()
            if now.device == plan.device:
                world.tell(plan, now, told)
                # What takes another dry run is not announced, and solved for when it is needed.
                now = rungs.ladder(now, may_run=False)
                told.say(f"plan\n{now.explain()}")
                yield now
                return
        plan = now
    raise HardwareError(
        "the cards change faster than a plan can be made", "each probe preferred another one", "name one: --gpu INDEX"
    )


def prepared(plan: Plan, wanted: Sequence[Call], told: Progress, *, debug: bool = False) -> Ready:
    """Return the plan's pipeline, loaded; with `staged_encoding` as many of the prompts encoded as are kept at a time.

    Raises: as `run`.
    """
    if not staged_encoding.is_in(plan.optimizers):
        with calls.within("the model was loaded"):
            pipe = load.load(plan, told, debug=debug)
        _tell_unread(plan, pipe, wanted, told)
        return Ready(pipe=pipe, calls=tuple(wanted))

    def arguments(pipe: Any) -> Iterator[Mapping[str, Any]]:
        _tell_unread(plan, pipe, wanted, told)
        for call in wanted:
            yield calls.arguments(plan.request, pipe, call)

    found = staged.load_encoded(plan, arguments, told, most_bytes=ENCODED_BYTES, debug=debug)
    before = tuple(
        Before(encoded, seconds, found.peak_bytes)
        for encoded, seconds in zip(found.encoded, found.seconds, strict=True)
    )
    return Ready(pipe=found.pipe, calls=tuple(wanted[: len(before)]), before=before)


def of(
    plan: Plan,
    ready: Ready,
    told: Progress,
    first: int = 0,
    number: int | None = None,
    preview_at: Callable[[Call], Path] | None = None,
) -> Iterator[Made]:
    """Yield what each call of a pipeline that is ready gives; `first` are done of `number` in all."""
    number = len(ready.calls) if number is None else number
    view = None if preview_at is None else preview.view(ready.pipe, told)
    for k, call in enumerate(ready.calls):
        progress.settle_pipeline(ready.pipe, told, "denoising")
        seen: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if view is not None and preview_at is not None:
            asked = plan.request
            size = None if asked.width is None or asked.height is None else (asked.width, asked.height)
            seen = preview.shown(ready.pipe, view, preview_at(call), size, told)
        with told.stage(_doing(call, first + k + 1, number)), seen:
            made = _called(plan, ready.pipe, call, told, ready.before[k] if ready.before else None)
        yield made
        del made
        if k == 0:  # where hooks leave the weights is seen once a call has run
            load.verify_after_call(ready.pipe)


def _doing(call: Call, k: int, number: int) -> str:
    count = len(call.items)
    several = f" ({count} at a time)" if count > 1 else ""
    return f"generating{several}" if number == 1 else f"generating {k} of {number}{several}"


def _called(plan: Plan, pipe: Any, call: Call, told: Progress, before: Before | None) -> Made:
    """Return what one call gives, and remember what it took; one that runs out of memory is for `run` to remember."""
    start = time.perf_counter()
    outputs, seen = _outputs(plan, pipe, call, None if before is None else before.encoded)
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
    _tell_missing(plan, outputs, told)
    broken = seen.broken(len(outputs))
    fault = None
    if any(broken):
        arch = None if plan.card is None else plan.card.compute_capability
        fault = overflow.error(seen.culprit(), type(pipe).__name__, plan.optimizers, arch)
        told.say(f"note: {fault.what}; {fault.why}")
    return Made(
        plan=plan,
        call=call,
        outputs=outputs,
        peak_bytes=peak_bytes,
        seconds=seconds,
        broken=broken if fault is not None else (),
        fault=fault,
    )


def _tell_missing(plan: Plan, outputs: Sequence[Image | Video], told: Progress) -> None:
    """Say what of the videos that were asked for is not written."""
    videos = [o for o in outputs if isinstance(o, media.Video)]
    for made in videos[:1]:
        if plan.request.frames not in (None, len(made)):
            told.say(f"note: the pipeline made {len(made)} frames of the {plan.request.frames} that were asked for")
        for part in made.left_out:
            told.say(f"note: the pipeline gave {part}, too, which is not written")


def _larger(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else max(one, other)


def _outputs(
    plan: Plan, pipe: Any, call: Call, encoded: Encoded | None
) -> tuple[tuple[Image | Video, ...], overflow.Watch]:
    arguments = calls.arguments(plan.request, pipe, call)
    device.reset_peak(plan.torch_device)
    do = "take a more frugal profile (`dg-run profiles list`), or a smaller picture"
    doing = "generating" + ("" if encoded is None else " (stage two of staged_encoding)")
    with calls.within(doing, do), calls.refusing(pipe):
        with contextlib.nullcontext() if encoded is None else stages.given(pipe, encoded, plan.torch_device):
            with overflow.watching(pipe) as seen:
                result = pipe(**arguments)
    return tuple(media.outputs(result, pipe, media.frame_rate(pipe, arguments))), seen


def _tell_unread(plan: Plan, pipe: Any, wanted: Sequence[Call], told: Progress) -> None:
    """Say where a prompt is longer than what the model reads of it."""
    for line in reading.unread(pipe, [c.prompt for c in wanted], plan.request.call):
        told.say(f"note: {line}")
