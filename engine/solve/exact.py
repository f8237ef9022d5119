"""A decision for exactly the listed steps: nothing is chosen, everything is checked and estimated."""

from __future__ import annotations

from collections.abc import Sequence

from engine import compat, optimizers
from engine.solve import opened, reasons
from engine.solve.candidates import Rules
from engine.solve.situation import Decision, Situation
from engine.values import Estimate, Note, Rejection, Step


def exact(situation: Situation, steps: Sequence[Step]) -> Decision:
    """Return a decision for exactly these steps, in the order `dg-run` writes. Raises: IncompatibleError.

    What is left open takes its usual value: nothing is searched.
    """
    listed = optimizers.in_order(steps)
    if optimizers.placement(listed) is None and not any(s.name == "xdit" for s in listed):
        listed = optimizers.in_order([*listed, optimizers.spec("resident").step()])
    settled = tuple(opened.values(s, situation)[0] for s in listed)
    judged = Rules.under(situation).of(settled)
    if broken := [f for f in judged.findings if f.breaks]:
        raise compat.refusal(broken)
    notes = reasons.notes(judged.findings, settled)
    if not any(s.name == "dtype" for s in settled):
        because = "no dtype was listed: float32, as the library loads"
        notes = (*notes, Note(kind="default", optimizer="dtype", because=because))
    if (lost := situation.lost(judged.key)) is not None:
        notes = (*notes, Note(kind="remembered", optimizer=None, because=lost))
    taken = situation.estimate(judged.acting)
    short = reasons.of_estimate(taken, situation)
    rejected: tuple[Rejection, ...] = ()
    if short is not None:
        rejected = (
            Rejection(
                profile="exact list",
                optimizers=settled,
                rule=short.rule,
                short_bytes=short.bytes,
                because=short.because,
                remedy=short.remedy,
            ),
        )
    fits = False if short is not None else True if is_known(taken, situation) else None
    return Decision(profile=None, steps=settled, fits=fits, estimate=taken, rejected=rejected, notes=notes)


def is_known(taken: Estimate, situation: Situation) -> bool:
    """Whether a run's need and the card's room are both known."""
    is_seen = taken.basis != "component"  # what a pipeline holds between its components was not seen
    return is_seen and taken.required_bytes is not None and situation.budget_bytes is not None
