"""A lock held against a machine: what has changed since, fact by fact, and whether the lock still stands.

How grave a fact is follows from what it can do to a run. What is run would be another thing: refused. It was found to
fit, and on what is here that is not so, or not known: refused. It fits, by a new estimate on what is here, and
something it stood on is another now: a warning, with the old and the new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine import api, arguments, facts, gpus, lock, plan, probe, versions
from engine.errors import (
    DgRunError,
    FileError,
    HardwareError,
    IncompatibleError,
    ModelError,
    NothingFitsError,
    UsageError,
)
from engine.facts import loras
from engine.facts.model import Model
from engine.lock import Lock
from engine.plan import Plan
from engine.units import format_size
from engine.values import Gpu, Hardware, Note, Step

REFUSE, WARN = "refuse", "warn"
_KINDS: tuple[type[DgRunError], ...] = (NothingFitsError, ModelError, FileError, HardwareError, IncompatibleError)
# Of the libraries, those that a trace is made with: another minor version may compute, and hold, something else.
_TRACING = ("torch", "diffusers", "transformers", "accelerate")
_NOT_THERE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One thing that differs: as it was when the plan was locked, and as it is. Sizes are bytes, times seconds.

    `severity` is "refuse" or "warn", `because` says why; `exit_code` is that of a refusal.
    """

    name: str
    old: str | int | float | None
    new: str | int | float | None
    severity: str
    because: str
    exit_code: int | None = None

    def __str__(self) -> str:
        was = " needed" if self.name.startswith("free ") else ""
        return f"{self.name}: {_shown(self.name, self.old)}{was}, now {_shown(self.name, self.new)} ({self.because})"


def _shown(name: str, value: str | int | float | None) -> str:
    if isinstance(value, int) and name.endswith("bytes"):
        return f"{value:,} ({format_size(value)})"
    return _NOT_THERE if value is None else f"{value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A lock on a machine: the plan of its list there (None where there can be none), and what differs."""

    plan: Plan | None
    drift: tuple[Drift, ...]

    @property
    def refusing(self) -> tuple[Drift, ...]:
        return tuple(d for d in self.drift if d.severity == REFUSE)


def held(
    locked: Lock,
    hardware: Hardware | None = None,
    told: Callable[[str], None] | None = None,
    *,
    is_run: bool = True,
) -> Held:
    """Return a lock held against this machine, or `hardware`: its list is estimated again on what is there.

    Without a run the catalogue's word for a model is enough, where its revision cannot be had.

    Raises: IncompatibleError, where this version does not know its optimizers, or a rule speaks against them.
    """
    seen = seen_for(locked, hardware)
    card = _card(locked, seen)
    known = model_of(locked)
    of_model = (*_of_model(locked, known, is_run=is_run), *_of_loras(locked))
    gone = tuple(_of_absence(locked, seen, card))
    if gone or any(d.severity == REFUSE for d in of_model):
        return Held(plan=None, drift=(*of_model, *gone, *_of_around(locked, seen, card, None)))
    found = _planned(locked, known, seen, card, told)
    drift: tuple[Drift, ...] = (
        *of_model,
        *_of_card(locked, card, found),
        *_of_memory(locked, found),
        *_of_around(locked, seen, card, found),
    )
    drift += tuple(_of_fit(found, drift))
    notes = tuple(Note(kind="drift", optimizer=None, because=str(d)) for d in drift)
    return Held(plan=dataclasses.replace(found, notes=(*found.notes, *notes)), drift=drift)


def plan_of(locked: Lock, hardware: Hardware | None = None, told: Callable[[str], None] | None = None) -> Plan:
    """Return the locked plan on this machine. Raises: where it does not stand here, naming every fact."""
    found = held(locked, hardware, told)
    if found.refusing or found.plan is None:
        raise refusal(found.drift)
    return found.plan


def refusal(drift: Sequence[Drift]) -> DgRunError:
    """Return the error of facts of which some refuse a lock; its kind is that of the first of those."""
    refusing = [d for d in drift if d.severity == REFUSE]
    beside = [f"beside that, {d}" for d in drift if d.severity == WARN]
    kind = next(k for k in _KINDS if k.exit_code == refusing[0].exit_code)
    remedies = {
        NothingFitsError: "free memory on the card, or lock again for what is here",
        ModelError: "give the model in that revision, or lock again",
        FileError: "put the file back as it was, or lock again",
    }
    return kind(
        "the locked plan does not stand on this machine",
        "\n       ".join([*map(str, refusing), *beside]),
        remedies.get(kind, "use a machine with that card, or lock again for what is here")
        + ": `dg-run plan … --lock FILE`",
    )


