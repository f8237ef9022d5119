"""`dg-run plan --check`: does a lock still fit its card, and would its request be planned so again.

It needs no card of the lock's kind: where none is here one is imagined, wholly free, beside as much host memory as the
lock's machine had.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine import api, cards, drift, gpus, lock
from engine.drift import REFUSE, WARN, Drift
from engine.errors import FileError, IncompatibleError, NothingFitsError, ProfileError, UsageError
from engine.lock import Lock
from engine.plan import Plan
from engine.values import Gpu, Hardware

SCHEMA = "dg-run/check@1"
_ROOM = "with all that is free; with just enough for the locked list, it is what is chosen"
OTHERWISE = ProfileError.exit_code
"""The exit code of a lock that fits, and would be planned otherwise now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Whether a lock still stands on its card. `again` is what would be planned now, None where nothing could be."""

    lock: Lock
    card: str
    hypothetical: bool
    fits: bool | None
    again: Plan | None
    facts: tuple[Drift, ...]

    @property
    def exit_code(self) -> int:
        """0 the same, 4 it no longer fits, 3 it would be planned otherwise."""
        codes = {f.exit_code for f in self.facts if f.severity == REFUSE}
        if NothingFitsError.exit_code in codes:
            return NothingFitsError.exit_code
        return OTHERWISE if codes else 0

    def to_json(self) -> str:
        """Return it as JSON."""
        said = {
            "schema": SCHEMA,
            "digest": self.lock.digest,
            "plan_digest": self.lock.plan_digest,
            "plan_digest_now": None if self.again is None else self.again.digest,
            "card": self.card,
            "hypothetical": self.hypothetical,
            "fits": self.fits,
            "exit_code": self.exit_code,
            "facts": [dataclasses.asdict(f) for f in self.facts],
        }
        return json.dumps(said, indent=2, ensure_ascii=False)


def check(locked: Lock, hardware: Hardware | None = None, told: Callable[[str], None] | None = None) -> Check:
    """Return whether a lock still stands: on the card of its kind that is here, else on an imagined one."""
    seen, is_imagined = _for_check(locked, drift.seen_for(locked, hardware))
    found = drift.held(locked, seen, told, is_run=False)
    again: Plan | None = None
    differing: tuple[Drift, ...] = ()
    if found.plan is not None:
        again, differing = _again(locked, found.plan, told)
    card = locked.stands_on.gpu
    return Check(
        lock=locked,
        card="CPU" if card is None else card.name,
        hypothetical=is_imagined,
        fits=None if found.plan is None else found.plan.fits,
        again=again,
        facts=(*found.drift, *differing, *(() if found.plan is None else _of_seconds(locked, found.plan))),
    )


def _for_check(locked: Lock, seen: Hardware) -> tuple[Hardware, bool]:
    """Return the hardware to check on, and whether its card is imagined: then the host is the lock's as well."""
    stood, asked = locked.stands_on.gpu, locked.request
    if stood is None or any(drift.is_kind(g.name, stood.name) for g in seen.gpus):
        return seen, False
    rows = gpus.named(stood.name)
    row = rows[0] if len(rows) == 1 else None
    imagined = Gpu(
        index=0,
        name=stood.name,
        uuid=None,
        arch=stood.arch,
        total_bytes=stood.total_bytes,
        free_bytes=asked.vram_bytes or stood.total_bytes,
        pcie_generation=row.pcie_generation if row else None,
        pcie_width=row.pcie_lanes if row else None,
        unified_memory=row.unified_memory if row else False,
        hypothetical=True,
    )
    host = seen.host
    if locked.stands_on.host_total_ram_bytes is not None:
        host = dataclasses.replace(host, ram_bytes=locked.stands_on.host_total_ram_bytes)
    return Hardware(gpus=(imagined,), host=host), True


