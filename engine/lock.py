"""A locked plan: a file that says what is run, exactly, and what that stood on. Values and files; no machine in here.

A lock holds what was asked for and chosen, and of the machine only what does not move from one minute to the next: so
that two locks of one request on one machine are the same, byte for byte. It names no card by UUID, and no host.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import documents, facts, paths, plain, profiles, validation
from engine import plan as plans
from engine.documents import Document, DocumentError
from engine.errors import FileError, IncompatibleError, NothingFitsError, ProfileError, UsageError
from engine.facts import hub
from engine.facts.model import Model
from engine.plan import Plan
from engine.values import FrozenDict, Hardware, Profile, ProfileRef, Request, Step

if TYPE_CHECKING:
    from engine.check import Check
    from engine.drift import Drift

SCHEMA = "dg-run/lock@1"
FAMILY = "dg-run/lock@"
FILE = "file"
_AGAIN = "lock again (`dg-run plan … --lock FILE`) instead of editing it; or take the file from where it came"
_HEAD = """\
# A locked plan of dg-run: what is run, exactly, and what that was found to fit.
# Run it:    dg-run --plan FILE --prompt "…"
# Check it:  dg-run plan --check FILE
# It is not edited: `digest` covers every value (not the comments). Lock again instead: dg-run plan … --lock FILE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedProfile:
    """The profile that was chosen. `source` is "built-in" or "file"; `content` is a digest of what it said."""

    name: str
    version: str
    source: str
    content: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What was predicted of the run and does not depend on what was free. None is not known."""

    required_bytes: int | None
    host_bytes: int | None
    seconds: float | None
    load_seconds: float | None
    quality: str | None
    basis: str | None
    calibrated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedCard:
    """The kind of card, never the one card."""

    name: str
    arch: str | None
    total_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedModel:
    """The model, its revision (None: not known then), the branch that was followed, its configurations' digest."""

    id: str
    revision: str | None
    branch: str | None
    configuration: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StandsOn:
    """What a plan was made on. Without a card `gpu` is None; of a card that was not there `driver` is None."""

    gpu: LockedCard | None
    driver: str | None
    host_total_ram_bytes: int | None
    versions: Mapping[str, str | None]
    model: LockedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A locked plan. `plan_digest` is the plan's own; `digest` covers everything else here."""

    schema: str = SCHEMA
    request: Request
    profile: LockedProfile | None
    optimizers: tuple[Step, ...]
    estimate: Predicted
    stands_on: StandsOn
    plan_digest: str
    digest: str

    def text(self, kind: str = "yaml") -> str:
        """Return the file's text, as "yaml" or "json", keys always in the same order."""
        content = _content(self)
        if kind == "json":
            return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return _HEAD + plain.yaml(content)

    @property
    def reference(self) -> ProfileRef | None:
        """The profile, as plans refer to theirs."""
        if (found := self.profile) is None:
            return None
        by_path = self.request.profile is not None and profiles.is_path(self.request.profile)
        source = self.request.profile if by_path and found.source == FILE else found.source
        return ProfileRef(name=found.name, version=found.version, source=source or found.source)

    # What needs a machine to hold the lock against.

    def drift(self, hardware: Hardware | None = None, told: Callable[[str], None] | None = None) -> tuple[Drift, ...]:
        """Return what differs between what the lock stands on and this machine (or `hardware`); () is nothing."""
        from engine import drift

        return drift.held(self, hardware, told).drift

    def plan(self, hardware: Hardware | None = None, told: Callable[[str], None] | None = None) -> Plan:
        """Return the locked plan on this machine (or `hardware`), ready to be loaded and run; drift is in its notes.

        Raises: NothingFitsError, HardwareError, ModelError, IncompatibleError: where the lock does not stand here.
        """
        from engine import drift

        return drift.plan_of(self, hardware, told)

    def check(self, hardware: Hardware | None = None, told: Callable[[str], None] | None = None) -> Check:
        """Return whether the lock still fits its card, and whether it would be planned so again.

        The card is the one here (or in `hardware`) of the lock's name, else an imagined one of that name.
        """
        from engine import check

        return check.check(self, hardware, told)


