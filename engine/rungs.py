"""What a run goes down to when its memory runs out: the plans that need less than it, the cheapest of them first.

Each is solved for, under the same request on the same card. A run that is out of memory has shown that an estimate was
too low, or that a neighbour took what was free: so a few megabytes less are no rung, and the upper end of its interval
lies below what the run before it was to need. The rungs are what is announced; a run that does go down solves once
more, for what is free by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from engine import api
from engine.errors import DgRunError
from engine.estimate.store import NotTraced
from engine.plan import Plan
from engine.values import Hardware, Rung

MOST_RUNGS = 2


def ladder(made: Plan, told: Callable[[str], None] | None = None, *, may_run: bool = True) -> Plan:
    """Return a plan with its `ladder`: at most two rungs, each the cheapest run that needs less than the one before.

    Like advice it may take a dry run, the first time; without `may_run` the plan stays as it is then. `told` as for
    `resolve`. Without a card there is no ladder, nor for an exact list or a lock: these run as they are. Raises nothing
    that `resolve` did not.
    """
    if made.fits is False or made.card is None or made.is_fixed:
        return dataclasses.replace(made, ladder=())
    try:
        return dataclasses.replace(made, ladder=tuple(_rungs(made, told, may_run=may_run)))
    except NotTraced:
        return made


def _rungs(made: Plan, told: Callable[[str], None] | None, *, may_run: bool) -> Iterator[Rung]:
    last: Plan | None = made
    for _ in range(MOST_RUNGS):
        last = None if last is None else below(last, told, may_run=may_run)
        if last is None:
            return
        yield Rung(
            profile=last.profile,
            optimizers=last.optimizers,
            required_bytes=last.estimate.required_bytes,
            seconds=last.estimate.seconds,
            quality=last.estimate.quality,
            fits=last.fits,
        )


def below(
    made: Plan,
    told: Callable[[str], None] | None = None,
    hardware: Hardware | None = None,
    *,
    may_run: bool = True,
) -> Plan | None:
    """Return the cheapest plan that needs less of the card than `made`; None where there is none, or none is known.

    `hardware` is what is free now, where that has changed. Of an exact list and a lock: what would be chosen instead,
    for the error that says so. Raises: NotTraced, without `may_run`.
    """
    required, card = made.estimate.required_bytes, made.card
    if required is None or card is None:
        return None
    # The card stays the same one: a process that has started CUDA cannot go to another.
    seen = hardware or dataclasses.replace(made.hardware, gpus=(card,))
    request = dataclasses.replace(made.request, exact=False)
    try:
        found = api.again(made, request, seen, told, below_bytes=required, may_run=may_run)
    except DgRunError:  # a profile that has gone since; a model that refuses what its dry run tries
        return None
    return None if found.fits is False or found.estimate.required_bytes is None else found
