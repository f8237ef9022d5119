"""Scenarios: a machine and a request in, and what is expected of the plan. Our own tests and a team's are read here.

The format is `schema/scenario.schema.json`, told in docs/teams.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import api, documents, validation
from engine.documents import Document, DocumentError, Problem
from engine.errors import DgRunError, FileError
from engine.plan import Plan
from engine.units import GIB, format_seconds, format_size, parse_size
from engine.values import Gpu, Hardware, Host
from engine.words import listing

_HOST_RAM_BYTES = 32 * GIB
_TOTAL_BYTES = 24 * GIB
_OF_A_CARD = ("total_vram", "arch", "driver_model", "unified_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario as read from its file."""

    source: str
    why: str
    hardware: Hardware
    request: Mapping[str, Any]
    """Arguments of `engine.resolve`."""
    expect: Mapping[str, Any]
    rejected: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a scenario; `differences` is empty where everything is as expected."""

    scenario: Scenario
    plan: Plan | None
    error: DgRunError | None
    differences: tuple[str, ...]


def load(path: Path) -> Scenario:
    """Return the scenario in a file. Raises: FileError, with file, line and column of every problem."""
    try:
        document = documents.read(path)
        validation.check_once(document, "scenario")
        return _scenario(document)
    except DocumentError as error:
        raise error.told(FileError, "this is not a valid scenario") from None
    except OSError as error:
        raise FileError(f"{path}: the scenario cannot be read", str(error.strerror or error)) from None


def run(scenario: Scenario) -> Outcome:
    """Return what comes of a scenario here: with the profiles that are visible, and what is known of its model."""
    try:
        plan = api.resolve(hardware=scenario.hardware, **scenario.request)
    except DgRunError as error:
        return Outcome(scenario=scenario, plan=None, error=error, differences=tuple(_of_error(scenario, error)))
    return Outcome(scenario=scenario, plan=plan, error=None, differences=tuple(_differences(scenario, plan)))


def _scenario(document: Document) -> Scenario:
    value = document.value
    sizes = _Sizes(document)
    hardware, named = _hardware(document, value["hardware"], sizes)
    expect = {k: sizes.read(("expect", k), v) if k in _SIZES else v for k, v in value["expect"].items()}
    if sizes.problems:
        raise DocumentError(document.source, document.text, sizes.problems)
    return Scenario(
        source=document.source,
        why=value["why"],
        hardware=hardware,
        request={**value.get("request", {}), **named},
        expect=expect,
        rejected=value.get("rejected", {}),
    )


class _Sizes:
    """Reads sizes, and keeps what is wrong with them for one error."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def read(self, path: tuple[str, ...], text: str | None) -> int | None:
        try:
            return None if text is None else parse_size(text)
        except ValueError as error:
            self.problems.append(Problem(self.document.place(path), str(error)))
            return None


def _hardware(document: Document, told: Mapping[str, Any], sizes: _Sizes) -> tuple[Hardware, dict[str, Any]]:
    """Return the machine, and what of the request names its card.

    A card by name is that of `dg-run plan --gpu NAME --vram SIZE`; any other is described here.
    """
    read = {
        k: sizes.read(("hardware", k), told[k]) for k in ("free_vram", "total_vram", "host_ram") if told.get(k, None)
    }
    ram = None if told.get("host_ram", "") is None else read.get("host_ram", _HOST_RAM_BYTES)
    host = Host(
        ram_bytes=ram, total_ram_bytes=None if ram is None else 2 * ram, cores=8, platform=told.get("platform", "linux")
    )
    stray = [k for k in _OF_A_CARD if k in told and ("gpu" in told or "free_vram" not in told)]
    sizes.problems += [
        Problem(
            document.place(("hardware", k), key=True),
            f"{k} describes a card without a name" + ("" if "gpu" in told else ", and there is none"),
            "leave it out, or give free_vram and no gpu",
        )
        for k in stray
    ]
    if "gpu" in told and told.get("free_vram", "") is None:
        place = document.place(("hardware", "free_vram"))
        sizes.problems.append(Problem(place, "a known card's free_vram is a size", "leave it out: then all is free"))
    if "gpu" in told or "free_vram" not in told:
        named = {"gpu": told.get("gpu"), "vram": read.get("free_vram")}
        return Hardware(gpus=(), host=host, no_gpu_because="the scenario has no accelerator"), {
            k: v for k, v in named.items() if v is not None
        }
    free = read.get("free_vram")
    card = Gpu(
        index=0,
        name="Test Card",
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        arch=told.get("arch", "8.9"),
        total_bytes=read.get("total_vram") or max(_TOTAL_BYTES, free or 0),
        free_bytes=free,
        driver_model=told.get("driver_model"),
        unified_memory=told.get("unified_memory", False),
    )
    return Hardware(gpus=(card,), host=host), {}