def of(plan: Plan) -> Lock:
    """Return the lock of a plan. Raises: NothingFitsError, IncompatibleError, ModelError, UsageError."""
    if plan.fits is False or not plan.optimizers:
        raise NothingFitsError(
            "a plan that does not fit is not locked",
            "; ".join(f"{r.profile}: {r.because}" for r in plan.rejected[:3]),
            "ask for less, or plan for another card",
        )
    if any(s.name == "dtype" and s.params["value"] == "auto" for s in plan.optimizers):
        raise IncompatibleError(
            "a plan that leaves its dtype open is not locked",
            "the card's compute capability is not known, so that not everything is decided",
            "plan for a card of the table (--gpu NAME), or on the card itself",
        )
    # The model by its name: what cannot be found again cannot be locked.
    known = facts.find(plan.request.model, plan.request.revision)
    taken, card, host = plan.estimate, plan.card, plan.hardware.host
    call = FrozenDict(_sorted(plan.request.call))
    driver = None if card is None or card.uuid is None else plan.hardware.driver
    made = Lock(
        request=dataclasses.replace(
            plan.request, gpu=None, call=call, components=FrozenDict(_sorted(plan.request.components))
        ),
        profile=None if plan.profile is None else _profile(plan.profile),
        optimizers=plan.optimizers,
        estimate=Predicted(**{f.name: getattr(taken, f.name) for f in dataclasses.fields(Predicted)}),
        stands_on=StandsOn(
            gpu=None if card is None else LockedCard(name=card.name, arch=card.arch, total_bytes=card.total_bytes),
            driver=None if driver is None else driver.version,
            host_total_ram_bytes=host.total_ram_bytes,
            versions=FrozenDict({n: plan.versions[n] for n in sorted(plan.versions)}),
            model=LockedModel(
                id=plan.request.model,
                revision=plan.request.revision,
                branch=_branch(plan.request),
                configuration=configuration(known),
            ),
        ),
        plan_digest=plan.digest,
        digest="",
    )
    try:
        return dataclasses.replace(made, digest=digest(_content(made)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            "the plan cannot be locked", f"an argument of the call is no plain value: {error}", "give plain values"
        ) from None


def digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a lock's content: of everything but the digest itself. Raises: ValueError."""
    rest = {k: v for k, v in content.items() if k != "digest"}
    return _sha256(rest)


def configuration(model: Model) -> str:
    """Return a digest of what a model's configuration files say, whether or not its weights are here."""
    parts = {n: {"library": c.library, "class": c.cls, "config": c.config} for n, c in model.components.items()}
    return _sha256({"pipeline": model.pipeline_class, "components": parts})


def profile_content(profile: Profile) -> str:
    """Return a digest of what a profile permits and applies: a profile that was edited without a new version shows."""
    said = {k: v for k, v in dataclasses.asdict(profile).items() if v and k not in _TOLD_OF_PROFILES}
    return _sha256(said)


# Where a profile lies, and what it says to its readers.
_TOLD_OF_PROFILES = ("source", "summary", "extends", "overridden")


def current_profile(locked: LockedProfile, asked: str | None) -> Profile | None:
    """Return the profile of this name as it is now, or None where there is none that can be read.

    `asked` is the name or the file that the request gave: of it and of what it falls back to, the one of this name.
    """
    try:
        chain = () if asked is None else profiles.chain(asked)
        return next((p for p in chain if p.name == locked.name), None) or profiles.find(locked.name)
    except ProfileError:
        return None


def _profile(reference: ProfileRef) -> LockedProfile:
    try:
        found = profiles.find(reference.source if profiles.is_path(reference.source) else reference.name)
    except ProfileError:  # a plan that was made elsewhere
        found = None
    is_it = found is not None and (found.name, found.version) == (reference.name, reference.version)
    return LockedProfile(
        name=reference.name,
        version=reference.version,
        source=profiles.BUILT_IN if reference.source == profiles.BUILT_IN else FILE,
        content=profile_content(found) if found is not None and is_it else None,
    )


def _branch(request: Request) -> str | None:
    """Return "main" where the model is at the commit that the cache has for it, so that a later one is noticed."""
    if request.revision is None or "/" not in request.model:
        return None
    return "main" if branch_commit(request.model) == request.revision else None


def branch_commit(name: str) -> str | None:
    """Return the commit that the cache has for a hub model's main branch."""
    followed = hub.cached_snapshot(name, paths.hub_cache_dir())
    return None if followed is None else followed.name


def _sha256(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _sorted(value: Any) -> Any:
    """Return a value with the keys of its mappings sorted: the order of flags says nothing."""
    if isinstance(value, Mapping):
        return {k: _sorted(value[k]) for k in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, list | tuple) else value


def _content(lock: Lock) -> dict[str, Any]:
    content = dataclasses.asdict(lock)
    del content["request"]["gpu"]  # which of several equal cards it was is no part of it
    if not lock.request.loras:  # as locks were written before there were LoRAs
        del content["request"]["loras"]
    return content


def parse(text: str, source: str, kind: str = "yaml") -> Lock:
    """Return the lock in a text. Raises: FileError, for one that is damaged, edited, or of another version."""
    try:
        document = documents.parse_json(text, source) if kind == "json" else documents.parse(text, source)
        _refuse_others(document)
        validation.check(document, "lock")
    except DocumentError as error:
        raise damaged(error) from None
    try:
        found = digest(document.value)
    except (ValueError, RecursionError):
        found = ""
    if found != document.value["digest"]:
        raise _edited(source, document.value["digest"], found)
    lock: Lock = plans.build(Lock, document.value)
    return lock


def damaged(error: DocumentError) -> FileError:
    """Return the error of a file that is no lock, or no longer one."""
    told = error.told(FileError, "this is not a valid lock")
    return FileError(told.what, told.why, told.do or _AGAIN)


def _edited(source: str, said: str, found: str) -> FileError:
    return FileError(
        f"{source}: the lock's digest does not match its content",
        f"it says {said[:19]}…, and its content is {found[:19] or 'none'}…: it was changed after it was made",
        _AGAIN,
    )


def _refuse_others(document: Document) -> None:
    """Refuse what is not a lock of this version, with a word on what it is instead."""
    said = document.value.get("schema") if isinstance(document.value, dict) else None
    if said == SCHEMA:
        return
    if isinstance(said, str) and said.startswith(FAMILY):
        why, do = (
            f"it is {said[:60]!r}, and this version reads {SCHEMA!r}",
            "use the dg-run that wrote it, or lock again",
        )
    elif said == plans.SCHEMA:
        why, do = "it is a plan as --json prints it", "a lock is written by `dg-run plan … --lock FILE`"
    else:
        why, do = f"its schema is not {SCHEMA!r}", "a lock is written by `dg-run plan … --lock FILE`"
    raise FileError(f"{document.source}: this is not a lock that can be read here", why, do)
