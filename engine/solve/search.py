"""The search: of all candidates that fit, the one of least cost.

Cost is seconds times the price of the quality. Candidates are taken in the order of the least they can cost, and the
search ends where that is more than what was found. What is not replayed is rejected by its bound, which is never more
than the replay's answer: so the choice is the one that brute force would make (`tests/test_solver.py`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine import compat, optimizers
from engine.errors import IncompatibleError
from engine.facts.model import Model
from engine.solve import candidates, judge, opened, reasons
from engine.solve.candidates import Candidate, Rules
from engine.solve.exact import is_known
from engine.solve.judge import Reason
from engine.solve.reasons import Short
from engine.solve.situation import QUALITIES, Decision, Situation
from engine.values import Estimate, Profile, Rejection, Slot
from engine.words import listing

if TYPE_CHECKING:
    from engine.estimate.bounds import Least

Key = tuple[float, ...]


def choose(situation: Situation, profiles: Sequence[Profile]) -> Decision:
    """Return the decision among `profiles`. Nothing suitable is a decision too: `fits` is false then.

    Raises: IncompatibleError, when what was required contradicts itself.
    """
    rules = Rules.under(situation)
    _refuse_contradiction(situation, rules)
    spaces: _Spaces | None = None
    rejected: list[Rejection] = []
    runs: dict[str, _Run] = {}
    for profile in profiles:
        reason = judge.match(profile, situation)
        if reason is not None:
            rejected.append(reason.of(profile))
            continue
        spaces = spaces or _Spaces(situation, rules)
        for candidate, ruled_out in spaces.of(profile):
            # What happened is asked anew each time: it depends on what is free, and rules do not.
            reason = ruled_out or (judge.remembered(candidate, situation) if situation.ran_out else None)
            if reason is not None:
                rejected.append(reason.of(profile))
            elif candidate.key in runs:
                runs[candidate.key].owners.append((profile, candidate))
            else:
                runs[candidate.key] = _Run([(profile, candidate)])
    found = _Search(situation, tuple(runs.values()))
    best = found.best()
    rejected += found.reasons(best)
    if best is None:
        return Decision(profile=None, steps=(), fits=False, estimate=Estimate(), rejected=tuple(rejected), notes=())
    taken = best.candidate
    return Decision(
        profile=best.profile,
        steps=taken.steps,
        fits=True if is_known(best.estimate, situation) else None,
        estimate=best.estimate,
        rejected=tuple(rejected),
        notes=(
            *reasons.changes(taken.own, taken.steps, situation.request),
            *reasons.notes(taken.findings, taken.steps),
        ),
        key=best.key or (),
    )


class _Spaces:
    """The candidates of profiles, judged: of two hundred profiles of a team, most are children with the same slots."""

    def __init__(self, situation: Situation, rules: Rules) -> None:
        self._situation = situation
        self._rules = rules
        self._known = _remembered(situation)

    def of(self, profile: Profile) -> Sequence[tuple[Candidate, Reason | None]]:
        """Return a profile's candidates, each with what rules it out before anything is estimated."""
        for slots, found in tuple(self._known):
            if slots == profile.slots:
                return found
        made = candidates.of_slots(profile.slots, self._situation, self._rules)
        judged = [(c, judge.candidate(c, self._situation)) for c in made]
        self._known.append((profile.slots, judged))
        return judged


_Judged = list[tuple[tuple[Slot, ...], list[tuple[Candidate, Reason | None]]]]
_KEPT = 16
_kept: dict[tuple[object, ...], tuple[Model, _Judged]] = {}


def _remembered(situation: Situation) -> _Judged:
    """Return what was judged in a situation like this one: all but free memory and time, which judge nothing here.

    A process that plans for one model after another finds it again; the last few are kept.
    """
    request, gpu = situation.request, situation.gpu
    sizes = situation.sizes(opened.dtypes(situation)[0])
    asked = (
        id(situation.model),  # which is kept beside it, so that nothing else can have its place
        situation.device,
        None if gpu is None else gpu.compute_capability,
        situation.platform,
        situation.gpus,
        tuple(sizes.items()),
        *(request.prompts_known, request.batch, request.height, request.width, request.quality),
        tuple(map(str, request.require)),
        request.forbid,
    )
    found = _kept.get(asked)
    if found is None:
        found = _kept[asked] = situation.model, []
        for oldest in list(_kept)[:-_KEPT]:
            _kept.pop(oldest, None)
    return found[1]


