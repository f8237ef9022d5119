"""The choice of a profile: scenarios as data, and laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import documents, optimizers, profiles
from engine.errors import IncompatibleError
from engine.plan import Plan
from engine.units import parse_size
from engine.values import Hardware
from tests.conftest import GIB, card, machine

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.yaml"))
KEYS = {"why", "hardware", "request", "expect", "rejected"}
pytestmark = pytest.mark.usefixtures("no_estimates")


def _hardware(told: dict[str, Any]) -> Hardware:
    if "free_vram" not in told:
        return machine()
    free = None if told["free_vram"] is None else parse_size(told["free_vram"]) / GIB
    return machine(card(free, arch=told.get("arch", "8.9")))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_scenario(path: Path) -> None:
    scenario = documents.read(path).value
    assert set(scenario) <= KEYS
    plan = engine.resolve(hardware=_hardware(scenario["hardware"]), **scenario.get("request", {}))
    expect = scenario["expect"]
    assert (plan.profile and plan.profile.name) == expect["profile"]
    assert plan.fits is expect.get("fits")
    if "optimizers" in expect:
        assert [str(s) for s in plan.optimizers] == expect["optimizers"]
    rules = {r.profile: r.rule for r in plan.rejected}
    assert {k: rules.get(k) for k in scenario.get("rejected", {})} == scenario.get("rejected", {})


def all_accounted_for(plan: Plan) -> bool:
    named = [r.profile for r in plan.rejected] + ([plan.profile.name] if plan.profile else [])
    return sorted(named) == sorted(p.name for p in profiles.built_in())


free_gib = st.floats(min_value=0, max_value=200)


@given(free_gib, st.integers(1, 512).map(lambda n: n * 16))
def test_every_profile_is_chosen_or_rejected_with_a_reason(free: float, side: int) -> None:
    plan = engine.resolve(height=side, width=side, hardware=machine(card(free)))
    assert all_accounted_for(plan)
    assert all(r.because and r.remedy for r in plan.rejected)
    assert plan.fits in (None, False)
    assert (plan.fits is False) == (plan.profile is None)


@given(free_gib, free_gib)
def test_more_free_vram_never_ends_in_a_profile_that_asks_for_less(one: float, other: float) -> None:
    less, more = sorted((one, other))

    def asked(free: float) -> int:
        plan = engine.resolve(hardware=machine(card(free)))
        return -1 if plan.profile is None else profiles.find(plan.profile.name).match.free_vram_at_least_bytes or 0

    assert asked(less) <= asked(more)


@given(free_gib)
def test_what_is_short_is_counted_in_bytes(free: float) -> None:
    seen = card(free)
    assert seen.free_bytes is not None
    for rejection in engine.resolve(hardware=machine(seen)).rejected:
        if rejection.rule == "match.free_vram":
            wanted = profiles.find(rejection.profile).match.free_vram_at_least_bytes
            assert wanted is not None
            assert rejection.short_bytes == wanted - seen.free_bytes > 0


@given(
    st.sets(
        st.sampled_from([s.name for s in optimizers.specs() if not s.is_placement and s.name not in ("xdit", "dtype")])
    )
)
def test_what_is_required_is_in_the_plan_and_in_order(required: set[str]) -> None:
    plan = engine.resolve(require=sorted(required), hardware=machine(card(12)))
    names = [s.name for s in plan.optimizers]
    assert required <= set(names)
    assert plan.optimizers == optimizers.in_order(plan.optimizers)
    added = {n.optimizer for n in plan.notes if n.kind == "required"}
    assert added == required - {"vae_slicing"}  # which `low` has anyway


def test_a_required_placement_takes_the_profiles_place() -> None:
    plan = engine.resolve(require=["group_offload"], hardware=machine(card(12)))
    assert [s.name for s in plan.optimizers] == ["dtype", "vae_slicing", "group_offload"]
    assert {n.optimizer for n in plan.notes if n.kind == "dropped"} == {"model_offload"}


def test_a_forbidden_step_is_dropped_and_a_forbidden_placement_rejects() -> None:
    plan = engine.resolve(forbid=["vae_slicing", "resident"], hardware=machine(card(20)))
    assert plan.profile is not None
    assert plan.profile.name == "low"
    assert [s.name for s in plan.optimizers] == ["dtype", "model_offload"]
    assert {r.profile: r.rule for r in plan.rejected}["medium"] == "forbid"


def test_contradictions_name_both() -> None:
    with pytest.raises(IncompatibleError, match="vae_tiling cannot be required and forbidden"):
        engine.resolve(require=["vae_tiling"], forbid=["vae_tiling"], hardware=machine())
    with pytest.raises(IncompatibleError, match="model_offload and sequential_offload cannot be combined"):
        engine.resolve(require=["model_offload", "sequential_offload"], hardware=machine(card()))


def test_exact_quality_rules_out_what_is_only_near() -> None:
    plan = engine.resolve(height=4096, width=4096, quality="exact", hardware=machine(card(12)))
    assert plan.profile is not None
    assert plan.profile.name == "low"
    assert {r.profile: r.rule for r in plan.rejected}["hi-res"] == "quality"


def test_an_exact_list_is_the_whole_list_plus_where_the_weights_are() -> None:
    plan = engine.resolve(optimizers=["vae_tiling", "dtype"], hardware=machine(card()))
    assert [str(s) for s in plan.optimizers] == ["dtype: bfloat16", "vae_tiling", "resident"]
    assert plan.profile is None
    bare = engine.resolve(optimizers=[], hardware=machine(card()))
    assert [s.name for s in bare.optimizers] == ["resident"]
    assert [n.kind for n in bare.notes] == ["default", "not_estimated"]
