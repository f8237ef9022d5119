"""The choice of a profile: scenarios as data, and laws."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import arguments, facts, optimizers, profiles, scenarios, solve
from engine.errors import IncompatibleError
from engine.estimate.bounds import Least
from engine.history import RanOut, text_of
from engine.plan import Plan
from engine.solve import Decision, Situation, opened
from engine.solve.prices import prices
from engine.solve.situation import QUALITIES
from engine.values import Estimate, Match, Phase, Profile, Request, Slot, Step
from tests.conftest import GIB, card, machine

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("no_estimates")


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_scenario(path: Path) -> None:
    assert scenarios.run(scenarios.load(path)).differences == ()


def all_accounted_for(plan: Plan) -> bool:
    named = {r.profile for r in plan.rejected} | ({plan.profile.name} if plan.profile else set())
    return named == {p.name for p in profiles.built_in()}


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
    plan = engine.resolve(require=sorted(required), quality="lossy", prompts_known=True, hardware=machine(card(12)))
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
    assert plan.profile.name == "medium"
    assert [s.name for s in plan.optimizers] == ["dtype", "model_offload"]
    resident = {r.rule for r in plan.rejected if r.profile == "medium" and "resident" in {s.name for s in r.optimizers}}
    assert resident == {"forbid"}
    alone = engine.resolve(forbid=["resident"], profile="cpu", hardware=machine())
    assert alone.fits is False


def test_contradictions_name_both() -> None:
    with pytest.raises(IncompatibleError, match="vae_tiling cannot be required and forbidden"):
        engine.resolve(require=["vae_tiling"], forbid=["vae_tiling"], hardware=machine())
    with pytest.raises(IncompatibleError, match="model_offload and sequential_offload cannot be combined"):
        engine.resolve(require=["model_offload", "sequential_offload"], hardware=machine(card()))


def test_exact_quality_rules_out_what_is_only_near() -> None:
    plan = engine.resolve(height=4096, width=4096, quality="exact", hardware=machine(card(12)))
    assert plan.profile is not None
    assert not {"vae_tiling", "layerwise_casting"} & {s.name for s in plan.optimizers}
    tiled = [r for r in plan.rejected if any(s.name == "vae_tiling" for s in r.optimizers)]
    assert tiled
    assert {r.rule for r in tiled} == {"quality"}


def test_an_exact_list_is_the_whole_list_plus_where_the_weights_are() -> None:
    plan = engine.resolve(optimizers=["vae_tiling", "dtype"], hardware=machine(card()))
    assert [str(s) for s in plan.optimizers] == ["dtype: bfloat16", "vae_tiling", "resident"]
    assert plan.profile is None
    bare = engine.resolve(optimizers=[], hardware=machine(card()))
    assert [s.name for s in bare.optimizers] == ["resident"]
    assert [n.kind for n in bare.notes] == ["default", "not_estimated"]


# With estimates, from tables of them: no dry run.

SIZES = st.integers(0, 60 * GIB)
PLACEMENTS = ("resident", "model_offload", "sequential_offload", "group_offload")
SECONDS = st.floats(0, 1000)


@dataclass(frozen=True)
class Table:
    """What runs take, by their placement and whether they tile and cast; and how loose the bounds are."""

    taken: dict[tuple[str, bool, bool], tuple[int, int, float]]
    looseness: float
    is_bounded: bool

    def estimate(self, steps: Sequence[Step]) -> Estimate:
        names = {s.name for s in steps}
        placement = optimizers.placement(steps)
        assert placement is not None
        tiles, casts = "vae_tiling" in names, "layerwise_casting" in names
        required, host, seconds = self.taken[placement.name, tiles, casts]
        return Estimate(
            required_bytes=required,
            device_bytes=required,
            host_bytes=host,
            seconds=seconds,
            quality="near" if tiles or casts else "exact",
            phases=(Phase(name="denoise", peak_bytes=required),),
        )

    def least(self, steps: Sequence[Step]) -> Least | None:
        taken = self.estimate(steps)
        assert taken.required_bytes is not None
        assert taken.host_bytes is not None
        assert taken.seconds is not None
        return (
            Least(
                required_bytes=int(taken.required_bytes * self.looseness),
                host_bytes=int(taken.host_bytes * self.looseness),
                seconds=taken.seconds * self.looseness,
                copied_bytes=0,
            )
            if self.is_bounded
            else None
        )


KINDS = list(itertools.product(PLACEMENTS, (False, True), (False, True)))
TABLES = st.builds(
    Table,
    st.lists(st.tuples(SIZES, SIZES, SECONDS), min_size=len(KINDS), max_size=len(KINDS)).map(
        lambda rows: dict(zip(KINDS, rows, strict=True))
    ),
    st.floats(0, 1),
    st.booleans(),
)


def _alternatives() -> st.SearchStrategy[tuple[Step, ...]]:
    def step(name: str) -> Step:
        return optimizers.spec(name).step()

    placed = st.sampled_from(PLACEMENTS).map(lambda n: (step(n),))
    return placed | placed.map(lambda p: (step("layerwise_casting"), *p))


@st.composite
def made_profiles(draw: st.DrawFn) -> tuple[Profile, ...]:
    """Draw some profiles with alternatives and lower bounds in `match`."""
    found = []
    for index in range(draw(st.integers(1, 4))):
        tiling = draw(st.sampled_from([((),), ((), (optimizers.spec("vae_tiling").step(),))]))
        found.append(
            Profile(
                name=f"made-{index}",
                version="1.0.0",
                summary="made",
                match=Match(free_vram_at_least_bytes=draw(st.none() | SIZES)),
                slots=(
                    Slot(alternatives=((optimizers.spec("dtype").step({"value": "auto"}),),)),
                    Slot(alternatives=tiling),
                    Slot(alternatives=tuple(draw(st.lists(_alternatives(), min_size=1, max_size=4)))),
                ),
                source="made",
            )
        )
    return tuple(found)


Lost = dict[str, RanOut]
LOST = st.dictionaries(
    st.sampled_from(KINDS), SIZES.map(lambda room: RanOut(when="2026-10-03T08:09:10Z", room_bytes=room)), max_size=6
).map(lambda rooms: {acting_text(kind): room for kind, room in rooms.items()})


def acting_text(kind: tuple[str, bool, bool]) -> str:
    """Return the steps of a kind of run as they act here: in what `dtype: auto` is on the card."""
    placement, tiles, casts = kind
    names = [*(["vae_tiling"] if tiles else []), *(["layerwise_casting"] if casts else []), placement]
    return text_of([optimizers.spec("dtype").step({"value": "bfloat16"}), *(optimizers.spec(n).step() for n in names)])


def situation(
    table: Table,
    free_bytes: int,
    host_bytes: int | None,
    quality: str = "near",
    prefer: str = "speed",
    lost: Lost | None = None,
    below: int | None = None,
) -> Situation:
    """Return the embedded model, which tiles at this size, on a card with so much free."""
    return Situation(
        request=Request(model="embedded", height=2048, width=2048, quality=quality, prefer=prefer),
        model=facts.find(None),
        gpu=card(free_bytes / GIB),
        estimate=table.estimate,
        least=table.least,
        timed=lambda steps: table.estimate(steps).seconds if table.is_bounded else None,
        budget_bytes=max(0, free_bytes - 512 * 2**20),
        host_budget_bytes=host_bytes,
        ran_out=lost or {},
        below_bytes=below,
    )


def key(taken: Estimate, steps: Sequence[Step], prefer: str) -> tuple[float, ...]:
    """Return what the solver promises to order by, written down once more."""
    assert taken.seconds is not None
    assert taken.required_bytes is not None
    assert taken.quality is not None
    cost = round(
        taken.seconds * prices()["near"] ** sum(s.name in ("vae_tiling", "layerwise_casting") for s in steps), 2
    )
    rank = QUALITIES.index(taken.quality)
    return {
        "speed": (cost, rank, taken.required_bytes, len(steps)),
        "quality": (rank, cost, taken.required_bytes, len(steps)),
        "vram": (taken.required_bytes, cost, rank, len(steps)),
    }[prefer]


def brute_force(where: Situation, several: Sequence[Profile]) -> tuple[float, ...] | None:
    """Return the best key of all that fits, by trying everything."""
    assert where.gpu is not None
    assert where.gpu.free_bytes is not None
    assert where.budget_bytes is not None
    found = []
    for profile in several:
        if (profile.match.free_vram_at_least_bytes or 0) > where.gpu.free_bytes:
            continue
        for chosen in itertools.product(*(slot.alternatives for slot in profile.slots)):
            steps = tuple(s for alternative in chosen for s in alternative)
            taken = where.estimate(steps)
            if QUALITIES.index(taken.quality or "") > QUALITIES.index(where.request.quality):
                continue
            if (taken.required_bytes or 0) > where.budget_bytes:
                continue
            if where.below_bytes is not None and (taken.required_bytes or 0) >= where.below_bytes:
                continue
            names = {s.name for s in steps}
            placement = next(n for n in PLACEMENTS if n in names)
            lost = where.ran_out.get(acting_text((placement, "vae_tiling" in names, "layerwise_casting" in names)))
            if lost is not None and lost.room_bytes >= where.budget_bytes:
                continue
            if where.host_budget_bytes is None or (taken.host_bytes or 0) <= where.host_budget_bytes:
                found.append(key(taken, steps, where.request.prefer))
    return min(found, default=None)


HOSTS = st.none() | SIZES


@given(
    TABLES,
    made_profiles(),
    SIZES,
    HOSTS,
    st.sampled_from(["exact", "near"]),
    st.sampled_from(arguments.PREFERENCES),
    LOST,
    st.none() | SIZES,
)
def test_the_choice_is_that_of_brute_force_and_nothing_rejected_fits(
    table: Table,
    several: tuple[Profile, ...],
    free: int,
    host: int | None,
    quality: str,
    prefer: str,
    lost: Lost,
    below: int | None,
) -> None:
    where = situation(table, free, host, quality, prefer, lost, below)
    decision = solve.choose(where, several)
    best = brute_force(where, several)
    assert (decision.key or None) == best
    assert decision.fits is (best is not None)
    assert decision == solve.choose(where, several)
    for rejection in decision.rejected:
        taken = table.estimate(rejection.optimizers)
        assert taken.required_bytes is not None
        assert taken.host_bytes is not None
        assert where.budget_bytes is not None
        if rejection.rule == "estimate.device":
            assert rejection.short_bytes is not None
            assert 0 < rejection.short_bytes <= taken.required_bytes - where.budget_bytes
        elif rejection.rule == "estimate.host":
            assert rejection.short_bytes is not None
            assert host is not None
            assert 0 < rejection.short_bytes <= taken.host_bytes - host
        elif rejection.rule == "estimate.below":
            assert below is not None
            assert rejection.short_bytes is not None
            assert 0 < rejection.short_bytes <= taken.required_bytes - below + 1
        elif rejection.rule == "remembered.out_of_memory":
            assert lost[text_of(rejection.optimizers)].room_bytes >= where.budget_bytes
        elif rejection.rule == "same":
            assert key(taken, rejection.optimizers, prefer) == best
        elif rejection.rule == "preferred":
            assert best is not None
            assert key(taken, rejection.optimizers, prefer)[:3] >= best[:3]
        else:
            assert rejection.rule in ("match.free_vram", "quality")


@given(TABLES, made_profiles(), SIZES, SIZES, HOSTS, HOSTS, LOST)
def test_more_memory_never_costs_more(
    table: Table,
    several: tuple[Profile, ...],
    one: int,
    other: int,
    host: int | None,
    more_host: int | None,
    lost: Lost,
) -> None:
    less, more = sorted((one, other))
    hosts = (host, more_host) if host is not None and (more_host is None or more_host >= host) else (host, host)
    before = solve.choose(situation(table, less, hosts[0], lost=lost), several)
    after = solve.choose(situation(table, more, hosts[1], lost=lost), several)
    if before.fits:
        assert after.fits
        assert after.key[0] <= before.key[0]


@given(TABLES, made_profiles(), made_profiles(), SIZES, HOSTS, LOST)
def test_another_profile_never_makes_it_worse(
    table: Table, several: tuple[Profile, ...], others: tuple[Profile, ...], free: int, host: int | None, lost: Lost
) -> None:
    where = situation(table, free, host, lost=lost)
    before, after = solve.choose(where, several), solve.choose(where, (*several, *others))
    if before.fits:
        assert after.fits
        assert after.key <= before.key


@given(TABLES, SIZES, HOSTS)
def test_an_exact_list_fits_where_both_memories_hold_it(table: Table, free: int, host: int | None) -> None:
    where = situation(table, free, host)
    decision = solve.exact(where, [optimizers.spec("resident").step()])
    required, wanted_host, _ = table.taken["resident", False, False]
    assert where.budget_bytes is not None
    device_short = required > where.budget_bytes
    host_short = host is not None and wanted_host > host
    assert decision.fits is not (device_short or host_short)
    assert [r.rule for r in decision.rejected] == (
        ["estimate.device"] if device_short else ["estimate.host"] if host_short else []
    )


def test_an_exact_list_on_a_card_whose_room_is_not_known_is_not_known_to_fit() -> None:
    table = Table(dict.fromkeys(KINDS, (GIB, GIB, 1.0)), 1.0, True)
    where = dataclasses.replace(situation(table, GIB, None), budget_bytes=None)
    assert solve.exact(where, [optimizers.spec("resident").step()]).fits is None


def _decided(resident_s: float) -> Decision:
    taken = dict.fromkeys(KINDS, (GIB, 0, 9.0))
    taken["resident", False, False] = (9 * GIB, 0, resident_s)
    taken["model_offload", False, False] = (4 * GIB, 0, 1.004)
    placed = Slot(alternatives=tuple((optimizers.spec(n).step(),) for n in ("resident", "model_offload")))
    profile = Profile(name="both", version="1.0.0", summary="s", match=Match(), slots=(placed,), source="made")
    return solve.choose(situation(Table(taken, 1.0, True), 20 * GIB, None), [profile])


def test_equal_seconds_go_by_quality_and_then_by_room() -> None:
    """1.004 and 0.996 seconds are one second: the placement that leaves more room free is taken."""
    assert [s.name for s in _decided(0.996).steps] == ["model_offload"]
    assert [s.name for s in _decided(0.98).steps] == ["resident"]


def test_a_card_without_rates_goes_by_what_is_copied() -> None:
    """Nothing says how fast it is: the least that crosses the bus is taken, the price of quality counted."""
    copied = {"resident": 0, "model_offload": 10, "group_offload": 100, "sequential_offload": 100}

    def estimate(steps: Sequence[Step]) -> Estimate:
        placement = optimizers.placement(steps)
        assert placement is not None
        needs = GIB if placement.name != "resident" else 90 * GIB
        return Estimate(required_bytes=needs, host_bytes=0, quality="exact")

    def least(steps: Sequence[Step]) -> Least:
        placement = optimizers.placement(steps)
        assert placement is not None
        return Least(required_bytes=0, host_bytes=0, seconds=None, copied_bytes=copied[placement.name])

    where = dataclasses.replace(
        situation(Table(dict.fromkeys(KINDS, (0, 0, 0.0)), 1.0, True), 20 * GIB, None), estimate=estimate, least=least
    )
    placed = Slot(alternatives=tuple((optimizers.spec(n).step(),) for n in PLACEMENTS))
    profile = Profile(name="all", version="1.0.0", summary="s", match=Match(), slots=(placed,), source="made")
    decision = solve.choose(where, [profile])
    assert [s.name for s in decision.steps] == ["model_offload"]
    assert decision.fits


def test_of_several_cards_the_one_with_the_best_plan_is_taken() -> None:
    fitting = Decision(profile=None, steps=(), fits=True, estimate=Estimate(), rejected=(), notes=(), key=(2.0,))
    faster = dataclasses.replace(fitting, key=(1.0,))
    nothing = dataclasses.replace(fitting, fits=False, key=())
    assert solve.better([fitting, faster, nothing]) == 1
    assert solve.better([nothing, fitting]) == 1
    assert solve.better([nothing, nothing]) == 0


def test_whatever_may_be_open_has_values() -> None:
    where = dataclasses.replace(
        situation(Table(dict.fromkeys(KINDS, (GIB, GIB, 1.0)), 1.0, True), GIB, None),
        sizes=lambda dtype: {"vae": 1, "text_encoder": 2, "transformer": 5},
    )
    for spec in optimizers.specs():
        for param in spec.params:
            if param.opens:
                found = opened.values(spec.step({param.name: "auto"}), where)
                assert found, (spec.name, param.name)
                assert all(s.params.get(param.name) != "auto" for s in found), (spec.name, param.name)


def test_what_a_model_needs_is_looked_for_in_the_profiles_and_not_asked_of_the_user() -> None:
    # Its VAE decodes one video at a time: profiles slice, and a list without slicing is struck out by the rule.
    made = engine.resolve(
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", batch=2, vram="79GiB", gpu="H100 SXM"
    )
    assert made.profile is not None and "vae_slicing" in {s.name for s in made.optimizers}
    with pytest.raises(IncompatibleError):
        engine.resolve(made.request.model, batch=2, vram="79GiB", gpu="H100 SXM", optimizers=["resident"])