def seen_for(locked: Lock, hardware: Hardware | None) -> Hardware:
    if hardware is not None:
        return hardware
    return probe.without_cards() if locked.stands_on.gpu is None else probe.snapshot()


def _card(locked: Lock, seen: Hardware) -> Gpu | None:
    """Return the card to run on: of the lock's own kind where there is one, and of several the one with the most free.

    A card that is named by CUDA_VISIBLE_DEVICES is the only one that is seen.
    """
    if locked.stands_on.gpu is None or not seen.gpus:
        return None
    alike = [g for g in seen.gpus if is_kind(g.name, locked.stands_on.gpu.name)]
    return max(alike or seen.gpus, key=lambda g: (g.free_bytes or -1, -g.index))


def is_kind(one: str, other: str) -> bool:
    """Whether two names are of one kind of card: NVML's name and the table's are."""
    if gpus.folded(one) == gpus.folded(other):
        return True
    rows = [{r.name for r in gpus.named(n)} for n in (one, other)]
    return len(rows[0]) == len(rows[1]) == 1 and rows[0] == rows[1]


def model_of(locked: Lock) -> Model:
    """Return the model as it is found now: in the locked revision, else in another. Raises: ModelError."""
    stood = locked.stands_on.model
    try:
        return facts.find(stood.id, stood.revision)
    except ModelError:
        if stood.revision is None:
            raise
        return facts.find(stood.id)  # the revision cannot be had: what is here instead


def _of_model(locked: Lock, known: Model, *, is_run: bool) -> Iterator[Drift]:
    stood = locked.stands_on.model
    if stood.revision is not None and known.revision != stood.revision:
        is_fatal = is_run or known.revision is not None
        if known.revision is None:
            because = "that revision is not on this machine, and cannot be fetched now"
            because += "" if is_fatal else ": checked by what the catalogue says of the model"
        else:
            because = "another revision is another model, and nothing is known of it by this lock"
        yield Drift(
            name="model revision",
            old=stood.revision,
            new=known.revision,
            severity=REFUSE if is_fatal else WARN,
            because=because,
            exit_code=ModelError.exit_code if is_fatal else None,
        )
    elif stood.revision is None and known.revision is not None:
        because = "the plan was locked by the catalogue, before the model was here; it is estimated again"
        yield Drift(name="model revision", old=None, new=known.revision, severity=WARN, because=because)
    elif (now := lock.configuration(known)) != stood.configuration:
        is_catalogue = known.source == "catalogue"
        because = (
            "the catalogue knows the model better now; it is estimated again"
            if is_catalogue
            else "its configuration files say something else: it is another model"
        )
        yield Drift(
            name="model configuration",
            old=stood.configuration[:19],
            new=now[:19],
            severity=WARN if is_catalogue else REFUSE,
            because=because,
            exit_code=None if is_catalogue else ModelError.exit_code,
        )
    elif stood.branch is not None and (newest := lock.branch_commit(stood.id)) not in (None, stood.revision):
        because = f"{stood.branch} has moved on; the locked revision is the one that is run"
        yield Drift(name=f"model {stood.branch}", old=stood.revision, new=newest, severity=WARN, because=because)


def _of_loras(locked: Lock) -> Iterator[Drift]:
    """Yield the LoRAs that are not what they were: by their content, wherever they lie."""
    for lora in locked.request.loras:
        try:
            now, because = loras.digest(loras.located(lora.path)), "another LoRA draws another picture"
        except DgRunError as error:
            now, because = None, f"{error.what}: {error.why}"
        if now != lora.sha256:
            yield Drift(
                name=f"LoRA {lora.path}",
                old=lora.sha256[:12],
                new=None if now is None else now[:12],
                severity=REFUSE,
                because=because,
                exit_code=FileError.exit_code,
            )


def _planned(locked: Lock, known: Model, seen: Hardware, card: Gpu | None, told: Callable[[str], None] | None) -> Plan:
    """Return the plan of the locked list, in its own order and under its own name, estimated on what is here."""
    asked = locked.request
    steps = _known_steps(locked)
    found = api.resolve(
        **asked_for(locked, known),
        optimizers=steps,
        device="cpu" if card is None else None,
        gpu=name_of(card),
        vram=cap_bytes(locked, card),
        hardware=seen,
        told=told,
    )
    own = plan.digest(asked, locked.reference, steps)
    return dataclasses.replace(
        found, request=asked, profile=locked.reference, optimizers=steps, digest=own, locked=True
    )


