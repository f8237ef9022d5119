"""Measured runs beside their predictions, and plans beside each other: plain values for the report. No torch."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

from bench.gpu import predict
from bench.gpu.matrix import Case
from engine import facts, optimizers, versions
from engine.errors import DgRunError
from engine.estimate import workspaces
from engine.plan import Plan
from engine.values import Estimate, Phase

TOO_LOW = -0.03
"""A prediction that is lower than this share is one that a card may fail at."""
_QUALITIES = ("exact", "near", "lossy")


@dataclass(frozen=True, slots=True)
class Run:
    """One record, read."""

    record: dict[str, Any]
    case: Case
    plan: Plan | None

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def status(self) -> str:
        return str(self.record["status"])

    @property
    def is_measured(self) -> bool:
        return self.status == "measured"

    @property
    def measured(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["measured"]
        return found

    @property
    def estimate(self) -> Estimate:
        return Estimate() if self.plan is None else self.plan.estimate

    @property
    def context_bytes(self) -> int | None:
        """What the CUDA context is said to take on this card."""
        if self.capability is None:
            return None
        steps = () if self.plan is None else self.plan.optimizers
        return workspaces.context_bytes(self.capability, copies_aside=predict.copies_aside(steps))

    @property
    def capability(self) -> tuple[int, int] | None:
        """The card's compute capability."""
        arch = (self.record["machine"].get("gpu") or {}).get("arch")
        if arch is None:
            return None
        major, _, minor = arch.partition(".")
        return int(major), int(minor)

    @property
    def first_phases(self) -> list[dict[str, Any]]:
        """The phases of a fresh process's first call, and its loading: what predictions are of."""
        calls = self.measured.get("calls") or [{"phases": []}]
        return [*(self.measured.get("load") or []), *calls[0]["phases"]]

    def peak_bytes(self, kind: str) -> int | None:
        """Return the highest `allocated` or `reserved` bytes of the first call."""
        return max((int(p[f"{kind}_bytes"]) for p in self.first_phases), default=None)

    @property
    def nvml_bytes(self) -> int | None:
        """The most that NVML showed: of this process, or, where it names none, of the card beyond what others had."""
        own = [int(p["nvml_process_bytes"]) for p in self.first_phases if p["nvml_process_bytes"] is not None]
        if own:
            return max(own)
        of_card = [int(p["nvml_card_bytes"]) for p in self.first_phases if p["nvml_card_bytes"] is not None]
        before = (self.measured.get("before") or {}).get("card_bytes")
        return None if not of_card or before is None else max(of_card) - int(before)

    @property
    def held_bytes(self) -> int | None:
        """The most that the process was seen to hold on the card.

        NVML is looked at some fifty times a second, and what was held for less may have been missed: the reserved
        bytes' own peak, with the context that was seen at rest, is held as well.
        """
        seen, reserved, rest = self.nvml_bytes, self.peak_bytes("reserved"), self.measured.get("at_rest") or {}
        if seen is None or reserved is None or rest.get("process_bytes") is None:
            return seen
        return max(seen, reserved + int(rest["process_bytes"]) - int(rest["reserved_bytes"]))

    @property
    def host_bytes(self) -> int | None:
        """The most of the host's memory that the process had, less what the C library only keeps of what was freed."""
        host = self.measured.get("host") or {}
        if host.get("peak_bytes") is None:
            return None
        kept = 0 if host.get("trimmed_bytes") is None else int(host["anonymous_bytes"]) - int(host["trimmed_bytes"])
        return int(host["peak_bytes"]) - kept

    @property
    def device_bytes(self) -> int | None:
        """What a card would need for this run as it went: what it held, else the reserved bytes and a context."""
        reserved, context = self.peak_bytes("reserved"), self.context_bytes
        if self.held_bytes is not None:
            return self.held_bytes
        return None if reserved is None or context is None else reserved + context

    @property
    def seconds(self) -> float | None:
        """The seconds of the last call: the second, where there was time for it."""
        calls = self.measured.get("calls")
        return float(calls[-1]["seconds"]) if self.is_measured and calls else None

    @property
    def whole_seconds(self) -> float | None:
        """Seconds with the model's own number of steps: each further step takes what the middle one took."""
        if self.seconds is None or self.case.steps is None:
            return self.seconds
        usual, between = _usual_steps(self.case.model), self.measured["calls"][-1]["step_seconds"]
        if usual is None or not between:
            return self.seconds
        return self.seconds + (usual - self.case.steps) * float(statistics.median(between))

    @property
    def quality(self) -> str:
        if self.case.recipe is not None:
            from bench.gpu.recipes import RECIPES

            return RECIPES[self.case.recipe].quality
        steps = () if self.plan is None else self.plan.optimizers
        return max((optimizers.spec(s.name).quality for s in steps), key=_QUALITIES.index, default="exact")

    @property
    def how(self) -> str:
        """What was run, in words."""
        if self.case.recipe is not None:
            return f"recipe {self.case.recipe}"
        if self.plan is None or not self.plan.optimizers:
            return "nothing"
        named = "" if self.plan.profile is None else f"{self.plan.profile.name}: "
        return named + ", ".join(map(str, self.plan.optimizers))

    @property
    def what(self) -> tuple[str, ...]:
        """What is asked for: runs of one request can be compared."""
        case = self.case
        size = f"{case.width}x{case.height}" + (f"x{case.frames}" if case.frames else "")
        return (case.name or "", size, *([f"batch {case.batch}"] if case.batch > 1 else []))

    def fits(self, budget_bytes: int) -> bool:
        """Whether this run shows that what it ran fits a card of this size.

        It ran on an emulated one of this size or smaller, or took no more on a larger one.
        """
        if not self.is_measured:
            return False
        if self.case.budget_bytes is not None:
            return self.case.budget_bytes <= budget_bytes
        cap, context = self.record.get("cap_bytes"), self.context_bytes
        if cap is not None and context is not None:
            return bool(cap + context <= budget_bytes)
        return self.device_bytes is not None and self.device_bytes <= budget_bytes

    @property
    def is_counted(self) -> bool:
        """Whether a device counted the bytes of tensors, and no card was there."""
        return bool(self.record["machine"]["device"] != "cuda")

    @property
    def tensors(self) -> dict[str, int]:
        """The predicted peaks of tensors alone, by phase: what a device that counts bytes should see."""
        return self.record.get("tensors") or {}

    @property
    def tensor_bytes(self) -> int | None:
        """The highest of them, None where no device counted."""
        return max(self.tensors.values(), default=None)


