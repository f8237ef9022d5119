"""Choose: values in, a decision out.

Of the profiles that `match`, that obey the request and break no rule, those that fit the card and the host are left;
of those the fastest is taken. Equal ones go by quality, then by the bytes they leave free, then by fewer steps. Where
nothing can be estimated the choice is by `match` alone: one for large pictures goes before one that is not, and then
the one that asks for the most free VRAM; whether it fits is then not known, and said to be not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine import compat, optimizers
from engine.errors import IncompatibleError
from engine.facts.model import Model
from engine.optimizers import dtype
from engine.units import format_size
from engine.values import Estimate, FrozenDict, Gpu, Note, Profile, Rejection, Request, Step
from engine.words import listing

_QUALITY = ("exact", "near", "lossy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was chosen (`profile` None: nothing, or an exact list), and why everything else was not."""

    profile: Profile | None
    steps: tuple[Step, ...]
    fits: bool | None
    estimate: Estimate
    rejected: tuple[Rejection, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything a decision is made from."""

    request: Request
    model: Model
    gpu: Gpu | None
    estimate: Callable[[Sequence[Step]], Estimate] = field(default=lambda steps: Estimate())
    """What a run under these steps takes; fields that are not known are None."""
    budget_bytes: int | None = None
    host_budget_bytes: int | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"


def exact(situation: Situation, steps: Sequence[Step]) -> Decision:
    """Return a decision for exactly these steps, in the order `dg-run` writes. Raises: IncompatibleError."""
    listed = optimizers.in_order(steps)
    if optimizers.placement(listed) is None and not any(s.name == "xdit" for s in listed):
        listed = optimizers.in_order([*listed, optimizers.spec("resident").step()])
    settled = _settle(listed, situation)
    found = _findings(settled, situation)
    if broken := [f for f in found if f.breaks]:
        raise compat.refusal(broken)
    notes = _notes(found, settled)
    if not any(s.name == "dtype" for s in settled):
        notes = (
            *notes,
            Note(kind="default", optimizer="dtype", because="no dtype was listed: float32, as the library loads"),
        )
    taken = situation.estimate(_acting(settled, found))
    short = _short(taken, situation)
    return Decision(
        profile=None,
        steps=settled,
        fits=False if short is not None else True if _is_known(taken, situation) else None,
        estimate=taken,
        rejected=() if short is None else (_does_not_fit("exact list", settled, short),),
        notes=notes,
    )


def choose(situation: Situation, profiles: Sequence[Profile]) -> Decision:
    """Return the decision among `profiles`. Nothing suitable is a decision too: `fits` is false then.

    Raises: IncompatibleError, when what was required contradicts itself.
    """
    _refuse_contradiction(situation)
    suitable: list[tuple[Profile, tuple[Step, ...], tuple[compat.Finding, ...]]] = []
    rejected: list[Rejection] = []
    for profile in profiles:
        steps = _settle(_constrained(profile.steps, situation.request), situation)
        found = _findings(steps, situation)
        reason = _match(profile, situation) or _constraint(profile, steps, situation) or _rule(profile, steps, found)
        if reason is None:
            suitable.append((profile, steps, found))
        else:
            rejected.append(reason)
    candidates = [_Candidate(p, s, f, situation.estimate(_acting(s, f))) for p, s, f in suitable]
    fitting = []
    for candidate in candidates:
        short = _short(candidate.estimate, situation)
        if short is None:
            fitting.append(candidate)
        else:
            rejected.append(_does_not_fit(candidate.profile.name, candidate.steps, short))
    if not fitting:
        return Decision(profile=None, steps=(), fits=False, estimate=Estimate(), rejected=tuple(rejected), notes=())
    is_estimated = all(c.estimate.required_bytes is not None for c in fitting)
    is_timed = is_estimated and all(c.estimate.seconds is not None for c in fitting)
    best = min(fitting, key=_cost) if is_timed else max(fitting, key=lambda c: _rank(c.profile))
    rejected += [_passed_over(c, best, is_timed) for c in fitting if c is not best]
    return Decision(
        profile=best.profile,
        steps=best.steps,
        fits=True if all(_is_known(c.estimate, situation) for c in fitting) else None,
        estimate=best.estimate,
        rejected=tuple(rejected),
        notes=(*_changes(best.profile, best.steps, situation.request), *_notes(best.findings, best.steps)),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    profile: Profile
    steps: tuple[Step, ...]
    findings: tuple[compat.Finding, ...]
    estimate: Estimate


def _cost(candidate: _Candidate) -> tuple[float, int, int, int]:
    taken = candidate.estimate
    # A hundredth of a second decides nothing: within it quality and room do.
    return (
        round(taken.seconds or 0.0, 2),
        _QUALITY.index(taken.quality or "exact"),
        taken.required_bytes or 0,
        len(candidate.steps),
    )


def _rank(profile: Profile) -> tuple[int, int]:
    return profile.match.pixels_at_least or 0, profile.match.free_vram_at_least_bytes or 0


@dataclass(frozen=True, slots=True)
class _Short:
    """What is too small for a run, and by how much."""

    rule: str
    bytes: int
    because: str
    remedy: str


def _short(taken: Estimate, situation: Situation) -> _Short | None:
    """Return what a run is short of, or None where it fits, or where it is not known."""
    budget, ram = situation.budget_bytes, situation.host_budget_bytes
    if taken.required_bytes is not None and budget is not None and taken.required_bytes > budget:
        over = taken.required_bytes - budget
        phase = max(taken.phases, key=lambda p: p.peak_bytes or 0).name if taken.phases else "the run"
        return _Short(
            "estimate.device",
            over,
            f"{phase} needs {format_size(taken.required_bytes)} on the card, the budget is {format_size(budget)}:"
            f" {format_size(over)} short",
            f"free {format_size(over)} on the card, ask for a smaller picture, or offload more",
        )
    if taken.host_bytes is not None and ram is not None and taken.host_bytes > ram:
        over = taken.host_bytes - ram
        return _Short(
            "estimate.host",
            over,
            f"it needs {format_size(taken.host_bytes)} of host memory, {format_size(ram)} are available:"
            f" {format_size(over)} short",
            f"free {format_size(over)} of host memory, or keep more on the card",
        )
    return None


def _is_known(taken: Estimate, situation: Situation) -> bool:
    """Whether a run's need and the card's room are both known."""
    is_seen = taken.basis != "component"  # what a pipeline holds between its components was not seen
    return is_seen and taken.required_bytes is not None and situation.budget_bytes is not None


def _does_not_fit(name: str, steps: tuple[Step, ...], short: _Short) -> Rejection:
    return Rejection(
        profile=name,
        optimizers=steps,
        rule=short.rule,
        short_bytes=short.bytes,
        because=short.because,
        remedy=short.remedy,
    )


def _settle(steps: Sequence[Step], situation: Situation) -> tuple[Step, ...]:
    """Return steps with `auto` decided where the card's capability (or its absence) decides it."""
    capability = None if situation.gpu is None else situation.gpu.compute_capability
    value = "float32" if situation.gpu is None else dtype.resolve_auto(capability)

    def settled(step: Step) -> Step:
        is_open = step.name == "dtype" and step.params["value"] == "auto"
        return dataclasses.replace(step, params=FrozenDict(value=value)) if is_open else step

    return tuple(settled(s) for s in steps)


def _findings(steps: Sequence[Step], situation: Situation) -> tuple[compat.Finding, ...]:
    request, gpu = situation.request, situation.gpu
    facts = compat.Facts(
        device=situation.device,
        compute_capability=None if gpu is None else gpu.compute_capability,
        batch=request.batch,
        height=request.height,
        width=request.width,
        model=situation.model,
        libraries=compat.installed(),
    )
    return compat.under(facts).findings(steps)


def _acting(steps: Sequence[Step], found: Sequence[compat.Finding]) -> tuple[Step, ...]:
    """Return steps without those that do nothing here, and cost the picture nothing either."""
    idle = {name for f in found if f.is_idle for name in f.subjects if not optimizers.spec(name).is_placement}
    return tuple(s for s in steps if s.name not in idle)


def _constrained(steps: Sequence[Step], request: Request) -> tuple[Step, ...]:
    """Return a profile's steps with what the user requires put in, and what the user forbids taken out.

    A required placement takes the place of the profile's own. A forbidden placement stays, and `_constraint` then
    rejects the profile: where the weights go instead is not for us to invent.
    """
    required = {s.name: s for s in request.require}
    wants_placement = any(optimizers.spec(n).is_placement for n in required)
    kept = [
        required.pop(s.name, s)
        for s in steps
        if not (s.name in request.forbid and not optimizers.spec(s.name).is_placement)
        and not (wants_placement and optimizers.spec(s.name).is_placement and s.name not in required)
    ]
    for step in optimizers.in_order(required.values()):
        slot = optimizers.spec(step.name).slot
        after = next((i for i, k in enumerate(kept) if optimizers.spec(k.name).slot > slot), len(kept))
        kept.insert(after, step)
    return tuple(kept)


def _refuse_contradiction(situation: Situation) -> None:
    request = situation.request
    both = [s.name for s in request.require if s.name in request.forbid]
    if both:
        raise IncompatibleError(
            f"{listing(both)} cannot be required and forbidden", "both were asked for", "drop one of the two"
        )
    broken = [f for f in _findings(optimizers.in_order(request.require), situation) if f.breaks]
    if broken:
        raise compat.refusal(broken)


def _rejection(
    profile: Profile, steps: tuple[Step, ...], rule: str, because: str, remedy: str, short_bytes: int | None = None
) -> Rejection:
    return Rejection(
        profile=profile.name, optimizers=steps, rule=rule, short_bytes=short_bytes, because=because, remedy=remedy
    )


def _match(profile: Profile, situation: Situation) -> Rejection | None:
    """Return why a profile's `match` does not permit it, or None.

    Without an accelerator free VRAM means nothing: a profile asked for by name is taken then, and its placements have
    no effect.
    """
    match, gpu = profile.match, situation.gpu
    if gpu is None and situation.request.profile is not None and match.device != "cuda":
        return None
    if match.device is not None and match.device != situation.device:
        where = "there is none" if gpu is None else f"{gpu.name} is here"
        wanted = "an accelerator" if match.device == "cuda" else "a machine without an accelerator"
        remedy = "--device cpu runs without the card" if match.device == "cpu" else "use a machine with a card"
        return _rejection(profile, profile.steps, "match.device", f"it is for {wanted}, and {where}", remedy)
    return _free_vram(profile, gpu) or _pixels(profile, situation.request.pixels)


def _free_vram(profile: Profile, gpu: Gpu | None) -> Rejection | None:
    at_least = profile.match.free_vram_at_least_bytes
    if at_least is None:
        return None
    wants = f"it wants {format_size(at_least)} of free VRAM"
    if gpu is None:
        because, remedy, short = "made for a card, and there is no accelerator", "use a machine with a card", None
    elif gpu.free_bytes is None:
        because, remedy, short = f"{wants}, and how much is free is not known", "say how much: --vram SIZE", None
    elif at_least > gpu.free_bytes:
        short = at_least - gpu.free_bytes
        because = f"{wants}, {format_size(gpu.free_bytes)} are free: {format_size(short)} short"
        remedy = f"free {format_size(short)} on the card, or take a profile that asks for less"
    else:
        return None
    return _rejection(profile, profile.steps, "match.free_vram", because, remedy, short)


def _pixels(profile: Profile, pixels: int | None) -> Rejection | None:
    at_least = profile.match.pixels_at_least
    if at_least is None or (pixels or 0) >= at_least:
        return None
    side = round(at_least**0.5)
    because = f"it is for pictures of at least {at_least:,} pixels ({side} x {side})"
    return _rejection(profile, profile.steps, "match.pixels", because, "ask for a larger picture")


def _constraint(profile: Profile, steps: tuple[Step, ...], situation: Situation) -> Rejection | None:
    """Return why what the user asked for rules a profile out, or None."""
    request = situation.request
    for step in steps:
        spec = optimizers.spec(step.name)
        if step.name in request.forbid:
            return _rejection(
                profile, steps, "forbid", f"it places weights by {step.name}, which is forbidden", f"allow {step.name}"
            )
        if _QUALITY.index(spec.quality) > _QUALITY.index(request.quality):
            because = f"{step.name} is {spec.quality}, and the quality asked for is {request.quality}"
            return _rejection(
                profile, steps, "quality", because, f"allow --quality {spec.quality}, or forbid {step.name}"
            )
    return None


def _rule(profile: Profile, steps: tuple[Step, ...], found: Sequence[compat.Finding]) -> Rejection | None:
    """Return the first compatibility rule that a profile's steps break here, or None."""
    broken = next((f for f in found if f.breaks), None)
    if broken is None:
        return None
    return _rejection(profile, steps, broken.rule.id, f"{broken.sentence}: {broken.rule.because}", broken.rule.remedy)


def _passed_over(left: _Candidate, chosen: _Candidate, is_timed: bool) -> Rejection:
    profile, best = left.profile, chosen.profile
    slower = (left.estimate.seconds or 0.0) - (chosen.estimate.seconds or 0.0)
    if is_timed and slower > 0:
        because = (
            f"it fits, and takes {left.estimate.seconds:.2f} s where {best.name} takes {chosen.estimate.seconds:.2f}"
        )
    elif is_timed:
        because = f"it fits, and {best.name} is as fast, and no worse"
    elif (best.match.pixels_at_least or 0) > (profile.match.pixels_at_least or 0):
        because = f"{best.name} is made for pictures of this size"
    else:
        because = f"{best.name} asks for more free VRAM, and it is there"
    return _rejection(profile, left.steps, "preferred", because, f"--profile {profile.name} takes it all the same")


def _changes(profile: Profile, steps: Sequence[Step], request: Request) -> tuple[Note, ...]:
    """Return what the user's wishes changed in the profile's own list."""
    own, now = {s.name for s in profile.steps}, {s.name for s in steps}
    added = [
        Note(kind="required", optimizer=n, because="you asked for it; the profile alone does without")
        for n in sorted(now - own)
    ]
    dropped = [
        Note(
            kind="dropped",
            optimizer=n,
            because="left out, since you forbade it"
            if n in request.forbid
            else "left out, since you asked for another placement",
        )
        for n in sorted(own - now)
    ]
    return (*added, *dropped)


def _notes(found: Sequence[compat.Finding], steps: Sequence[Step]) -> tuple[Note, ...]:
    quiet = [
        Note(kind="no_effect" if f.is_idle else "degrades", optimizer=name, because=f.rule.because)
        for f in found
        if not f.breaks
        for name in f.subjects
    ]
    is_open = any(s.name == "dtype" and s.params["value"] == "auto" for s in steps)
    why = "the card's compute capability is not known, so the dtype is decided on the card"
    return (*quiet, Note(kind="undecided", optimizer="dtype", because=why)) if is_open else tuple(quiet)
