"""A size that cannot be traced here lies between two that were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine
from engine.estimate import store
from engine.plan import Plan

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "can_trace", lambda: False)


def plan(side: int, placement: str = "resident") -> Plan:
    listed: list[Any] = [{"name": "dtype", "params": {"value": "bfloat16"}}, placement]
    return engine.resolve(FLUX, height=side, width=side, optimizers=listed, gpu="H100 SXM", host_ram="128GiB")


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("placement", ["resident", "model_offload"])
def test_what_lies_between_is_between_and_says_so(placement: str) -> None:
    low, between, high = (plan(side, placement) for side in (512, 768, 1024))
    assert (low.estimate.basis, between.estimate.basis, high.estimate.basis) == ("traced", "interpolated", "traced")
    assert between.fits is True
    assert "between two sizes that were traced" in between.explain()
    for name in ("peak_allocated_bytes", "required_bytes", "seconds", "host_bytes"):
        assert getattr(low.estimate, name) <= getattr(between.estimate, name) <= getattr(high.estimate, name)
    assert between.estimate.interval.low_bytes == low.estimate.interval.low_bytes
    assert between.estimate.interval.high_bytes == high.estimate.interval.high_bytes
    assert [p.name for p in between.estimate.phases] == [p.name for p in high.estimate.phases]
    assert engine.Plan.from_json(between.to_json()) == between


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("side", [256, 2048])
def test_beyond_what_was_traced_nothing_is_invented(side: int) -> None:
    beyond = plan(side)
    assert beyond.fits is None
    assert beyond.estimate.basis is None
    assert "not all are installed" in beyond.explain()


def test_the_interpolated_peak_is_near_the_traced_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path))
    traced = plan(768).estimate
    assert traced.basis == "traced"
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(store, "can_trace", lambda: False)
    assert plan(768).estimate.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=0.01)
