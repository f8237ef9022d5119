"""The traces that are shipped: there for the whole catalogue, small, and not stale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import facts
from engine.estimate import store
from engine.facts import catalogue, embedded
from tools import ship_traces

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [embedded.ID, *catalogue.ids()])
def test_every_model_has_its_traces(name: str) -> None:
    model = facts.find(None if name == embedded.ID else name)
    asked = list(ship_traces.requests(model))
    assert len(asked) >= 2
    for request, dtype in asked:
        assert store.shipped_path(store.key(model, request, dtype)).is_file(), (request, dtype)


def test_they_are_small_and_none_is_left_over() -> None:
    files = list(ship_traces.FOLDER.glob("*.trace"))
    assert sum(f.stat().st_size for f in files) <= ship_traces.MOST_BYTES
    models = [facts.find(None), *(facts.find(name) for name in catalogue.ids())]
    wanted = {store.key(m, r, d) for m in models for r, d in ship_traces.requests(m)}
    assert {f.stem for f in files} == wanted


def test_the_embedded_models_are_what_is_traced_now() -> None:
    assert ship_traces.one(embedded.ID, is_check=True) == 0


def test_a_plan_for_a_shipped_size_starts_no_dry_run(tmp_path: Path) -> None:
    """And so neither torch nor a process of its own. (Where only other tiles could make it fit, those are dry-run.)"""
    code = (
        "import json, sys, engine; told = []; "
        "plan = engine.resolve('black-forest-labs/FLUX.1-dev', gpu='RTX 5090', host_ram='64GiB', told=told.append); "
        "print(json.dumps([plan.estimate.basis, plan.fits, told, 'torch' in sys.modules]))"
    )
    environment = {"DG_RUN_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert json.loads(done.stdout) == ["traced", True, [], False]