def _again(locked: Lock, exact: Plan, told: Callable[[str], None] | None) -> tuple[Plan | None, tuple[Drift, ...]]:
    """Return what would be planned for the lock's request now, and what of it is not as it was locked."""
    asked = locked.request
    if asked.exact:
        return exact, ()
    try:
        now = _resolved(locked, exact, told)
        differing = tuple(_differing(locked, now))
        if any(d.severity == REFUSE for d in differing) and _is_the_least_alike(locked, exact, told):
            differing = tuple(dataclasses.replace(d, severity=WARN, exit_code=None, because=_ROOM) for d in differing)
        return now, differing
    except (ProfileError, IncompatibleError, UsageError, FileError) as error:
        name = "profile" if locked.profile is None else locked.profile.name
        gone = Drift(name="profile", old=name, new=None, severity=REFUSE, because=error.what, exit_code=OTHERWISE)
        return None, (gone,)


def _resolved(locked: Lock, exact: Plan, told: Callable[[str], None] | None, **more: int | None) -> Plan:
    """Return what is planned for a lock's request now, with nothing of its choice, where its list was estimated."""
    asked, card = locked.request, exact.card
    given = {
        **drift.asked_for(locked, drift.model_of(locked)),
        "device": "cpu" if card is None else None,
        "gpu": drift.name_of(card),
        "vram": drift.cap_bytes(locked, card),
        "profile": asked.profile,
        "require": asked.require,
        "forbid": asked.forbid,
        "quality": asked.quality,
        "prefer": asked.prefer,
    }
    return api.resolve(**given | more, hardware=exact.hardware, told=told)


def _is_the_least_alike(locked: Lock, exact: Plan, told: Callable[[str], None] | None) -> bool:
    """Whether the locked list is still what is chosen where no more is free than it needs.

    How much was free when it was locked is not in the lock: with more, another choice may always have been the better.
    What the request itself fixes is not asked again, nor is a card that was imagined, all of it free, then as now.
    """
    least: dict[str, int | None] = {}
    if locked.request.vram_bytes is None and locked.stands_on.driver is not None:
        least["vram"] = _least_bytes(locked, exact)
    if locked.request.host_ram_bytes is None:
        least["host_ram"] = exact.estimate.host_bytes
    given = {name: size for name, size in least.items() if size}
    if not given:
        return False
    return not any(d.severity == REFUSE for d in _differing(locked, _resolved(locked, exact, told, **given)))


def _least_bytes(locked: Lock, exact: Plan) -> int | None:
    """Return the least free VRAM under which the locked plan could have been made; None where that is not known."""
    card, required = exact.card, exact.estimate.required_bytes
    if card is None or required is None:
        return None
    profile = None if locked.profile is None else lock.current_profile(locked.profile, locked.request.profile)
    wanted = 0 if profile is None else profile.match.free_vram_at_least_bytes or 0
    least = max(required + cards.headroom_bytes(locked.request, card), wanted)
    return None if card.free_bytes is not None and least > card.free_bytes else least


def _differing(locked: Lock, now: Plan) -> Iterator[Drift]:
    """Yield what of a plan is another choice than the locked one."""
    was_profile = None if locked.profile is None else locked.profile.name
    now_profile = None if now.profile is None else now.profile.name
    is_other = now.optimizers != locked.optimizers
    if was_profile != now_profile:
        because = "planned now, it would be otherwise" if is_other else "it comes to the same list"
        yield Drift(
            name="profile",
            old=was_profile,
            new=now_profile,
            severity=REFUSE if is_other else WARN,
            because=because,
            exit_code=OTHERWISE if is_other else None,
        )
    if is_other:
        yield Drift(
            name="optimizers",
            old=" → ".join(map(str, locked.optimizers)),
            new=" → ".join(map(str, now.optimizers)) or None,
            severity=REFUSE,
            because="planned now, it would be otherwise",
            exit_code=OTHERWISE,
        )


def _of_seconds(locked: Lock, exact: Plan) -> Iterator[Drift]:
    was, now = locked.estimate, exact.estimate
    if was.seconds is not None and now.seconds is not None and was.seconds != now.seconds:
        because = "estimated again"
        if was.calibrated != now.calibrated:
            because = f"{'' if was.calibrated else 'not '}calibrated then, {'' if now.calibrated else 'not '}now"
        yield Drift(name="seconds", old=was.seconds, new=now.seconds, severity=WARN, because=because)
