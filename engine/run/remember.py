"""After a run on a card: what was measured goes beside what was predicted, for later plans and `dg-run doctor`."""

from __future__ import annotations

import datetime

from engine import calibration, history
from engine.plan import Plan
from engine.run.progress import Progress


def run(
    plan: Plan,
    peak_bytes: int | None,
    seconds: float | None,
    told: Progress,
    *,
    out_of_memory: bool = False,
    room_bytes: int | None = None,
) -> None:
    """Remember one call of the pipeline. A run on the CPU, and one of a card without a UUID, is not remembered.

    `room_bytes` is what it could take of the card, where that was less than the plan's budget.
    Where it cannot be written, one line says so: the run itself has succeeded.
    """
    card = plan.card
    if card is None or card.uuid is None:
        return
    measured = calibration.find(card, plan.hardware.driver).calibration if plan.estimate.calibrated else None
    made = history.of_run(
        plan.request,
        plan.optimizers,
        plan.estimate,
        when=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        driver=plan.hardware.driver,
        calibration=None if measured is None else measured.digest,
        digest=plan.digest,
        measured_bytes=peak_bytes,
        measured_seconds=None if seconds is None else round(seconds, 4),
        out_of_memory=out_of_memory,
        room_bytes=plan.budget_bytes if room_bytes is None else room_bytes,
        acting=plan.acting,
    )
    try:
        history.remember(card.uuid, made)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        because = getattr(error, "strerror", None) or error
        told.say(f"warning: this run could not be remembered in {history.folder()} ({because})")