def runs(records: Iterable[dict[str, Any]], *, anew: bool = False) -> list[Run]:
    """Return the records of runs, the last of each id. `anew` predicts exact lists with this dg-run."""
    last = {r["id"]: r for r in records}
    return [_run(r, anew) for r in last.values()]


def _run(record: dict[str, Any], anew: bool) -> Run:
    case = Case.of(record["case"])
    plan = None if record.get("plan") is None else Plan.from_json(json.dumps(record["plan"]), f"record {record['id']}")
    if anew and plan is not None and case.kind in ("exact", "required"):
        try:
            with _libraries_of(record):
                plan = predict.plan_of(case, plan.hardware)
        except DgRunError:
            plan = None
    return Run(record, case, plan)


@contextlib.contextmanager
def _libraries_of(record: dict[str, Any]) -> Iterator[None]:
    """Let workspaces be those of the versions of torch and cuDNN that a record was measured with."""
    used = record["machine"]["versions"]
    torch = tuple(int(n) for n in used["torch"].split(".")[:2])
    number = int(used["cudnn"]) if "cudnn" in used else None  # 91900 is 9.19.0
    cudnn = None if number is None else (number // 10_000, number // 100 % 100, number % 100)
    with mock.patch.object(versions, "torch", lambda: torch), mock.patch.object(versions, "cudnn", lambda: cudnn):
        yield


@cache
def _usual_steps(model: str | None) -> int | None:
    try:
        return facts.find(model).defaults.steps
    except DgRunError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One figure, predicted and measured."""

    name: str
    predicted: float
    measured: float
    low: float | None = None
    high: float | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def is_inside(self) -> bool | None:
        return None if self.low is None or self.high is None else self.low <= self.measured <= self.high


def _point(name: str, predicted: float | None, measured: float | None, *span: float | None) -> Point | None:
    if predicted is None or not measured:
        return None
    low, high = span or (None, None)
    return Point(name=name, predicted=predicted, measured=measured, low=low, high=high)


def points(found: Iterable[Run]) -> dict[str, list[Point]]:
    """Return the figures of exact runs by what they are of."""
    made: dict[str, list[Point]] = {}
    for run in found:
        if run.case.kind != "exact" or not run.is_measured:
            continue
        said, span = run.estimate, run.estimate.interval
        name = run.id.partition("/")[2]
        host = None if run.plan is None else predict.host_bytes(run.plan)
        for of, point in (
            ("tensors", _point(name, run.tensor_bytes, run.peak_bytes("allocated"))),
            (
                "allocated",
                _point(name, said.peak_allocated_bytes, run.peak_bytes("allocated"), span.low_bytes, span.high_bytes),
            ),
            ("reserved", _point(name, said.peak_reserved_bytes, run.peak_bytes("reserved"))),
            ("device", _point(name, said.device_bytes, run.held_bytes)),
            ("host", _point(name, host, run.host_bytes)),
            ("pinned", _point(name, said.host.pinned_bytes or None, run.measured["host"]["pinned_bytes"])),
            ("seconds", _point(name, said.seconds, run.seconds, span.low_seconds, span.high_seconds)),
        ):
            if point is not None and not (run.is_counted and of in ("allocated", "reserved", "device", "pinned")):
                made.setdefault(of, []).append(point)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How far predictions are off."""

    count: int
    equal: int
    median: float
    p95: float
    too_low: int
    inside: int
    judged: int


def summary(of: Sequence[Point]) -> Summary:
    """Return how far the predictions of some points are off. There is at least one."""
    sizes = sorted(abs(p.error) for p in of)
    judged = [p for p in of if p.is_inside is not None]
    return Summary(
        count=len(of),
        equal=sum(p.predicted == p.measured for p in of),
        median=statistics.median(sizes),
        p95=sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
        too_low=sum(p.error < TOO_LOW for p in of),
        inside=sum(bool(p.is_inside) for p in judged),
        judged=len(judged),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """One phase of one run. `predicted_bytes` is of tensors alone where tensors alone were counted."""

    run: str
    name: str
    predicted: Phase | None
    predicted_bytes: int | None
    measured_bytes: int
    first_s: float
    last_s: float | None


def phase_rows(found: Iterable[Run]) -> list[PhaseRow]:
    """Return the phases of exact runs: memory of the first call, seconds of the first and of the last."""
    rows = []
    for run in found:
        if run.case.kind != "exact" or not run.is_measured:
            continue
        said = {p.name: p for p in run.estimate.phases}
        last = {p["name"]: p["seconds"] for p in run.measured["calls"][-1]["phases"]}
        rows += [
            PhaseRow(
                run=run.id.partition("/")[2],
                name=p["name"],
                predicted=(phase := said.get(p["name"])),
                predicted_bytes=_said(run, phase, p["name"]),
                measured_bytes=p["allocated_bytes"],
                first_s=p["seconds"],
                last_s=last.get(p["name"]),
            )
            for p in run.first_phases
        ]
    return rows


def _said(run: Run, phase: Phase | None, name: str) -> int | None:
    if run.is_counted:
        return run.tensors.get(name)
    return None if phase is None else phase.peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of running on no more than is said to be required, and a margin."""

    margin: float
    tried: int
    full: tuple[str, ...]
    """Those that ran out of memory, loading or in the first call, which is what is predicted."""
    full_later: tuple[str, ...]
    """Those whose first call ran, and a later one did not: the allocator's cache lies otherwise by then."""
    died: tuple[str, ...]


def trials(found: Iterable[Run]) -> list[Trial]:
    """Return the trials by margin."""
    by: dict[float, list[Run]] = {}
    for run in found:
        if run.case.kind == "required" and run.case.margin is not None and run.status not in ("skipped", "refused"):
            by.setdefault(run.case.margin, []).append(run)
    return [
        Trial(
            margin=margin,
            tried=len(of),
            full=tuple(r.id for r in of if r.status == "oom" and not r.measured.get("calls")),
            full_later=tuple(r.id for r in of if r.status == "oom" and r.measured.get("calls")),
            died=tuple(r.id for r in of if r.status not in ("oom", "measured")),
        )
        for margin, of in sorted(by.items())
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What dg-run chose for a request on a card of some size, beside the fastest that was measured to fit there."""

    what: tuple[str, ...]
    budget_bytes: int
    chosen: Run
    best: Run | None

    @property
    def share(self) -> float | None:
        """How much longer the choice takes than the best; None where one of them has no time."""
        chosen, best = self.chosen.whole_seconds, None if self.best is None else self.best.whole_seconds
        return None if chosen is None or not best else chosen / best - 1


def regrets(found: Sequence[Run]) -> list[Regret]:
    """Return the regret of every choice that was asked for. Lossy runs stand aside."""
    ours = [r for r in found if r.case.kind in ("exact", "required", "chosen") and r.quality != "lossy"]
    made = []
    for chosen in (r for r in found if r.case.kind == "chosen" and r.status != "skipped"):
        assert chosen.case.budget_bytes is not None
        fitting = [r for r in ours if r.what == chosen.what and r.fits(chosen.case.budget_bytes)]
        best = min(fitting, key=lambda r: r.whole_seconds or float("inf"), default=None)
        made.append(Regret(what=chosen.what, budget_bytes=chosen.case.budget_bytes, chosen=chosen, best=best))
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """One request on a card of some size: dg-run's choice and each recipe."""

    what: tuple[str, ...]
    budget_bytes: int
    chosen: Run | None
    recipes: dict[str, Run]


def contests(found: Sequence[Run]) -> list[Contest]:
    """Return every request and size for which others' recipes were run."""
    by: dict[tuple[tuple[str, ...], int], dict[str, Run]] = {}
    for run in found:
        if run.case.kind in ("recipe", "chosen") and run.case.budget_bytes is not None:
            by.setdefault((run.what, run.case.budget_bytes), {})[run.case.recipe or ""] = run
    return [
        Contest(what=what, budget_bytes=budget, chosen=of.get(""), recipes={n: r for n, r in of.items() if n})
        for (what, budget), of in by.items()
        if set(of) - {""}
    ]
