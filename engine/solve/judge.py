"""What rules a candidate out before anything is estimated: its profile's `match`, the request, a compatibility rule."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from engine import gpus, history, optimizers
from engine.optimizers import placing
from engine.solve.candidates import Candidate
from engine.solve.situation import QUALITIES, Situation
from engine.units import format_size
from engine.values import Gpu, Match, Profile, Rejection, Step
from engine.words import listing

REMEMBERED = "remembered.out_of_memory"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a run, or a whole profile, was not taken."""

    steps: tuple[Step, ...]
    rule: str
    because: str
    remedy: str
    short_bytes: int | None = None
    seconds: float | None = None

    def of(self, profile: Profile) -> Rejection:
        """Return it as the rejection of one profile."""
        return Rejection(
            profile=profile.name,
            optimizers=self.steps,
            rule=self.rule,
            short_bytes=self.short_bytes,
            because=self.because,
            remedy=self.remedy,
            seconds=self.seconds,
        )


def match(profile: Profile, situation: Situation) -> Reason | None:
    """Return why a profile's `match` does not permit it, or None.

    Without an accelerator free VRAM means nothing: a profile asked for by name is taken then, and its placements have
    no effect.
    """
    wanted, gpu = profile.match, situation.gpu
    if gpu is None and situation.request.profile is not None and wanted.device != "cuda":
        return None
    if wanted.device is not None and wanted.device != situation.device:
        where = "there is none" if gpu is None else f"{gpu.name} is here"
        what = "an accelerator" if wanted.device == "cuda" else "a machine without an accelerator"
        remedy = "--device cpu runs without the card" if wanted.device == "cpu" else "use a machine with a card"
        return Reason(profile.steps, "match.device", f"it is for {what}, and {where}", remedy)
    return (
        _free_vram(profile, gpu)
        or _pixels(profile, situation.request.pixels)
        or _gpus(profile, gpu)
        or _pipelines(profile, situation.model.pipeline_class)
    )


def _free_vram(profile: Profile, gpu: Gpu | None) -> Reason | None:
    at_least, below = profile.match.free_vram_at_least_bytes, profile.match.free_vram_below_bytes
    if at_least is None and below is None:
        return None
    wants = f"it wants {_range(profile.match)} of free VRAM"
    short = None
    if gpu is None:
        because, remedy = "made for a card, and there is no accelerator", "use a machine with a card"
    elif gpu.free_bytes is None:
        because, remedy = f"{wants}, and how much is free is not known", "say how much: --vram SIZE"
    elif at_least is not None and at_least > gpu.free_bytes:
        short = at_least - gpu.free_bytes
        because = f"{wants}, {format_size(gpu.free_bytes)} are free: {format_size(short)} short"
        remedy = f"free {format_size(short)} on the card, or take a profile that asks for less"
    elif below is not None and gpu.free_bytes >= below:
        because = f"{wants}, and {format_size(gpu.free_bytes)} are free"
        remedy = "take a profile that is made for larger cards"
    else:
        return None
    return Reason(profile.steps, "match.free_vram", because, remedy, short)


def _range(wanted: Match) -> str:
    parts = []
    if wanted.free_vram_at_least_bytes is not None:
        parts.append(format_size(wanted.free_vram_at_least_bytes))
    if wanted.free_vram_below_bytes is not None:
        parts.append(f"less than {format_size(wanted.free_vram_below_bytes)}")
    return " and ".join(parts)


def _pixels(profile: Profile, pixels: int | None) -> Reason | None:
    at_least, below = profile.match.pixels_at_least, profile.match.pixels_below
    if at_least is not None and (pixels or 0) < at_least:
        side = round(at_least**0.5)
        because = f"it is for pictures of at least {at_least:,} pixels ({side} x {side})"
        return Reason(profile.steps, "match.pixels", because, "ask for a larger picture")
    if below is not None and pixels is not None and pixels >= below:
        because = f"it is for pictures of less than {below:,} pixels, and this one has {pixels:,}"
        return Reason(profile.steps, "match.pixels", because, "ask for a smaller picture")
    return None


def _gpus(profile: Profile, gpu: Gpu | None) -> Reason | None:
    wanted = profile.match.gpus
    if not wanted:
        return None
    row = None if gpu is None else gpus.row_of(gpu)
    names = {gpus.folded(n) for n in (gpu.name if gpu else "", row.name if row else "", row.nvml_name if row else "")}
    if any(fnmatchcase(name, _folded(w)) for w in wanted for name in names if name):
        return None
    because = f"it is for {listing(wanted, 'or')}, and {'there is no card' if gpu is None else f'{gpu.name} is here'}"
    return Reason(profile.steps, "match.gpus", because, "take a profile that is made for this card")


def _folded(pattern: str) -> str:
    return "*".join(gpus.folded(part) for part in pattern.split("*"))


def _pipelines(profile: Profile, pipeline_class: str) -> Reason | None:
    wanted = profile.match.pipelines
    if not wanted or any(fnmatchcase(pipeline_class, w) for w in wanted):
        return None
    because = f"it is for {listing(wanted, 'or')}, and the model's pipeline is {pipeline_class}"
    return Reason(profile.steps, "match.pipelines", because, "take a profile that is made for this model")


def candidate(found: Candidate, situation: Situation) -> Reason | None:
    """Return why the request, or a rule, rules a candidate out; None where nothing does."""
    return _constraint(found, situation) or _unknown(found, situation) or _rule(found)


def remembered(found: Candidate, situation: Situation) -> Reason | None:
    """Return that a candidate ran out of memory here, with at least as much room as it would have now; else None.

    More room, and it is tried again: so that more memory never takes a choice away.
    """
    because = situation.lost(found.key)
    if because is None or situation.gpu is None or situation.gpu.uuid is None:
        return None
    where = history.path(situation.gpu.uuid)
    remedy = f"free more of the card than that; `dg-run calibrate --forget` forgets its runs ({where})"
    return Reason(found.steps, REMEMBERED, because, remedy)


def _unknown(found: Candidate, situation: Situation) -> Reason | None:
    names = placing.unknown(found.steps, situation.model.parts)
    if not names:
        return None
    because = f"it speaks of {listing(names)}, which {situation.model.id} does not have"
    return Reason(
        found.steps, "components", because, "name components of this model, or let `match` name its pipelines"
    )


def _constraint(found: Candidate, situation: Situation) -> Reason | None:
    request = situation.request
    for step in found.acting:
        spec = optimizers.spec(step.name)
        if step.name in request.forbid:
            because = f"it places weights by {step.name}, which is forbidden"
            return Reason(found.steps, "forbid", because, f"allow {step.name}")
        if QUALITIES.index(spec.quality) > QUALITIES.index(request.quality):
            because = f"{step.name} is {spec.quality}, and the quality asked for is {request.quality}"
            remedy = f"allow --quality {spec.quality}, or forbid {step.name}"
            return Reason(found.steps, "quality", because, remedy)
    return None


def _rule(found: Candidate) -> Reason | None:
    broken = next((f for f in found.findings if f.breaks), None)
    if broken is None:
        return None
    because = f"{broken.sentence}: {broken.rule.because}"
    return Reason(found.steps, broken.rule.id, because, broken.rule.remedy)
