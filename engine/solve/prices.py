"""What a second counts, by quality: `schema/prices.yaml`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from engine import documents, optimizers, paths
from engine.solve.situation import QUALITIES
from engine.values import Step


@cache
def prices() -> dict[str, float]:
    """Return the price of a second by quality: no less for what is further from the plain picture."""
    content = documents.read(paths.data_dir("schema") / "prices.yaml").value
    found = {quality: float(content["prices"][quality]) for quality in QUALITIES}
    assert list(found.values()) == sorted(found.values()), "a price falls with the quality"
    return found


def price(steps: Iterable[Step]) -> float:
    """Return what a second of a run under these steps counts: each step that is not exact asks its own price."""
    found = 1.0
    for step in steps:
        found *= prices()[optimizers.spec(step.name).quality]
    return found