def asked_for(locked: Lock, known: Model) -> dict[str, Any]:
    """Return the arguments of `resolve` that say what is run, and what is allowed of the host and the card."""
    asked = locked.request
    is_here = known.source in ("embedded", "directory")
    pinned = asked.model if is_here or known.revision is None else f"{asked.model}@{known.revision}"
    # What the call says itself was not said beside it.
    sizes = {n: None if theirs in asked.call else getattr(asked, n) for n, theirs in arguments.CALL_NAMES.items()}
    return {
        **sizes,
        "model": pinned,
        "batch": asked.batch,
        "call": asked.call,
        "components": asked.components,
        "loras": asked.loras,
        "pipeline_class": asked.pipeline_class,
        "host_ram": asked.host_ram_bytes,
        "headroom": None if locked.stands_on.gpu is None else asked.headroom_bytes,
        "prompts_known": asked.prompts_known,
    }


def name_of(card: Gpu | None) -> int | str | None:
    """Return what tells a card from the others that are here: instances of one card have its index."""
    return None if card is None else card.uuid or card.index


def cap_bytes(locked: Lock, card: Gpu | None) -> int | None:
    """Return the cap on a card's memory, where less is allowed than is free: more would be an imagined card."""
    cap = locked.request.vram_bytes
    if card is None or cap is None or (card.free_bytes is not None and cap > card.free_bytes):
        return None
    return cap


def _known_steps(locked: Lock) -> tuple[Step, ...]:
    """Return the locked list. Raises: IncompatibleError, where this version has other optimizers, or parameters."""
    try:
        steps = tuple(map(arguments.step, locked.optimizers))
    except UsageError as error:
        raise _foreign(locked, error.what) from None
    if steps != locked.optimizers:
        new = next(str(s) for s, was in zip(steps, locked.optimizers, strict=True) if s != was)
        raise _foreign(locked, f"an optimizer has other parameters now: {new}")
    return steps


def _foreign(locked: Lock, why: str) -> IncompatibleError:
    made = locked.stands_on.versions.get("dg-run")
    return IncompatibleError(
        f"the lock was written by dg-run {made}, and this version does not know all of it", why, "lock again"
    )


def _of_absence(locked: Lock, seen: Hardware, card: Gpu | None) -> Iterator[Drift]:
    """Yield that there is no card, where the lock is for one."""
    if locked.stands_on.gpu is not None and card is None:
        yield Drift(
            name="GPU",
            old=locked.stands_on.gpu.name,
            new=None,
            severity=REFUSE,
            because=seen.no_gpu_because or "no card is here",
            exit_code=HardwareError.exit_code,
        )


def _of_around(locked: Lock, seen: Hardware, card: Gpu | None, found: Plan | None) -> Iterator[Drift]:
    """Yield what differs and stops no run."""
    yield from _of_driver(locked, seen, card)
    yield from _of_versions(locked, found)
    yield from _of_profile(locked)
    if found is not None:
        yield from _of_digest(locked, found)


def _of_card(locked: Lock, card: Gpu | None, found: Plan) -> Iterator[Drift]:
    stood = locked.stands_on.gpu
    if stood is None or card is None:
        return
    # An estimate of the list on the card that is here has the last word.
    if found.fits is True:
        severity, because, code = WARN, "estimated again on what is here, it fits", None
    elif found.fits is False:
        severity, because, code = REFUSE, "estimated again on what is here, it does not fit", NothingFitsError.exit_code
    else:
        severity, because, code = REFUSE, "whether it fits here is not known", HardwareError.exit_code

    def fact(name: str, old: str | int | None, new: str | int | None) -> Drift:
        return Drift(name=name, old=old, new=new, severity=severity, because=because, exit_code=code)

    if not is_kind(card.name, stood.name):
        yield fact("GPU", stood.name, card.name)
    if stood.arch is not None and card.arch != stood.arch:
        yield fact("GPU architecture", stood.arch, card.arch)
    # Known cards are told in whole GiB, and show a little less.
    least = None if stood.total_bytes is None else stood.total_bytes * 97 // 100
    if least is not None and card.total_bytes is not None and card.total_bytes < least:
        yield fact("GPU memory bytes", stood.total_bytes, card.total_bytes)


