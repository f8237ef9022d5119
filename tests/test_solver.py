"""The choice of a profile: scenarios as data, and laws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import facts, optimizers, profiles, scenarios, solver
from engine.errors import IncompatibleError
from engine.plan import Plan
from engine.solver import Decision, Situation
from engine.values import Estimate, Phase, Request, Step
from tests.conftest import GIB, card, machine

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("no_estimates")


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_scenario(path: Path) -> None:
    assert scenarios.run(scenarios.load(path)).differences == ()


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
    if required >= {"fuse_qkv", "attention_slicing"}:
        required -= {"fuse_qkv"}  # they exclude each other
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


# With estimates, from tables of them: no dry run.

SIZES = st.integers(0, 60 * GIB)
ESTIMATES = st.builds(
    lambda required, more, host, seconds: Estimate(
        required_bytes=required,
        device_bytes=required + more,
        host_bytes=host,
        seconds=seconds,
        quality="exact",
        phases=(Phase(name="denoise", peak_bytes=required),),
    ),
    SIZES,
    SIZES,
    SIZES,
    st.none() | st.floats(0, 1000),
)
PLACEMENTS = ("resident", "model_offload", "sequential_offload", "group_offload")
TABLES = st.fixed_dictionaries(dict.fromkeys(PLACEMENTS, ESTIMATES))
Table = dict[str, Estimate]


def situation(table: Table, free_bytes: int | None, budget_bytes: int | None, host_bytes: int | None) -> Situation:
    """Return the embedded model on a card with so much free, where a run takes what the table says of its placement."""

    def estimate(steps: Sequence[Step]) -> Estimate:
        placement = optimizers.placement(steps)
        return table["resident" if placement is None else placement.name]

    return Situation(
        request=Request(model="embedded", height=2048, width=2048),
        model=facts.find(None),
        gpu=card(None if free_bytes is None else free_bytes / GIB),
        estimate=estimate,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_bytes,
    )


def chosen(table: Table, free_bytes: int, host_bytes: int | None = None) -> Decision:
    budget = max(0, free_bytes - 512 * 2**20)
    return solver.choose(situation(table, free_bytes, budget, host_bytes), profiles.built_in())


@given(TABLES, SIZES, SIZES, st.none() | SIZES)
def test_more_free_vram_never_makes_a_run_slower_nor_what_fits_not_fit(
    table: Table, one: int, other: int, host: int | None
) -> None:
    less, more = (chosen(table, free, host) for free in sorted((one, other)))
    if less.fits:
        assert more.fits
    if all(e.seconds is not None for e in table.values()) and less.estimate.seconds is not None:
        # A hundredth of a second decides nothing: within it quality and room do.
        assert more.estimate.seconds is not None
        assert more.estimate.seconds <= less.estimate.seconds + 0.01


@given(TABLES, SIZES, st.none() | SIZES)
def test_what_is_rejected_for_its_bytes_is_short_by_exactly_what_is_missing(
    table: Table, free: int, host: int | None
) -> None:
    decision = chosen(table, free, host)
    budget = max(0, free - 512 * 2**20)
    for rejection in decision.rejected:
        placement = optimizers.placement(rejection.optimizers)
        assert placement is not None
        taken = table[placement.name]
        assert taken.required_bytes is not None
        assert taken.host_bytes is not None
        if rejection.rule == "estimate.device":
            assert rejection.short_bytes == taken.required_bytes - budget > 0
        elif rejection.rule == "estimate.host":
            assert host is not None
            assert taken.required_bytes <= budget
            assert rejection.short_bytes == taken.host_bytes - host > 0
        elif rejection.rule == "preferred":
            assert taken.required_bytes <= budget
    if decision.profile is not None:
        assert decision.estimate.required_bytes is not None
        assert decision.estimate.required_bytes <= budget
        assert host is None or (decision.estimate.host_bytes or 0) <= host


@given(TABLES, SIZES)
def test_of_those_that_fit_the_fastest_is_chosen(table: Table, free: int) -> None:
    decision = chosen(table, free)
    passed = [optimizers.placement(r.optimizers) for r in decision.rejected if r.rule == "preferred"]
    times = [table[p.name].seconds for p in passed if p is not None]
    known = [t for t in times if t is not None]
    if decision.estimate.seconds is not None and len(known) == len(times):
        assert all(decision.estimate.seconds <= t + 0.01 for t in known)
    assert decision.fits is (decision.profile is not None)


@given(ESTIMATES, st.none() | SIZES, st.none() | SIZES)
def test_an_exact_list_fits_where_both_memories_hold_it_and_is_not_known_to_where_the_cards_is_not(
    taken: Estimate, budget: int | None, host: int | None
) -> None:
    table = dict.fromkeys(PLACEMENTS, taken)
    decision = solver.exact(situation(table, None, budget, host), [optimizers.spec("resident").step()])
    device_short = budget is not None and (taken.required_bytes or 0) > budget
    host_short = host is not None and (taken.host_bytes or 0) > host
    assert decision.fits is (False if device_short or host_short else None if budget is None else True)
    assert [r.rule for r in decision.rejected] == (
        ["estimate.device"] if device_short else ["estimate.host"] if host_short else []
    )


def test_equal_seconds_go_by_quality_and_then_by_room() -> None:
    """1.004 and 0.996 seconds are one second: the placement that leaves more room free is taken."""
    table = {name: Estimate(required_bytes=GIB, host_bytes=0, seconds=9.0, quality="exact") for name in PLACEMENTS}
    table["resident"] = Estimate(required_bytes=9 * GIB, host_bytes=0, seconds=0.996, quality="exact")
    table["model_offload"] = Estimate(required_bytes=4 * GIB, host_bytes=0, seconds=1.004, quality="exact")
    decision = chosen(table, 20 * GIB)
    assert decision.profile is not None
    assert decision.profile.name == "low"
    table["resident"] = Estimate(required_bytes=9 * GIB, host_bytes=0, seconds=0.98, quality="exact")
    decision = chosen(table, 20 * GIB)
    assert decision.profile is not None
    assert decision.profile.name == "medium"
