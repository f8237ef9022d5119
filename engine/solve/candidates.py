"""The candidates of a profile: one list of steps for each way through its alternatives and its open parameters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine import compat, optimizers
from engine.errors import IncompatibleError
from engine.solve import opened
from engine.solve.prices import price
from engine.solve.situation import QUALITIES, Situation
from engine.values import Alternative, FrozenDict, Request, Slot, Step

MAX_OF_A_PROFILE = 20_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One list of steps, as a profile's slots give it and as it acts here."""

    steps: tuple[Step, ...]
    own: tuple[Step, ...]
    """The profile's list, before the request had its way with it."""
    findings: tuple[compat.Finding, ...]
    acting: tuple[Step, ...]
    """The steps that do something here: what is estimated."""
    key: str
    """The acting steps as text: candidates of one key are the same run."""
    order: int
    """Its place among those of its slots, which name first what they would rather do."""
    quality: str
    price: float
    """What a second of it counts."""


def of_slots(listed: Sequence[Slot], situation: Situation, rules: Rules) -> tuple[Candidate, ...]:
    """Return the candidates of a profile's slots, each kind of run once.

    Raises: IncompatibleError, when there are too many.
    """
    slots = [
        [steps for alternative in slot.alternatives for steps in _alternatives(alternative, situation)]
        for slot in listed
    ]
    count = 1
    for several in slots:
        count *= len(several)
    if count > MAX_OF_A_PROFILE:
        raise IncompatibleError(
            f"a profile has {count:,} combinations here: {', '.join(map(str, listed))[:200]}",
            f"at most {MAX_OF_A_PROFILE:,} are tried",
            "leave some alternatives or some `auto` out",
        )
    is_free = not situation.request.require and not situation.request.forbid
    found: dict[str, Candidate] = {}
    for chosen in itertools.product(*slots):
        own = tuple(step for steps in chosen for step in steps)
        steps = own if is_free else constrained(own, situation.request)
        judged = rules.of(steps)
        if _is_spare(steps, situation, rules):
            continue
        same = found.get(judged.key)
        if same is None or len(steps) < len(same.steps):
            # Of lists that come to the same run, the one with the fewest steps that do nothing.
            order = len(found) if same is None else same.order
            found[judged.key] = Candidate(
                steps,
                own,
                judged.findings,
                judged.acting,
                judged.key,
                order,
                _quality(judged.acting),
                price(judged.acting),
            )
    return tuple(found.values())


def _is_spare(steps: Sequence[Step], situation: Situation, rules: Rules) -> bool:
    """Whether a list computes in a dtype that is only for where the usual one does not run, and that runs here."""
    usual, *spare = opened.dtypes(situation)
    at = next((i for i, s in enumerate(steps) if s.name == "dtype" and s.params["value"] in spare), None)
    if at is None or any(s.name == "dtype" for s in situation.request.require):
        return False
    plain = dataclasses.replace(steps[at], params=FrozenDict(value=usual))
    return not any(f.breaks for f in rules.of((*steps[:at], plain, *steps[at + 1 :])).findings)


def _quality(steps: Sequence[Step]) -> str:
    return max((optimizers.spec(s.name).quality for s in steps), key=QUALITIES.index, default="exact")


def _alternatives(alternative: Alternative, situation: Situation) -> Iterator[tuple[Step, ...]]:
    """Yield an alternative's steps, once for each choice of what is open in them."""
    yield from itertools.product(*(opened.values(step, situation) for step in alternative))


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules say of a list of steps, and which of them act."""

    findings: tuple[compat.Finding, ...]
    acting: tuple[Step, ...]
    key: str


_KEPT = 16
_kept: dict[tuple[object, ...], Rules] = {}


class Rules:
    """The rules that can speak in one situation; what they said of a list is remembered."""

    def __init__(self, facts: compat.Facts) -> None:
        self.facts = facts
        self._rules = compat.under(facts)
        self._said: dict[str, Judged] = {}

    @classmethod
    def under(cls, situation: Situation) -> Rules:
        """Return the rules of a situation: the same as before, where nothing that they ask for has changed.

        Which rules can speak takes as long to find out as all the rest of a warm decision. The last few are kept.
        """
        facts = _facts(situation)
        # What has no hash is meant itself: its rules keep it, so that nothing else can have its place.
        asked = id(facts.model), id(facts.libraries), *(getattr(facts, n) for n in _ASKED)
        found = _kept.get(asked)
        if found is None:
            found = _kept[asked] = cls(facts)
            for oldest in list(_kept)[:-_KEPT]:
                _kept.pop(oldest, None)
        return found

    def of(self, steps: Sequence[Step]) -> Judged:
        """Return what the rules say of these steps."""
        asked = "; ".join(map(str, steps))
        found = self._said.get(asked)
        if found is None:
            found = self._said[asked] = self._judged(tuple(steps), asked)
        return found

    def _judged(self, steps: tuple[Step, ...], asked: str) -> Judged:
        findings = self._rules.findings(steps)
        idle = {n for f in findings if f.is_idle for n in f.subjects}
        acting = tuple(s for s in steps if s.name not in idle or optimizers.spec(s.name).is_placement)
        return Judged(findings, acting, asked if acting == steps else "; ".join(map(str, acting)))


_ASKED = tuple(f.name for f in dataclasses.fields(compat.Facts) if f.name not in ("model", "libraries"))


def _facts(situation: Situation) -> compat.Facts:
    request, gpu = situation.request, situation.gpu
    return compat.Facts(
        device=situation.device,
        compute_capability=None if gpu is None else gpu.compute_capability,
        platform=situation.platform,
        gpus=situation.gpus,
        # Who lists staged_encoding has the prompts; only a choice must not assume them.
        prompts_known=request.prompts_known or request.exact,
        batch=request.batch,
        height=request.height,
        width=request.width,
        model=situation.model,
        libraries=compat.installed(),
    )


def constrained(steps: Sequence[Step], request: Request) -> tuple[Step, ...]:
    """Return a list with what the user requires put in, and what the user forbids taken out.

    A required placement takes the place of the list's own. A forbidden placement stays, and the list is rejected:
    where the weights go instead is not for us to invent.
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