def _of_error(scenario: Scenario, error: DgRunError) -> Iterator[str]:
    said = str(error)
    wanted = scenario.expect.get("error")
    if wanted is None:
        yield f"it is refused: {said}"
    elif wanted not in said:
        yield f"error: {wanted!r} is expected, and it says: {said}"


def _differences(scenario: Scenario, plan: Plan) -> Iterator[str]:
    for key, wanted in scenario.expect.items():
        if (difference := _LOOKED_AT[key](wanted, plan)) is not None:
            yield f"{key}: {difference}"
    for profile, rule in scenario.rejected.items():
        found = sorted({r.rule for r in plan.rejected if r.profile == profile})
        if rule not in found:
            yield f"rejected: {profile} for {rule} is expected, and it is {listing(found) or 'not rejected'}"


def _unlike(wanted: Any, found: Any) -> str | None:
    return None if wanted == found else f"{_shown(wanted)} is expected, and it is {_shown(found)}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _profile(wanted: Any, plan: Plan) -> str | None:
    found = plan.profile and plan.profile.name
    return None if isinstance(wanted, list) and found in wanted else _unlike(wanted, found)


def _steps(plan: Plan) -> list[str]:
    return [str(s) for s in plan.optimizers]


def _contains(wanted: list[str], plan: Plan) -> str | None:
    missing = [w for w in wanted if w not in (*_steps(plan), *(s.name for s in plan.optimizers))]
    return f"{listing(missing)} is not in {_shown(_steps(plan))}" if missing else None


def _absent(wanted: list[str], plan: Plan) -> str | None:
    there = [w for w in wanted if w in (*_steps(plan), *(s.name for s in plan.optimizers))]
    return f"{listing(there)} is in {_shown(_steps(plan))}" if there else None


def _at_most(wanted: float, found: float | None, say: Callable[[Any], str]) -> str | None:
    if found is None:
        return f"at most {say(wanted)} is expected, and what it takes is not known"
    over = found - wanted
    return f"at most {say(wanted)} is expected, and it takes {say(found)}: {say(over)} more" if over > 0 else None


def _notes(wanted: list[str], plan: Plan) -> str | None:
    missing = [w for w in wanted if not any(w == n.kind or w in n.because for n in plan.notes)]
    said = [f"{n.kind}: {n.because}" for n in plan.notes]
    return f"{listing(map(repr, missing))} is not among {_shown(said)}" if missing else None


_SIZES = ("required_at_most", "host_at_most")
_LOOKED_AT: Mapping[str, Callable[[Any, Plan], str | None]] = {
    "profile": _profile,
    "fits": lambda wanted, plan: _unlike(wanted, plan.fits),
    "optimizers": lambda wanted, plan: _unlike(wanted, _steps(plan)),
    "contains": _contains,
    "absent": _absent,
    "required_at_most": lambda wanted, plan: _at_most(wanted, plan.estimate.required_bytes, format_size),
    "host_at_most": lambda wanted, plan: _at_most(wanted, plan.estimate.host_bytes, format_size),
    "seconds_at_most": lambda wanted, plan: _at_most(wanted, plan.estimate.seconds, format_seconds),
    "quality": lambda wanted, plan: _unlike(wanted, plan.estimate.quality),
    "notes": _notes,
    "error": lambda wanted, plan: f"{wanted!r} is expected, and the request is answered",
}
