"""What a run takes of the host beside what its plan says, measured in a process of its own (`tests/host_memory.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.estimate.bounds import HOST_BASE_BYTES
from tests import host_memory

MIB = 1024**2
SLACK_BYTES = 32 * MIB
"""Beside the weights: what is computed of them meanwhile, and what Python and the allocator have not given back."""

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="what a process holds is read from Linux's /proc"
    ),
    pytest.mark.skipif(
        shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("host") / "model"
    host_memory.write_model(where)
    return where


def _measured(folder: Path, placement: str, dtype: str) -> dict[str, int]:
    # What is freed goes back at once, so that what is held can be told from what the C library keeps for later.
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.host_memory", str(folder), placement, dtype],
        env={**os.environ, **at_once},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


_SLOW = [
    pytest.param(placement, dtype, marks=pytest.mark.slow)
    for placement in host_memory.STEPS
    for dtype in ("bfloat16", "float32")
    if (placement, dtype) != ("resident", "float32")
]


@pytest.mark.parametrize(("placement", "dtype"), [("resident", "float32"), *_SLOW])
def test_a_run_never_holds_more_of_the_host_than_its_plan_says(folder: Path, placement: str, dtype: str) -> None:
    """In bfloat16 the weights stay pages of their files, unless they come back from the card; in float32 none do."""
    found = _measured(folder, placement, dtype)
    predicted = found["anonymous_bytes"] + found["pinned_bytes"]
    assert found["peak_bytes"] <= predicted
    own, grown = predicted - HOST_BASE_BYTES, found["peak_bytes"] - found["before_bytes"]
    assert grown <= own + SLACK_BYTES
    # And what is predicted is there: a plan that says twice as much would refuse what fits.
    assert grown >= 0.8 * own - SLACK_BYTES
