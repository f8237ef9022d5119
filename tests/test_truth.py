"""Predictions against the counted device, on which the libraries' own hooks run: bytes by phase, weights by name."""

from __future__ import annotations

import itertools
import os
import shutil

import pytest

from truth import cases, compare, many, pipelines, results
from truth.cases import Case
from truth.results import Row

SEED = 20  # any: `python -m truth` takes others, and more
PLACED = list(cases.every_placement())
RANDOM = list(itertools.islice(cases.random_cases(SEED), 200))
JOBS = os.cpu_count() or 1

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Give what every case came to, run in as many processes as there are cores."""
    listed = [*PLACED, *RANDOM]
    return {row.id: row for row in many.each(results.row, listed, JOBS)}


@pytest.mark.parametrize("case", PLACED, ids=lambda c: c.id)
def test_every_placement_of_every_architecture_holds_what_was_predicted(case: Case, rows: dict[str, Row]) -> None:
    """To the byte in every phase, and to the name at the start of each."""
    assert rows[case.id].differences == ()


def test_random_cases_hold_what_was_predicted(rows: dict[str, Row]) -> None:
    """Sizes, dtypes, casting, tiles, slices, fused projections, sliced attention, under any placement."""
    assert {c.architecture for c in RANDOM} == set(pipelines.ALL)
    assert [(c.id, d) for c in RANDOM if (d := rows[c.id].differences)] == []


def test_staged_encoding_holds_what_was_predicted() -> None:
    """Two stages, run by hand as a run makes them: the peak is equal, and the weights by name.

    What a pipeline prepares between its text and its first step (latents) belongs to `encode` in a trace, and to the
    second stage in a run: small pipelines show it in a phase that is not the peak.
    """
    found = list(many.each(compare.compared, list(cases.staged()), JOBS))
    assert {r.case.architecture for r in found} == set(pipelines.ALL)
    assert [(r.case.id, r.error) for r in found if r.error] == []
    assert [(r.case.id, r.differences) for r in found if abs(r.worst_phase_error) > 0.07] == []
    assert [d for r in found for d in r.differences if "bytes were predicted" not in d] == []


def test_a_run_fits_its_predicted_peak_and_does_not_fit_less() -> None:
    found = list(many.each(compare.bounded, RANDOM[:24], JOBS))
    assert [b.id for b in found if not b.with_room] == []
    assert [b.id for b in found if b.when_short] == []