def _of_memory(locked: Lock, found: Plan) -> Iterator[Drift]:
    """Yield what the run needs that is not free, and what it needs that it did not need before."""
    was, now = locked.estimate, found.estimate
    for name, before, again in (
        ("required bytes", was.required_bytes, now.required_bytes),
        ("host bytes", was.host_bytes, now.host_bytes),
    ):
        if before is not None and again is not None and before != again:
            because = "estimated again on what is here"
            yield Drift(name=name, old=before, new=again, severity=WARN, because=because)
    # Where nothing can be estimated here, what was estimated before stands.
    required = was.required_bytes if now.required_bytes is None else now.required_bytes
    if required is not None and found.budget_bytes is not None and found.headroom_bytes is not None:
        short = required - found.budget_bytes
        if short > 0:
            need, free = required + found.headroom_bytes, found.budget_bytes + found.headroom_bytes
            card = found.card
            free = card.free_bytes if card is not None and card.free_bytes is not None else free
            yield Drift(
                name="free VRAM bytes",
                old=need,
                new=free,
                severity=REFUSE,
                because=f"{short:,} bytes ({format_size(short)}) short of what the run needs and its headroom",
                exit_code=NothingFitsError.exit_code,
            )
    host = was.host_bytes if now.host_bytes is None else now.host_bytes
    ram = found.hardware.host.ram_bytes
    if host is not None and ram is not None and found.device is not None and host > ram:
        short = host - ram
        yield Drift(
            name="free host bytes",
            old=host,
            new=ram,
            severity=REFUSE,
            because=f"{short:,} bytes ({format_size(short)}) short of what the run needs",
            exit_code=NothingFitsError.exit_code,
        )


def _of_fit(found: Plan, others: Sequence[Drift]) -> Iterator[Drift]:
    """Yield that the list does not fit, where no other fact says so."""
    if found.fits is False and not any(d.severity == REFUSE for d in others):
        because = "; ".join(r.because for r in found.rejected) or "estimated again on what is here"
        yield Drift(
            name="fits",
            old="yes",
            new="no",
            severity=REFUSE,
            because=because,
            exit_code=NothingFitsError.exit_code,
        )


def _of_driver(locked: Lock, seen: Hardware, card: Gpu | None) -> Iterator[Drift]:
    if card is None or card.uuid is None:  # an imagined card has none
        return
    was, now = locked.stands_on.driver, None if seen.driver is None else seen.driver.version
    if was is not None and was != now:
        because = "a driver decides how fast kernels are, and what a context takes; no more"
        yield Drift(name="driver", old=was, new=now, severity=WARN, because=because)


def _of_versions(locked: Lock, found: Plan | None) -> Iterator[Drift]:
    here = versions.snapshot()
    for name, was in locked.stands_on.versions.items():
        now = here.get(name)
        if was != now:
            yield Drift(name=name, old=was, new=now, severity=WARN, because=_of_version(name, was, now, found))


def _of_version(name: str, was: str | None, now: str | None, found: Plan | None) -> str:
    if now is None:
        return "it is not installed here, and a run needs it"
    if name not in _TRACING:
        return "what is run stays as it was locked"
    if was is not None and _series(was) == _series(now):
        return "a patch: what is computed is the same"
    if found is not None and found.estimate.required_bytes is not None:
        return "another series may hold other memory: estimated again with what is here"
    return "another series may hold other memory, and it cannot be estimated here"


def _series(version: str) -> tuple[str, ...]:
    return tuple(version.partition("+")[0].split(".")[:2])


def _of_digest(locked: Lock, found: Plan) -> Iterator[Drift]:
    """Yield that this version digests the same plan to another value: it knows more arguments than the lock's had."""
    if found.digest != locked.plan_digest:
        because = "this version counts more arguments of a request; what is run is the same"
        yield Drift(
            name="plan digest", old=locked.plan_digest[:19], new=found.digest[:19], severity=WARN, because=because
        )


def _of_profile(locked: Lock) -> Iterator[Drift]:
    was = locked.profile
    if was is None:
        return
    now = lock.current_profile(was, locked.request.profile)
    name = f"profile {was.name}"
    because = "the lock has its own list, which is what is run"
    if now is None or now.name != was.name:
        yield Drift(name=name, old=was.version, new=None if now is None else now.name, severity=WARN, because=because)
    elif now.version != was.version:
        yield Drift(name=name, old=was.version, new=now.version, severity=WARN, because=because)
    elif was.content is not None and (content := lock.profile_content(now)) != was.content:
        because = f"it says something else under its old version {was.version}; {because}"
        yield Drift(name=f"{name} content", old=was.content[:19], new=content[:19], severity=WARN, because=because)
