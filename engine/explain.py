"""Plans for reading. The solver decides, this only tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import optimizers
from engine.plan import Plan
from engine.units import format_size
from engine.values import Note, Rejection, Step
from engine.words import listing

_MOST_LINES = 14
_OF_A_STEP = {"no_effect": "no effect", "degrades": "at a price", "required": "added", "undecided": "open"}
NOT_ESTIMATED = "not estimated, so whether it fits is not known"


def plan_text(plan: Plan) -> str:
    """Return a plan for reading: the choice in one line, what it stands on, and why nothing else was taken."""
    rows = [
        ("plan", _headline(plan)),
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
    if plan.ladder:
        rows.append(("fallback", _ladder(plan)))
    if plan.rejected:
        rows.append(("rejected" if plan.fits is False else "not taken", _rejected(plan.rejected)))
    if plan.advice:
        rows.append(("for more" if plan.fits is not False else "it would fit", _advice(plan)))
    return "\n".join(_row(label, text) for label, text in rows)


def _estimate(plan: Plan) -> list[tuple[str, str]]:
    """Return the rows of what a run takes: memory, phase by phase, the host's memory, and time."""
    taken = plan.estimate
    if taken.required_bytes is None or taken.peak_allocated_bytes is None:
        because = next((n.because for n in plan.notes if n.kind == "not_estimated"), None)
        return [("memory", NOT_ESTIMATED + (f": {because}" if because else ""))]
    interval = taken.interval
    span = f" ({format_size(interval.low_bytes or 0)} to {format_size(interval.high_bytes or 0)})"
    fits = {True: "it fits", False: "it does not fit", None: "the budget is not known"}[plan.fits]
    rows = [
        (
            "memory",
            f"at most {format_size(taken.peak_allocated_bytes)}{span} in tensors,"
            f" {format_size(taken.device_bytes or 0)} on the card; at least {format_size(taken.required_bytes)}"
            f" are needed: {fits}\n" + "\n".join(_phases(plan)),
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


def _phases(plan: Plan) -> list[str]:
    """Return a small table: each phase's peak against the budget, what it is made of, and how long it takes."""
    budget = plan.budget_bytes
    heads = ("phase", "peak", "of budget", "weights", "activations", "workspaces", "time")
    lines = [
        (
            p.name,
            format_size(p.peak_bytes or 0),
            f"{(p.peak_bytes or 0) / budget:.0%}" if budget else "",
            format_size(p.weights_bytes or 0),
            format_size(p.activation_bytes or 0),
            format_size(p.workspace_bytes or 0),
            "" if p.seconds is None else _seconds(p.seconds),
        )
        for p in plan.estimate.phases
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in (heads, *lines)
    ]


def _headline(plan: Plan) -> str:
    """Return the choice in one line."""
    taken = plan.estimate
    if plan.fits is False:
        return "nothing fits" if not plan.request.exact else "the listed optimizers do not fit"
    idle = {n.optimizer for n in plan.notes if n.kind == "no_effect"}
    parts = [run_text([s for s in plan.optimizers if s.name not in idle or optimizers.spec(s.name).is_placement])]
    if plan.profile is not None:
        parts[0] += f" ({plan.profile.name})"
    if taken.required_bytes is not None and plan.budget_bytes is not None:
        parts.append(f"{format_size(taken.required_bytes)} of {format_size(plan.budget_bytes)} needed")
    if taken.seconds is not None:
        parts.append(f"about {_seconds(taken.seconds)}")
    if taken.quality not in (None, "exact"):
        parts.append(f"{taken.quality}, not exact")
    return ", ".join(parts)


def run_text(steps: Sequence[Step]) -> str:
    """Return what makes a list of steps what it is: without the dtype, which is nearly always the same."""
    return " + ".join(optimizers.short(s) for s in steps if s.name not in ("dtype", "vae_slicing")) or "nothing"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _row(label: str, text: str) -> str:
    first, *rest = text.splitlines()
    return "\n".join([f"  {label:<10} {first}", *(f"  {'':<10} {line}" for line in rest)])


def _model(plan: Plan) -> str:
    name = "the embedded model" if plan.request.model == "embedded" else plan.request.model
    loras = [f"{Path(lora.path).name} at {lora.weight:g}" for lora in plan.request.loras]
    return f"{name} ({plan.request.pipeline_class})" + (f"\nwith the LoRA {listing(loras)}" if loras else "")


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
    steps = "1 step" if asked.steps == 1 else f"{asked.steps} steps"
    parts += [steps if asked.steps else "the pipeline's own number of steps"]
    parts += [f"guidance {asked.guidance:g}"] if asked.guidance is not None else []
    begun = asked.call.get("image")
    parts += [f"from a picture of {begun['width']} x {begun['height']}"] if begun is not None else []
    parts += [f"{k} {v!r}" for k, v in asked.call.items() if k != "image"]
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
    return f"{step}" + "".join(f"\n     {_OF_A_STEP[n.kind]}: {n.because}" for n in told)


def _other_notes(plan: Plan) -> list[Note]:
    listed = {s.name for s in plan.optimizers}
    return [n for n in plan.notes if n.optimizer not in listed and n.kind != "not_estimated"]


def _rejected(rejections: Sequence[Rejection]) -> str:
    """Return a line a kind of run, the nearest of its kind: what costs more, what is short, what is not allowed."""
    kinds: dict[tuple[str, ...], list[Rejection]] = {}
    for rejection in rejections:
        if rejection.rule == "same":
            continue  # another profile's name for what was taken
        is_whole = rejection.rule.startswith("match.")  # the profile as such, and not one of its alternatives
        kind = (rejection.profile,) if is_whole else (rejection.rule.partition(".")[0], *_kind(rejection.optimizers))
        kinds.setdefault(kind, []).append(rejection)
    lines = sorted((*_order(best := min(several, key=_order)), _line(best, several)) for several in kinds.values())
    told = [text for *_, text in lines]
    if len(told) > _MOST_LINES:
        told = [*told[:_MOST_LINES], f"and {len(told) - _MOST_LINES} more kinds, which --json lists"]
    return "\n".join(told)


def _kind(steps: Sequence[Step]) -> tuple[str, ...]:
    """Return what of a list makes it another kind of run: which steps, and which kind of group, and not how large."""
    return tuple(
        f"{s.name} {s.params.get('type', '')} {bool(s.params.get('components'))}"
        for s in steps
        if s.name not in ("dtype", "vae_slicing", "vae_tiling")
    )


def _line(best: Rejection, several: Sequence[Rejection]) -> str:
    same = [r for r in several if r.optimizers == best.optimizers and r.because == best.because]
    run = "" if best.rule.startswith("match.") else run_text(best.optimizers)
    others = len({str(r.optimizers) for r in several}) - 1
    more = f" (and {others} like it)" if others else ""
    return f"{_named(run, same)}: {best.because}{more}"


def _named(run: str, several: Sequence[Rejection]) -> str:
    names = ", ".join(dict.fromkeys(r.profile for r in several))
    return f"{run} ({names})" if run else names


def _ladder(plan: Plan) -> str:
    """Return what the run goes down to when its memory runs out, a line a rung."""
    lines = []
    for begin, rung in zip(("if memory runs out: ", "after that: "), plan.ladder or (), strict=False):
        name = "" if rung.profile is None else f" ({rung.profile.name})"
        needs = "" if rung.required_bytes is None else f", {format_size(rung.required_bytes)} needed"
        takes = "" if rung.seconds is None else f", about {_seconds(rung.seconds)}"
        lines.append(f"{begin}{run_text(rung.optimizers)}{name}{needs}{takes}")
    return "\n".join(lines)


def _order(rejection: Rejection) -> tuple[int, float]:
    """Return where a rejection stands: what was lost before, what costs more, what is short, what a rule forbids."""
    if rejection.rule.startswith("remembered."):
        return -1, 0
    if rejection.rule in ("preferred", "quality"):
        return 0, rejection.seconds or 0.0
    if rejection.rule.startswith("estimate."):
        return 1, rejection.short_bytes or 0
    return (3, 0) if rejection.rule.startswith("match.") else (2, 0)


def _advice(plan: Plan) -> str:
    return "\n".join(
        f"{a.change}: {run_text(a.optimizers)}"
        + (f" ({a.profile})" if a.profile else "")
        + (f", {format_size(a.required_bytes)} needed" if a.required_bytes is not None else "")
        + (f", about {_seconds(a.seconds)}" if a.seconds is not None else "")
        for a in plan.advice or ()
    )
