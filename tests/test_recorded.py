"""Streamed groups that are let go without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import engine
from engine import optimizers
from engine.errors import IncompatibleError
from engine.optimizers import group_offload
from engine.optimizers.spec import Context, NotApplied
from tests.conftest import card, machine
from tests.evidence.conftest import counted
from truth import pipelines

__all__ = ["counted"]


def step(**params: Any) -> Any:
    return optimizers.spec("group_offload").step({"record_stream": True, **params})


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_recorded_groups_draw_the_same_and_are_seen_to_be(counted: torch.device, kind: str) -> None:
    here = Context(device=counted.type, dtype="float32")

    def drawn(made: Any) -> list[Any]:
        torch.manual_seed(0)  # what builds the small pipeline draws its weights
        pipe, call = pipelines.made("flux")
        group_offload.apply(pipe, made, here)
        told = group_offload.verify(pipe, made, here)
        assert ("recorded" in told) is bool(made.params.get("record_stream"))
        with pytest.raises(NotApplied, match="record_stream"):
            other = dict(made.params) | {"record_stream": not made.params.get("record_stream")}
            group_offload.verify(pipe, optimizers.spec("group_offload").step(other), here)
        with torch.no_grad():
            return [pipe(**call, generator=torch.Generator().manual_seed(0)).images for _ in range(2)]

    plain, recorded = drawn(optimizers.spec("group_offload").step({"type": kind})), drawn(step(type=kind))
    assert all((a == b).all() for a, b in zip(plain, recorded, strict=True))


def test_what_is_recorded_is_not_estimated() -> None:
    plan = engine.resolve(optimizers=[step()], hardware=machine(card()), height=64, width=64)
    assert plan.estimate is None or plan.estimate.peak_allocated_bytes is None
    (note,) = (n for n in plan.notes if n.kind == "not_estimated")
    assert "record_stream" in note.because
    with pytest.raises(IncompatibleError, match="group_offload cannot be used here"):
        engine.resolve(optimizers=[step(use_stream=False)], hardware=machine(card()))
