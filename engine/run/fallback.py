"""When memory runs out: what was seen of it, what it leaves behind, and the next plan down, twice at most.

A run that is out of memory is told with what was predicted, what was measured by then, what was free on the card at
that moment and who else was on it. It is remembered, everything that it held is given back, and the next plan is
solved for what is free then: one that surely needs less than what failed.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from engine import probe, rungs
from engine.errors import OutOfMemoryError
from engine.plan import Plan
from engine.run import device, remember, world
from engine.run.progress import Progress
from engine.units import format_size
from engine.values import GpuProcess, Hardware

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A run that ran out of memory, as it was seen at that moment, before anything was given back."""

    plan: Plan
    what: str
    why: str
    measured_bytes: int | None
    """The most in tensors until then."""
    free_bytes: int | None
    """On the card at that moment."""
    others: tuple[GpuProcess, ...]
    room_bytes: int | None
    """What it could take: the budget, or less, where less was there."""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self._predicted(), self._measured(), self._free(), self._others())))

    def _predicted(self) -> str:
        taken = self.plan.estimate
        if taken.required_bytes is None or taken.peak_allocated_bytes is None:
            return "nothing was predicted"
        return (
            f"predicted {format_size(taken.peak_allocated_bytes)} in tensors,"
            f" {format_size(taken.required_bytes)} needed"
        )

    def _measured(self) -> str:
        return "" if self.measured_bytes is None else f"measured {format_size(self.measured_bytes)} by then"

    def _free(self) -> str:
        if self.plan.card is None:
            return ""
        return "free then: " + ("not known" if self.free_bytes is None else format_size(self.free_bytes))

    def _others(self) -> str:
        if self.plan.card is None or self.free_bytes is None:
            return ""
        if not self.others:
            return "nobody else was seen on the card"
        named = [f"{p.name or 'a program'} (pid {p.pid}){_size(p)}" for p in self.others[:_MOST_NAMED]]
        more = len(self.others) - len(named)
        return f"also on the card: {', '.join(named)}" + (f" and {more} more" if more else "")


def _size(process: GpuProcess) -> str:
    return "" if process.used_bytes is None else f" with {format_size(process.used_bytes)}"


def seen(plan: Plan, error: OutOfMemoryError) -> Lost:
    """Return what there is to see of a run that has just run out of memory; nothing of it is held."""
    hardware = probe.snapshot() if plan.card is not None else Hardware(gpus=(), host=plan.hardware.host)
    card = world.card_of(plan, hardware)
    free = None if card is None else card.free_bytes
    room = plan.budget_bytes
    if free is not None:
        own = device.reserved_bytes(plan.torch_device) + world.context_bytes(plan)
        room = free + own if room is None else min(room, free + own)
    return Lost(
        plan=plan,
        what=error.what,
        why=error.why,
        measured_bytes=device.peak_allocated_bytes(plan.torch_device),
        free_bytes=free,
        others=() if card is None else card.processes,
        room_bytes=room,
    )


def forget(error: BaseException | None) -> None:
    """Let go of what an error's frames hold, and those of what it came of: a whole pipeline hangs on them."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class Descent:
    """The way down of one run."""

    def __init__(self, told: Progress) -> None:
        self._told = told
        self._lost: list[Lost] = []

    def after(self, lost: Lost) -> Plan:
        """Return the plan to go on with after this one; everything that it held has been given back.

        Raises: OutOfMemoryError, where there is none, or it was the last one that is tried.
        """
        plan, told = lost.plan, self._told
        remember.run(plan, None, None, told, out_of_memory=True, room_bytes=lost.room_bytes)
        self._lost.append(lost)
        now = world.hardware(plan)
        if plan.is_fixed or len(self._lost) > rungs.MOST_RUNGS:
            raise self._refusal(now)
        found = rungs.below(plan, told.say, now)
        if found is None:
            raise self._refusal(now)
        free = "" if now is None else f"{format_size(now.gpus[0].free_bytes or 0)} are free now: "
        needs = format_size(found.estimate.required_bytes or 0)
        told.say(f"{lost.what}\n  {lost}")
        told.say(f"going down, {len(self._lost)} of {rungs.MOST_RUNGS}: {free}{world.name(found)}, {needs} needed")
        return found

    def _refusal(self, now: Hardware | None) -> OutOfMemoryError:
        """Return the error that ends a run: what happened, what was seen of it each time, and what would help."""
        lost = self._lost[-1]
        tries = [f"{world.name(each.plan)}: {each}" for each in self._lost if each.plan.card is not None]
        so_did = f"; so did {len(tries) - 1} before it that needed more" if len(tries) > 1 else ""
        return OutOfMemoryError(lost.what + so_did, "\n       ".join([lost.why, *tries]), self._remedy(now))

    def _remedy(self, now: Hardware | None) -> str:
        lost = self._lost[-1]
        if lost.plan.card is None:
            return "ask for a smaller picture (--height, --width)"
        if lost.plan.is_fixed:
            return world.less(lost.plan, now)
        others = ", ".join(f"pid {p.pid}" for p in lost.others[:_MOST_NAMED])
        end = f"end what else uses the card ({others}), " if others else ""
        return f"{end}ask for a smaller picture (--height, --width), or run without the card (--device cpu)"