def _refuse_contradiction(situation: Situation, rules: Rules) -> None:
    request = situation.request
    both = [s.name for s in request.require if s.name in request.forbid]
    if both:
        raise IncompatibleError(
            f"{listing(both)} cannot be required and forbidden", "both were asked for", "drop one of the two"
        )
    if not request.require:
        return
    # What the model itself needs (no subjects) may be in the profiles.
    broken = [f for f in rules.of(optimizers.in_order(request.require)).findings if f.breaks and f.subjects]
    if broken:
        raise compat.refusal(broken)


@dataclass(slots=True)
class _Run:
    """One kind of run, and the candidates that come to it."""

    owners: list[tuple[Profile, Candidate]]
    least: Least | None = None
    least_key: Key = ()
    estimate: Estimate = field(default=Estimate())
    is_estimated: bool = False
    is_timed: bool = False
    """Whether `least` has the seconds that it takes, and not only a bound of them."""
    short: Short | None = None
    key: Key | None = None
    profile: Profile = field(init=False)
    """The profile that is named for it: the one that asks for the most."""
    candidate: Candidate = field(init=False)

    def name_owner(self) -> None:
        self.profile, self.candidate = max(self.owners, key=lambda owner: _rank(owner[0]))

    @property
    def seconds(self) -> float | None:
        """What it takes, or takes at the least."""
        if self.is_estimated:
            return self.estimate.seconds
        return None if self.least is None or self.least.seconds is None else round(self.least.seconds, 3)

    @property
    def is_unknown(self) -> bool:
        return self.is_estimated and self.estimate.required_bytes is None


def _rank(profile: Profile) -> tuple[int, int]:
    return profile.match.pixels_at_least or 0, profile.match.free_vram_at_least_bytes or 0


