"""What was executed and kept: on the counted device, and by torch's CUDA build without a card (truth/results/)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parents[2] / "truth" / "results"


def counted() -> dict[str, Any]:
    """Return the figures of the counted device, as `python -m truth --write` keeps them."""
    found: dict[str, Any] = json.loads((_RESULTS / "counted.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run on the phantom card, predicted and executed, or why there is nothing to compare."""

    kind: str
    name: str
    how: str
    card: str
    predicted_bytes: int = 0
    executed_bytes: int = 0
    predicted_reserved_bytes: int = 0
    executed_reserved_bytes: int = 0
    is_equal: bool = False
    because: str | None = None

    @property
    def error(self) -> float:
        """Of the allocated peak, as a share of what was executed."""
        return self.predicted_bytes / self.executed_bytes - 1

    @property
    def reserved_error(self) -> float:
        return self.predicted_reserved_bytes / self.executed_reserved_bytes - 1


def phantom() -> list[dict[str, Any]]:
    """Return the records of the phantom card, as `python -m truth.phantom --out` keeps them."""
    text = (_RESULTS / "phantom.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def cases(records: Sequence[dict[str, Any]]) -> list[Case]:
    """Return the runs of pipelines among records."""
    return [_case(r) for r in records if r["kind"] != "allocator"]


def _case(record: dict[str, Any]) -> Case:
    how = ", ".join([record["placement"], record["dtype"], *record["more"]])
    known = {"kind": record["kind"], "name": record["name"], "how": how, "card": record["card"]}
    if "error" in record:
        return Case(**known, because=record["error"])
    predicted, executed = record["predicted"], record["executed"]
    return Case(
        **known,
        predicted_bytes=max(predicted["allocated_bytes"].values()),
        executed_bytes=max(executed["allocated_bytes"].values()),
        predicted_reserved_bytes=predicted["reserved_bytes"],
        executed_reserved_bytes=executed["reserved_bytes"],
        is_equal=record["is_equal"],
    )


def figures(found: Sequence[Case]) -> str:
    """Return how many are equal, and how far the others are off."""
    if not found:
        return "none"
    errors = sorted(abs(c.error) for c in found)
    reserved = max(abs(c.reserved_error) for c in found)
    return (
        f"{sum(c.is_equal for c in found)} of {len(found)} equal to the byte, in every phase, allocated and reserved;"
        f" of the peak the median error is {statistics.median(errors):.3%} and the largest {errors[-1]:.3%},"
        f" of reserved bytes the largest {reserved:.3%}."
    )
