"""What is free on a plan's card now, and the plan for it: a plan may have been made hours ago."""

from __future__ import annotations

import dataclasses

from engine import api, calibration, explain, probe, rungs
from engine.errors import NothingFitsError
from engine.estimate import workspaces
from engine.plan import Plan
from engine.run import device
from engine.run.progress import Progress
from engine.units import format_size
from engine.values import Gpu, Hardware


def card_of(plan: Plan, seen: Hardware) -> Gpu | None:
    """Return a plan's card in another snapshot; None where it is not there, or not known by a UUID."""
    card = plan.card
    if card is None or card.uuid is None:
        return None
    return next((g for g in seen.gpus if g.uuid == card.uuid), None)


def hardware(plan: Plan) -> Hardware | None:
    """Return the plan's card and the host as they are now, as a new process would find them; None: it is not known.

    The context that this process has on the card counts as free: an estimate counts it among what a run needs.
    """
    if plan.card is None or plan.card.hypothetical:
        return None
    seen = probe.snapshot()
    card = card_of(plan, seen)
    if card is None or card.free_bytes is None:
        return None
    free = card.free_bytes + context_bytes(plan)
    if plan.request.vram_bytes is not None:
        free = min(free, plan.request.vram_bytes)
    host = seen.host
    if plan.request.host_ram_bytes is not None:
        host = dataclasses.replace(host, ram_bytes=plan.request.host_ram_bytes)
    return dataclasses.replace(seen, gpus=(dataclasses.replace(card, free_bytes=free),), host=host)


def context_bytes(plan: Plan) -> int:
    """Return what the estimates take this process to have on the card already, before any tensor; 0 before CUDA."""
    card = plan.card
    if card is None or card.compute_capability is None or not device.is_started(plan.torch_device):
        return 0
    measured = calibration.find(card, plan.hardware.driver).calibration
    return workspaces.context_bytes(card.compute_capability, measured)


def current(plan: Plan, told: Progress) -> Plan:
    """Return the plan for what is free now: the same one while it fits, else what is solved for anew, and said.

    An exact list and a lock are not exchanged. Raises: NothingFitsError, where nothing fits any more; as `resolve`.
    """
    now = hardware(plan)
    if now is None or not _is_short(plan, now):
        return plan
    if plan.is_fixed:
        if plan.fits is not True:  # it runs since somebody insists
            return plan
        raise NothingFitsError(
            "the plan does not fit any more",
            f"{_change(plan, now.gpus[0])}, and it needs {format_size(plan.estimate.required_bytes or 0)}",
            less(plan, now),
        )
    found = api.again(plan, plan.request, now, told.say)
    tell(plan, found, told)
    return found


def _is_short(plan: Plan, now: Hardware) -> bool:
    """Whether a plan needs more of the card than there is now."""
    free, required = now.gpus[0].free_bytes or 0, plan.estimate.required_bytes
    if required is None:
        return free < min(api.least_free_vram(plan), (plan.card and plan.card.free_bytes) or 0)
    return required > free - (plan.headroom_bytes or 0)


def tell(plan: Plan, now: Plan, told: Progress) -> None:
    """Say in one line that the world has changed, and what is done instead."""
    if now.optimizers != plan.optimizers and now.card is not None and plan.card is not None:
        told.say(f"{_change(plan, now.card)}: {name(now)} instead of {name(plan)}")


def _change(plan: Plan, now: Gpu) -> str:
    before = plan.card.free_bytes if plan.card is not None else None
    return (
        f"free VRAM went from {'an unknown size' if before is None else format_size(before)}"
        f" to {format_size(now.free_bytes or 0)} since the plan"
    )


def name(plan: Plan) -> str:
    """Return what a plan does, short, with its profile."""
    if plan.fits is False:
        return "nothing that fits"
    return explain.run_text(plan.optimizers) + ("" if plan.profile is None else f" ({plan.profile.name})")


def less(plan: Plan, now: Hardware | None) -> str:
    """Return what to do where a plan that is not exchanged does not fit: what would need less, where that is known."""
    found = rungs.below(plan, hardware=now)
    if found is None or found.estimate.required_bytes is None:
        return "free memory on the card, or ask for a smaller picture"
    needs = format_size(found.estimate.required_bytes)
    return f"{name(found)} would do with {needs}: plan without a list (`--auto`), or free memory on the card"