class _Search:
    """Finds the best of some runs, and remembers why the others are not."""

    def __init__(self, situation: Situation, runs: tuple[_Run, ...]) -> None:
        self.situation = situation
        self.runs = runs
        self.is_timed = True

    def best(self) -> _Run | None:
        """Return the run of least cost among those that fit; by `match` alone where nothing can be estimated."""
        for run in self.runs:
            run.name_owner()
            run.least = self.situation.least(run.candidate.acting)
        bounds = [r.least for r in self.runs if r.least is not None]
        self.is_timed = not bounds or all(b.seconds is not None for b in bounds)
        for run in self.runs:
            run.least_key = self._least_key(run)
        best: _Run | None = None
        queue = [(run.least_key, i, run) for i, run in enumerate(self.runs)]
        heapq.heapify(queue)
        while queue:
            least_key, i, run = heapq.heappop(queue)
            if best is not None and best.key is not None and least_key > best.key:
                break
            if run.least is not None:
                run.short = reasons.of_least(run.least, self.situation)
                if run.short is not None:
                    continue
                if self._is_put_off(run):
                    heapq.heappush(queue, (run.least_key, i, run))
                    continue
            self._estimate(run)
            if run.short is None and run.key is not None and (best is None or run.key < (best.key or ())):
                best = run
        return best if best is not None else self._by_match()

    def _is_put_off(self, run: _Run) -> bool:
        """Look closer at how long a run takes, once; whether it costs more than was thought, and others come first."""
        if run.is_timed or run.least is None:
            return False
        run.is_timed = True
        seconds = self.situation.timed(run.candidate.acting)
        if seconds is None or run.least.seconds is None:
            return False
        run.least = dataclasses.replace(run.least, seconds=max(seconds, run.least.seconds))
        before, run.least_key = run.least_key, self._least_key(run)
        return run.least_key > before

    def _estimate(self, run: _Run) -> None:
        run.estimate = self.situation.estimate(run.candidate.acting)
        run.is_estimated = True
        if run.estimate.required_bytes is None:
            return
        run.short = reasons.of_estimate(run.estimate, self.situation)
        run.key = self._key(run)

    def _by_match(self) -> _Run | None:
        """Return what is taken where nothing is known: the profile that asks for the most, as it comes first."""
        firsts: dict[str, tuple[Profile, Candidate, _Run]] = {}
        for run in self.runs:
            for profile, candidate in run.owners if run.is_unknown else ():
                first = firsts.get(profile.name)
                if first is None or candidate.order < first[1].order:
                    firsts[profile.name] = profile, candidate, run
        if not firsts:
            return None
        profile, candidate, run = max(firsts.values(), key=lambda first: _rank(first[0]))
        run.profile, run.candidate = profile, candidate
        return run

    def _key(self, run: _Run) -> Key:
        """Return what runs are ordered by: the least is the best."""
        taken, candidate = run.estimate, run.candidate
        cost = self._cost(taken.seconds, run)
        return self._ordered(candidate.quality, cost, taken.required_bytes or 0, len(candidate.acting))

    def _least_key(self, run: _Run) -> Key:
        if run.least is None:
            return ()
        return self._ordered(run.candidate.quality, self._cost(run.least.seconds, run), run.least.required_bytes, 0)

    def _cost(self, seconds: float | None, run: _Run) -> float:
        """Return seconds times price, to the hundredth: within it quality and room decide.

        On a card without rates the bytes that cross the bus stand for seconds.
        """
        if self.is_timed:
            return math.inf if seconds is None else round(seconds * run.candidate.price, 2)
        return (run.least.copied_bytes if run.least is not None else 0) * run.candidate.price

    def _ordered(self, quality: str, cost: float, required_bytes: int, count: int) -> Key:
        rank = QUALITIES.index(quality)
        match self.situation.request.prefer:
            case "quality":
                return rank, cost, required_bytes, count
            case "vram":
                return required_bytes, cost, rank, count
        return cost, rank, required_bytes, count

    def reasons(self, best: _Run | None) -> Iterable[Rejection]:
        """Yield why each other candidate was not taken."""
        for run in self.runs:
            reason = self._reason(run, best)
            for profile, _ in run.owners:
                if run is not best or profile is not best.profile:
                    yield reason.of(profile)

    def _reason(self, run: _Run, best: _Run | None) -> Reason:
        steps, seconds = run.candidate.acting, run.seconds
        if (short := run.short) is not None:
            return Reason(steps, short.rule, short.because, short.remedy, short.bytes, seconds)
        remedy = "--profile with this profile's name takes it all the same"
        if best is None or (run.is_unknown and best.key is not None):
            return Reason(steps, "estimate.unknown", "what it takes could not be estimated", remedy)
        if run is best:
            because = f"it comes to the same run as {best.profile.name}"
            return Reason(steps, "same", because, remedy, seconds=seconds)
        return Reason(steps, "preferred", self._passed_over(run, best), remedy, seconds=seconds)

    def _passed_over(self, run: _Run, best: _Run) -> str:
        if best.key is None:
            if _rank(best.profile)[0] > _rank(run.profile)[0]:
                return f"{best.profile.name} is made for pictures of this size"
            if run.profile is best.profile:
                return "what its profile names first is taken, where nothing can be estimated"
            return f"{best.profile.name} asks for more free VRAM, and it is there"
        seconds, quality = run.seconds, run.candidate.quality
        prefer = self.situation.request.prefer
        if prefer == "vram" and run.least_key and run.least_key[0] > best.key[0]:
            return "it needs more of the card, and the least was asked for"
        if prefer == "quality" and QUALITIES.index(quality) > QUALITIES.index(best.candidate.quality):
            return f"it is {quality}, and the choice is {best.candidate.quality}, which was asked for"
        if seconds is None or best.estimate.seconds is None:
            return "more would have to be copied to the card"
        cost = run.candidate.price, best.candidate.price
        if round(seconds * cost[0], 2) <= best.key[0 if prefer == "speed" else 1]:
            return "it fits, and the choice is as fast, and no worse"
        takes = "it fits, and takes" if run.is_estimated else "it takes" if run.is_timed else "it takes at least"
        return reasons.slower(seconds, quality, cost[0], best.estimate, cost[1], takes=takes)


def better(decisions: Sequence[Decision]) -> int:
    """Return the index of the best of several decisions, each for another card: what fits, at the least cost.

    Of equal ones the first is taken: the card with the most room.
    """

    def order(index: int) -> tuple[int, Key, int]:
        decision = decisions[index]
        known = {True: 0, None: 1, False: 2}[decision.fits]
        return known, decision.key[:2], index

    return min(range(len(decisions)), key=order)


def named(situation: Situation, chain: Sequence[Profile]) -> Decision:
    """Return the decision for a profile that was asked for by name: where it cannot fit, its fallbacks in turn.

    What each prefers counts, unless the request says otherwise.
    """
    rejected: tuple[Rejection, ...] = ()
    decision = choose(situation, chain[:1])
    for profile in chain[1:]:
        if decision.profile is not None:
            break
        rejected += decision.rejected
        decision = choose(situation, [profile])
    return dataclasses.replace(decision, rejected=rejected + decision.rejected)
