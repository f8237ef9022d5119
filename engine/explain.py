"""Plans for reading. The solver decides, this only tells."""

from __future__ import annotations

from collections.abc import Sequence

from engine.plan import Plan
from engine.units import format_size
from engine.values import Note, Rejection, Step

NOT_ESTIMATED = "not estimated, so whether it fits is not known"


def plan_text(plan: Plan) -> str:
    """Return a plan in a dozen lines: the request, the device, the steps, and why nothing else was taken."""
    rows = [
        ("model", _model(plan)),
        ("picture", picture(plan)),
        ("device", _device(plan)),
        ("profile", _profile(plan)),
    ]
    if plan.optimizers:
        rows.append(("steps", "\n".join(f"{i}. {_step(s, plan.notes)}" for i, s in enumerate(plan.optimizers, 1))))
    rows += [("note", text) for text in plan.hardware.notes]
    rows += [("note", f"{n.optimizer}: {n.because}" if n.optimizer else n.because) for n in _other_notes(plan)]
    if plan.fits is not False or plan.estimate.required_bytes is not None:
        rows += _estimate(plan)
    if plan.rejected:
        rows.append(("rejected" if plan.fits is False else "not taken", _rejected(plan.rejected)))
    return "\n".join(_row(label, text) for label, text in rows)


def _estimate(plan: Plan) -> list[tuple[str, str]]:
    """Return the rows of what a run takes: memory, phase by phase, the host's memory, and time."""
    taken = plan.estimate
    if taken.required_bytes is None or taken.peak_allocated_bytes is None:
        because = next((n.because for n in plan.notes if n.kind == "not_estimated"), None)
        return [("memory", NOT_ESTIMATED + (f": {because}" if because else ""))]
    interval = taken.interval
    span = f" ({format_size(interval.low_bytes or 0)} to {format_size(interval.high_bytes or 0)})"
    phases = [
        f"{p.name:<10} {format_size(p.peak_bytes or 0):>10}   weights {format_size(p.weights_bytes or 0)},"
        f" activations {format_size(p.activation_bytes or 0)}, workspaces {format_size(p.workspace_bytes or 0)}"
        + (f"; {_seconds(p.seconds)}" if p.seconds is not None else "")
        for p in taken.phases
    ]
    fits = {True: "it fits", False: "it does not fit", None: "the budget is not known"}[plan.fits]
    rows = [
        (
            "memory",
            f"at most {format_size(taken.peak_allocated_bytes)}{span} in tensors,"
            f" {format_size(taken.device_bytes or 0)} on the card; at least {format_size(taken.required_bytes)}"
            f" are needed: {fits}\n" + "\n".join(phases),
        )
    ]
    if taken.basis == "interpolated":
        rows.append(("basis", "between two sizes that were traced: torch is not installed, and no dry run can be made"))
    if taken.basis == "component":
        rows.append(
            ("basis", "component by component, since the pipeline itself could not be dry-run: a wide interval")
        )
    rows += [("assumed", text) for text in taken.assumptions]
    if taken.host_bytes is not None:
        pinned = taken.host.pinned_bytes or 0
        rows.append(
            (
                "host",
                format_size(taken.host_bytes)
                + (f", of which {format_size(pinned)} pinned" if pinned else "")
                + (f"; and {format_size(taken.host.file_bytes)} of file pages" if taken.host.file_bytes else ""),
            )
        )
    if taken.seconds is not None:
        low, high = interval.low_seconds, interval.high_seconds
        rows.append(
            (
                "time",
                f"about {_seconds(taken.seconds)} ({_seconds(low or 0)} to {_seconds(high or 0)},"
                f"{'' if taken.calibrated else ' not'} calibrated),"
                f" and {_seconds(taken.load_seconds or 0)} to load",
            )
        )
    return rows


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _row(label: str, text: str) -> str:
    first, *rest = text.splitlines()
    return "\n".join([f"  {label:<10} {first}", *(f"  {'':<10} {line}" for line in rest)])


def _model(plan: Plan) -> str:
    name = "the embedded model" if plan.request.model == "embedded" else plan.request.model
    return f"{name} ({plan.request.pipeline_class})"


def picture(plan: Plan) -> str:
    """Return what is drawn, and in how many steps."""
    asked = plan.request
    size = (
        "the pipeline's own size" if asked.width is None or asked.height is None else f"{asked.width} x {asked.height}"
    )
    parts = [
        size,
        f"{asked.frames} frames" if asked.frames else "",
        f"batch of {asked.batch}" if asked.batch > 1 else "",
    ]
    parts += [f"{asked.steps} steps" if asked.steps else "the pipeline's own number of steps"]
    parts += [f"guidance {asked.guidance:g}"] if asked.guidance is not None else []
    parts += [f"{k} {v!r}" for k, v in asked.call.items()]
    return ", ".join(p for p in parts if p)


def _device(plan: Plan) -> str:
    card = plan.card
    if card is None:
        chosen = "--device cpu" if plan.request.device == "cpu" else None
        return f"CPU ({chosen or plan.hardware.no_gpu_because or 'no accelerator'})"
    free = "free VRAM not known" if card.free_bytes is None else f"{format_size(card.free_bytes)} free"
    if plan.budget_bytes is not None and plan.headroom_bytes is not None:
        free += f", budget {format_size(plan.budget_bytes)} after {format_size(plan.headroom_bytes)} of headroom"
    return f"{card.index}: {card.name}{' (hypothetical)' if card.hypothetical else ''}, {free}"


def _profile(plan: Plan) -> str:
    if plan.profile is not None:
        return f"{plan.profile.name} {plan.profile.version} ({plan.profile.source})"
    return "none: exactly the listed optimizers" if plan.request.exact else "none is suitable"


def _step(step: Step, notes: tuple[Note, ...]) -> str:
    labels = {"no_effect": "no effect", "degrades": "at a price", "required": "added", "undecided": "open"}
    told = [n for n in notes if n.optimizer == step.name and n.kind in labels]
    return f"{step}" + "".join(f"\n     {labels[n.kind]}: {n.because}" for n in told)


def _other_notes(plan: Plan) -> list[Note]:
    listed = {s.name for s in plan.optimizers}
    return [n for n in plan.notes if n.optimizer not in listed and n.kind != "not_estimated"]


def _rejected(rejections: Sequence[Rejection]) -> str:
    """Return a line a reason: profiles that were passed over for the same one share it."""
    shared: dict[str, list[str]] = {}
    for rejection in rejections:
        shared.setdefault(rejection.because, []).append(rejection.profile)
    return "\n".join(f"{', '.join(names)}: {because}" for because, names in shared.items())
