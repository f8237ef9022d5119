"""What a second counts, by quality: `schema/prices.yaml`."""

from __future__ import annotations

from functools import cache

from engine import documents, paths
from engine.solve.situation import QUALITIES


@cache
def prices() -> dict[str, float]:
    """Return the price of a second by quality: no less for what is further from the plain picture."""
    content = documents.read(paths.data_dir("schema") / "prices.yaml").value
    found = {quality: float(content["prices"][quality]) for quality in QUALITIES}
    assert list(found.values()) == sorted(found.values()), "a price falls with the quality"
    return found
