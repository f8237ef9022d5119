"""What a large run of cases came to, kept as a small file: `truth/results/counted.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import optimizers
from engine.optimizers import placing
from engine.values import Step
from truth.cases import Case
from truth.compare import compared

PATH = Path(__file__).parent / "results" / "counted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is kept of one case: shares of what was executed; `differences` is empty where all is equal."""

    architecture: str
    placement: str
    error: float
    worst_phase_error: float
    differences: tuple[str, ...]
    id: str


def row(case: Case) -> Row:
    """Execute and predict a case, and return what is kept of it. Raises: as `executed`."""
    found = compared(case)
    return Row(
        architecture=found.case.architecture,
        placement=placement(found.case.steps),
        error=found.error,
        worst_phase_error=found.worst_phase_error,
        differences=found.differences,
        id=found.case.id,
    )


def placement(steps: Sequence[Step]) -> str:
    """Return the name of the placement among steps, groups told apart; "components apart" where there are several."""
    listed = placing.placements(steps)
    step = optimizers.placement(steps)
    if len(listed) > 1 or (listed and step is None):
        return "components apart"
    if step is None or step.name != "group_offload":
        return "resident" if step is None else step.name
    level = step.params["type"].removesuffix("_level")
    return f"group_offload, {level}{', streamed' if step.params['use_stream'] else ''}"


def summary(rows: Sequence[Row], staged: Sequence[Row], ran: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written: `ran` says how the cases were chosen, and with which versions.

    Runs in two stages are counted apart: their phases are not told apart alike.
    """

    def group(key: str) -> dict[str, Any]:
        names = sorted({getattr(r, key) for r in rows})
        return {n: _figures([r for r in rows if getattr(r, key) == n]) for n in names}

    return {
        **ran,
        "all": _figures(rows),
        "staged": _figures(staged),
        "by_architecture": group("architecture"),
        "by_placement": group("placement"),
        "different": [asdict(r) for r in sorted(rows, key=lambda r: (-abs(r.error), r.id)) if r.differences],
    }


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    sizes = [abs(r.error) for r in rows]
    return {
        "cases": len(rows),
        "equal": sum(not r.differences for r in rows),
        "median_error": statistics.median(sizes),
        "worst_error": max(sizes),
        "worst_phase_error": max(abs(r.worst_phase_error) for r in rows),
    }


def write(content: Mapping[str, Any]) -> None:
    """Write the file."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
