"""docs/accuracy.md: what it says is what the repository's results and today's predictions say."""

from __future__ import annotations

from typing import Any

import pytest

from bench.accuracy import executed, page, published
from engine.estimate.whole import MARGIN


@pytest.fixture(scope="module")
def points() -> tuple[list[published.Point], list[published.Point]]:
    return published.peaks(), published.seconds()


def test_the_page_is_what_would_be_written(points: Any) -> None:
    """`python -m bench.accuracy --write` makes it anew."""
    assert page.PATH.read_text(encoding="utf-8") == page.made(*points)


def test_what_was_executed_lies_in_its_interval_nineteen_times_in_twenty(points: Any) -> None:
    """Published points are too few to show that, and are held to no more than they are said to do on the page."""
    ran = [c for c in executed.cases(executed.phantom()) if c.because is None]
    counted = executed.counted()
    assert len(ran) >= 60
    assert sum(abs(c.error) <= MARGIN for c in ran) >= 0.95 * len(ran)
    assert sum(abs(r["error"]) > MARGIN for r in counted["different"]) <= 0.05 * counted["all"]["cases"]
    _, seconds = points
    assert sum(p.is_inside for p in seconds) >= 0.95 * len(seconds)


def test_every_point_that_is_far_off_is_explained(points: Any) -> None:
    far = {p.id for p in points[0] if abs(p.error) > 0.02 or not (p.low is None or p.is_inside)}
    assert far <= set(published.explanations())


def test_a_difference_shows() -> None:
    record = {
        "kind": "catalogue",
        "name": "a",
        "placement": "resident",
        "dtype": "bfloat16",
        "more": [],
        "card": "A100",
        "predicted": {"allocated_bytes": {"load": 50, "denoise": 110}, "reserved_bytes": 240},
        "executed": {"allocated_bytes": {"load": 50, "denoise": 100}, "reserved_bytes": 200},
        "is_equal": False,
    }
    (case,) = executed.cases([record, {"kind": "allocator"}])
    assert case.error == pytest.approx(0.1)
    assert case.reserved_error == pytest.approx(0.2)
    assert executed.figures([case]).startswith("0 of 1 equal")
