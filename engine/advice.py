"""What to change to get more: the nearest plans that a little more memory, or a little less picture, would allow.

Each is solved for: the answer is a plan that fits there, and not a rule of thumb.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from engine import api, optimizers
from engine.errors import DgRunError
from engine.facts.model import nearest_sizes
from engine.plan import Plan
from engine.units import format_size
from engine.values import Advice, Gpu, Hardware, Request

_WORTH = 0.95
"""A plan is worth telling of when it takes at most so much of the time."""
_SIDES = (0.875, 0.75, 0.625, 0.5)
_MOST_STEPS_UP = 6


def advise(made: Plan, told: Callable[[str], None] | None = None) -> Plan:
    """Return a plan with its `advice`: the nearest changes that would let it fit, or run faster.

    It solves again for more memory, and dry-runs smaller pictures where memory is what is short: seconds, the first
    time. `told` as for `resolve`. A machine without a card, and an exact list, are not advised.
    """
    if made.card is None or made.request.exact or made.card.free_bytes is None:
        return made
    # What is tried fails as a request can fail (a size that the model refuses): then it is no advice.
    return dataclasses.replace(made, advice=tuple(_Search(made, told).all()))


class _Search:
    def __init__(self, made: Plan, told: Callable[[str], None] | None) -> None:
        assert made.card is not None
        self.made = made
        self.told = told
        self.card: Gpu = made.card

    def all(self) -> Iterator[Advice]:
        memory = [*self._vram(), *self._host_ram()]
        if self.made.fits is False and not memory:
            memory = [*self._both()]
        yield from memory
        yield from self._wishes()
        if self.made.fits is False or memory:
            yield from self._smaller()

    def _vram(self) -> Iterator[Advice]:
        """Yield the least more VRAM that allows anything better, and the VRAM from which on no more helps."""
        free = self.card.free_bytes or 0
        steps: list[Plan] = []
        wanted = 1 << 50
        while len(steps) < _MOST_STEPS_UP:
            better = self._solved(self._with_vram(wanted))
            if better is None or not self._is_better(better) or better.estimate.required_bytes is None:
                break
            steps.append(better)
            wanted = self._vram_for(better) - 1
        told = {str(p.optimizers): p for p in (*steps[:1], *steps[-1:])} if steps else {}
        for plan in reversed(told.values()):
            more = self._vram_for(plan) - free
            yield self._advice("vram", f"{format_size(more)} more free VRAM", plan, more)

    def _vram_for(self, plan: Plan) -> int:
        """Return the free VRAM from which on a plan can be chosen: what it needs, and what its profile asks for."""
        needed = (plan.estimate.required_bytes or 0) + (plan.headroom_bytes or 0)
        return max(needed, api.least_free_vram(plan))

    def _host_ram(self) -> Iterator[Advice]:
        ram = self.made.hardware.host.ram_bytes
        if ram is None:
            return
        host = dataclasses.replace(self.made.hardware.host, ram_bytes=1 << 50)
        better = self._solved(dataclasses.replace(self.made.hardware, host=host))
        if better is not None and self._is_better(better) and better.estimate.host_bytes is not None:
            more = better.estimate.host_bytes - ram
            yield self._advice("host_ram", f"{format_size(more)} more host memory", better, more)

    def _both(self) -> Iterator[Advice]:
        """Yield what would fit if neither the card nor the host were short: the least of both that it takes."""
        free, ram = self.card.free_bytes or 0, self.made.hardware.host.ram_bytes
        if ram is None:
            return
        host = dataclasses.replace(self.made.hardware.host, ram_bytes=1 << 50)
        request = dataclasses.replace(self.made.request, prefer="vram")
        better = self._solved(dataclasses.replace(self._with_vram(1 << 50), host=host), request)
        if better is None or better.fits is not True:
            return
        more, more_host = self._vram_for(better) - free, (better.estimate.host_bytes or 0) - ram
        change = f"{format_size(more)} more free VRAM and {format_size(more_host)} more host memory"
        yield self._advice("both", change, better, more)

    def _wishes(self) -> Iterator[Advice]:
        """Yield what the user's own conditions cost."""
        request = self.made.request
        if request.quality == "exact":
            better = self._solved(request=dataclasses.replace(request, quality="near"))
            if better is not None and self._is_better(better):
                yield self._advice("quality", "--quality near", better)
        for name in request.forbid:
            less = tuple(n for n in request.forbid if n != name)
            better = self._solved(request=dataclasses.replace(request, forbid=less))
            if better is not None and self._is_better(better):
                yield self._advice("forbid", f"without --forbid {name}", better)

    def _smaller(self) -> Iterator[Advice]:
        """Yield the largest smaller batch, video or picture that fits, or that everything stays on the card for."""
        request = self.made.request
        if request.batch > 1:
            yield from self._first("batch", [(f"--batch_size {n}", {"batch": n}) for n in _fewer(request.batch)])
        if request.frames is not None and request.frames > 1:
            if self.made.fits is False:
                counts = _fewer_frames(request.frames)
                yield from self._first("frames", [(f"--num_frames {n}", {"frames": n}) for n in counts])
            return
        if request.height is None or request.width is None:
            return
        if self.made.fits is True and not api.could_stay(self.made, self.told):
            return  # the weights alone are too many, at any size
        multiple = api.model_of(request).size_multiple or 8
        sizes = [
            (
                nearest_sizes(round(request.height * share), multiple)[0],
                nearest_sizes(round(request.width * share), multiple)[0],
            )
            for share in _SIDES
        ]
        tried = [(f"at {w} x {h}", {"height": h, "width": w}) for h, w in dict.fromkeys(sizes)]
        yield from self._first("size", tried)

    def _first(self, kind: str, tried: list[tuple[str, dict[str, Any]]]) -> Iterator[Advice]:
        for change, fields in tried:
            found = self._solved(request=dataclasses.replace(self.made.request, **fields))
            if found is None or found.fits is not True:
                continue
            if self.made.fits is False or _stays(found):
                yield self._advice(kind, change, found)
                return

    def _with_vram(self, free_bytes: int) -> Hardware:
        card = dataclasses.replace(self.card, free_bytes=free_bytes)
        return dataclasses.replace(self.made.hardware, gpus=(card,))

    def _solved(self, hardware: Hardware | None = None, request: Request | None = None) -> Plan | None:
        try:
            return api.again(
                self.made,
                request or self.made.request,
                hardware or self._with_vram(self.card.free_bytes or 0),
                self.told,
            )
        except DgRunError:
            return None

    def _is_better(self, other: Plan) -> bool:
        if other.fits is not True:
            return False
        if self.made.fits is False:
            return True
        ours, theirs = self.made.estimate.seconds, other.estimate.seconds
        return ours is not None and theirs is not None and theirs <= ours * _WORTH

    @staticmethod
    def _advice(kind: str, change: str, plan: Plan, more_bytes: int | None = None) -> Advice:
        return Advice(
            kind=kind,
            change=change,
            more_bytes=more_bytes,
            profile=None if plan.profile is None else plan.profile.name,
            optimizers=plan.optimizers,
            required_bytes=plan.estimate.required_bytes,
            seconds=plan.estimate.seconds,
        )


def _stays(plan: Plan) -> bool:
    """Whether everything stays on the card."""
    return all(s.name == "resident" for s in plan.optimizers if optimizers.spec(s.name).is_placement)


def _fewer(batch: int) -> list[int]:
    found = []
    while batch > 1:
        batch //= 2
        found.append(batch)
    return found


def _fewer_frames(frames: int) -> list[int]:
    """Return smaller counts: of latents in fours and one more, as the video models count."""
    return [n for n in dict.fromkeys(int(frames * s) // 4 * 4 + 1 for s in (0.75, 0.5, 0.25)) if 1 <= n < frames]
