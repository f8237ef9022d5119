"""Whole estimates: by hand over toys, and over the embedded model from end to end on a card that is not there."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import facts, optimizers, validation
from engine.estimate import between, bounds, placements, whole
from engine.estimate.trace import Builder, Trace, TracedModule, Work
from engine.plan import Plan
from engine.values import Estimate, HostBytes, Step
from tests import toys
from tests.conftest import GIB, RTX_4090, card, machine

BASE = bounds.HOST_BASE_BYTES
PLACEMENTS = ("resident", "model_offload", "sequential_offload", "group_offload")


def steps(*named: str | Mapping[str, object]) -> tuple[Step, ...]:
    """Return steps from names, or {name: {params}}."""
    made = [(n, {}) if isinstance(n, str) else next(iter(n.items())) for n in named]
    return tuple(optimizers.spec(name).step(params) for name, params in made)  # type: ignore[arg-type]


def toy(**more: object) -> Trace:
    """Return a run of an encoder, a net and a VAE, two steps long, in float16 but for 12 bytes."""
    made = Builder()
    made.phase("encode")
    made.begin("text_encoder")
    text = made.born(10 * 2**20)
    made.end("text_encoder")
    made.phase("denoise")
    for _ in range(2):
        made.begin("unet")
        made.begin("unet.a")
        inner = made.born(4 * 2**20)
        made.work(Work("matmul", "float16", (1, 64, 64, 64), 10**6))
        made.died(inner)
        made.end("unet.a")
        made.end("unet")
        made.step()
    made.phase("decode")
    made.begin("vae")
    made.work(Work("conv", "float16", (1, 8, 8, 1, 0, 1024, 1024, 3, 3, 1, 1, 1, 1, 1024, 1024), 10**6))
    made.end("vae")
    made.died(text)
    half = functools.partial(toys.weight, dtype="float16")
    parts = [
        toys.component("text_encoder", TracedModule(path="text_encoder.a", weights=(half(1, 300), toys.weight(2, 12)))),
        toys.component("unet", TracedModule(path="unet.a", weights=(half(3, 1000), half(4, 33)), is_castable=True)),
        toys.component("vae", TracedModule(path="vae.a", weights=(half(5, 70),))),
    ]
    return toys.trace(made, *parts, **more)


STORED = {"text_encoder": "float16", "unet": "float32", "vae": None}


def host(placement: placements.Placement, stored: Mapping[str, str | None] = STORED) -> HostBytes:
    return whole.host_bytes(placement.trace, placement, stored, "float16")


def test_weights_stored_as_they_are_loaded_stay_pages_of_their_files() -> None:
    """300 of the encoder; not its 12 that stay float32, nor the net's 1033 and the VAE's 70, which are converted."""
    found = host(placements.SequentialOffload(toy()))
    assert found == HostBytes(anonymous_bytes=BASE + 12 + 1033 + 70, pinned_bytes=0, file_bytes=300)


def test_of_what_is_put_on_the_device_as_it_is_loaded_the_host_holds_the_largest() -> None:
    """12 of the encoder, 1033 of the net, 70 of the VAE."""
    largest = HostBytes(anonymous_bytes=BASE + 1033, pinned_bytes=0, file_bytes=300)
    assert host(placements.Resident(toy())) == largest
    assert host(placements.StagedEncoding(toy())) == largest
    # Of the first stage an encoder that is converted, 312; of the second everything that is offloaded.
    unlike = {**STORED, "text_encoder": "float32", "unet": "float16"}
    staged = placements.StagedEncoding(toy(), placements.SequentialOffload)
    assert host(staged, unlike) == HostBytes(anonymous_bytes=BASE + 312, pinned_bytes=0, file_bytes=1033)


def test_a_component_that_is_cast_is_loaded_as_wide_as_it_is_stored_or_computes() -> None:
    casting = placements.Casting(storage="float8_e4m3fn", compute="float16")
    assert host(placements.Resident(toy(), casting)).anonymous_bytes == BASE + 1033


def test_what_comes_back_from_the_device_is_a_copy_of_its_own() -> None:
    anonymous = HostBytes(anonymous_bytes=BASE + 312 + 1033 + 70, pinned_bytes=0, file_bytes=0)
    assert host(placements.ModelOffload(toy())) == anonymous
    assert host(placements.GroupOffload(toy(), use_stream=False)) == anonymous


def test_pinned_copies_are_rounded_to_powers_of_two_and_take_the_place_of_what_they_copy() -> None:
    """300 → 512, 12 → 16, 1000 → 1024, 33 → 64, 70 → 128."""
    found = host(placements.GroupOffload(toy()))
    assert found == HostBytes(anonymous_bytes=BASE, pinned_bytes=512 + 16 + 1024 + 64 + 128, file_bytes=0)


def test_what_another_placement_keeps_on_the_device_does_not_come_back() -> None:
    kept = HostBytes(anonymous_bytes=BASE + 12 + 1033 + 70, pinned_bytes=0, file_bytes=300)
    assert host(placements.ModelOffload(placements.keeping(toy(), ["text_encoder"]))) == kept
    how = {"text_encoder": None, "unet": placements.Grouping(use_stream=False), "vae": placements.Grouping()}
    found = host(placements.GroupOffload(toy(), groupings=how))
    assert found == HostBytes(anonymous_bytes=BASE + 12 + 1033, pinned_bytes=128, file_bytes=300)


def test_what_is_pinned_in_turn_is_there_beside_what_it_copies() -> None:
    """Of the one group that is seen to come, 1000 and 33; its weights stay what they were."""
    found = host(placements.GroupOffload(toy(), low_cpu_mem_usage=True))
    assert found == HostBytes(anonymous_bytes=BASE + 12 + 1033 + 70, pinned_bytes=1024 + 64, file_bytes=300)


def test_at_block_level_the_vae_is_not_pinned_and_what_is_in_no_list_is_not_either() -> None:
    trace = toy()
    net = dataclasses.replace(trace.component("unet"), blocks=(("unet.a",),))
    parts = tuple(net if c.name == "unet" else c for c in trace.components)
    found = host(placements.GroupOffload(dataclasses.replace(trace, components=parts), block_level=True))
    assert found == HostBytes(anonymous_bytes=BASE + 12 + 70, pinned_bytes=1024 + 64, file_bytes=300)


def test_cast_weights_are_new_and_half_as_large() -> None:
    """1000 and 33 bytes of float16 are 500 and 16 in float8, whatever the file holds."""
    casting = placements.Casting(storage="float8_e4m3fn", compute="float16")
    stored = {**STORED, "unet": "float16"}
    found = host(placements.SequentialOffload(toy(), casting), stored)
    assert found == HostBytes(anonymous_bytes=BASE + 12 + 516 + 70, pinned_bytes=0, file_bytes=300)
    found = host(placements.Resident(toy(), casting), stored)
    assert found == HostBytes(anonymous_bytes=BASE + 516, pinned_bytes=0, file_bytes=300)


GPU = card(name=RTX_4090)
of_toy = functools.partial(whole.estimate, gpu=GPU, dtype="float16", denoising_steps=8, stored=STORED)


def inside(taken: Estimate) -> bool:
    """Whether the interval contains the value."""
    span, peak = taken.interval, taken.peak_allocated_bytes
    assert peak is not None
    assert span.low_bytes is not None
    assert span.high_bytes is not None
    if taken.seconds is not None and not (span.low_seconds or 0) <= taken.seconds <= (span.high_seconds or 0):
        return False
    return span.low_bytes <= peak <= span.high_bytes


def test_device_bytes_are_what_is_reserved_and_the_context() -> None:
    """576 MiB of context on 8.9; reserved are whole pages of 2 MiB, and more than allocated."""
    taken = of_toy(toy(), steps("resident"))
    assert taken.peak_reserved_bytes is not None
    assert taken.peak_allocated_bytes is not None
    assert taken.device_bytes == taken.peak_reserved_bytes + 576 * 2**20
    assert taken.peak_reserved_bytes % (2 * 2**20) == 0
    assert taken.peak_reserved_bytes >= taken.peak_allocated_bytes
    assert [p.name for p in taken.phases] == ["load", "encode", "denoise", "decode"]
    assert max(p.peak_bytes or 0 for p in taken.phases) == taken.peak_allocated_bytes
    # While decoding: 10 MiB of text, the workspaces of products and of the convolution: 16 MiB each way and filters.
    assert taken.phases[-1].activation_bytes == 10 * 2**20
    assert taken.phases[-1].workspace_bytes == 8320 * 1024 + 2 * 16 * 2**20 + 1536
    assert 8 * 8 * 9 * 2 == 1152 <= 1536  # as the allocator rounds it


def test_the_interval_reaches_from_no_conversion_to_all() -> None:
    """Before Ampere the input alone is converted, 16 MiB: less is nothing, more is the output as well."""
    turing = dataclasses.replace(GPU, name="Tesla T4", arch="7.5")
    taken = whole.estimate(toy(), steps("resident"), turing, dtype="float16", denoising_steps=8, stored=STORED)
    assert taken.peak_allocated_bytes is not None
    assert taken.interval.high_bytes is not None
    assert taken.interval.low_bytes is not None
    assert inside(taken)
    assert taken.interval.high_bytes == pytest.approx((taken.peak_allocated_bytes + 16 * 2**20) * 1.015, rel=1e-3)
    # Without any the peak is the net's: the text, what a layer makes, and the products' workspace.
    assert taken.interval.low_bytes == pytest.approx((14 * 2**20 + 8320 * 1024) * 0.985, rel=1e-3)


def test_a_run_that_was_seen_by_components_alone_is_less_certain_upwards() -> None:
    seen, guessed = of_toy(toy(), steps("resident")), of_toy(toy(basis="component"), steps("resident"))
    assert (seen.basis, guessed.basis) == ("traced", "component")
    assert guessed.interval.low_bytes == seen.interval.low_bytes
    assert seen.interval.high_bytes is not None
    # As much again as the activations at their most: the text, and what a layer of the net makes.
    assert guessed.interval.high_bytes == seen.interval.high_bytes + 14 * 2**20
    assert dataclasses.replace(guessed, basis="traced", interval=seen.interval) == seen


@pytest.mark.parametrize(
    ("listed", "quality"),
    [
        (steps("resident"), "exact"),
        (steps("vae_slicing", "resident"), "exact"),
        (steps("vae_tiling", "resident"), "near"),
        (steps("layerwise_casting", "vae_slicing", "model_offload"), "near"),
    ],
)
def test_the_worst_step_decides_the_quality(listed: Sequence[Step], quality: str) -> None:
    assert of_toy(toy(), listed).quality == quality


def test_a_card_without_rates_has_bytes_and_no_seconds() -> None:
    taken = whole.estimate(toy(), steps("resident"), card(), dtype="float16", denoising_steps=8, stored=STORED)
    assert taken.required_bytes is not None
    assert (taken.seconds, taken.load_seconds, taken.interval.low_seconds) == (None, None, None)
    assert all(p.seconds is None for p in taken.phases)


def test_what_is_loaded_between_the_stages_of_a_run_is_loading() -> None:
    """On an H100 a call of a staged run took 0.36 s, and 1.9 s of loading were counted to it."""
    whole_run, staged = (plan(*listed).estimate for listed in (("resident",), ("staged_encoding", "resident")))
    assert whole_run.seconds is not None and staged.seconds == pytest.approx(whole_run.seconds, abs=0.002)
    assert whole_run.load_seconds is not None and staged.load_seconds == pytest.approx(whole_run.load_seconds)
    times = {p.name: p.seconds for p in staged.phases}
    assert (times["load"], times["load.2"]) == (None, None)


@given(toys.traces(), st.sampled_from(PLACEMENTS), st.booleans())
def test_any_estimate_lies_in_its_interval_and_needs_no_more_than_it_takes(
    trace: Trace, placement: str, is_cast: bool
) -> None:
    taken = of_toy(trace, steps(*(["layerwise_casting"] * is_cast), placement))
    assert inside(taken)
    assert taken.required_bytes is not None
    assert taken.device_bytes is not None
    assert taken.required_bytes <= taken.device_bytes
    assert sum(p.seconds or 0 for p in taken.phases) == pytest.approx(taken.seconds, abs=0.01)


def test_within_a_budget_what_is_cached_stops_at_it() -> None:
    """100 on the device, of which 80 reserved and 70 allocated; 60 would do."""
    taken = Estimate(device_bytes=100, peak_reserved_bytes=80, peak_allocated_bytes=70, required_bytes=60)

    def came_to(budget: int | None) -> tuple[int | None, int | None, int | None]:
        found = between.within(taken, budget)
        assert found.required_bytes == 60
        return found.device_bytes, found.peak_reserved_bytes, found.peak_allocated_bytes

    assert came_to(None) == came_to(100) == came_to(500) == (100, 80, 70)
    assert came_to(95) == (95, 75, 70)
    assert came_to(75) == (75, 55, 55)
    assert came_to(60) == came_to(10) == came_to(0) == (60, 40, 40)
    assert between.within(Estimate(), 5) == Estimate()


# The embedded model, from end to end.


def plan(*named: str | Mapping[str, object], free_gib: float = 23.0) -> Plan:
    listed = [{"name": s.name, "params": dict(s.params)} for s in steps(*named)]
    return engine.resolve(optimizers=listed, prompts_known=True, hardware=machine(card(free_gib, name=RTX_4090)))


BLOCKS = {"group_offload": {"type": "block_level", "use_stream": False}}
LISTS: dict[str, tuple[str | Mapping[str, object], ...]] = {
    **{name: (name,) for name in PLACEMENTS},
    "group_offload without a stream": ({"group_offload": {"use_stream": False}},),
    "group_offload of blocks": ({"group_offload": {"type": "block_level"}},),
    "group_offload of blocks without a stream": (BLOCKS,),
    "group_offload of two blocks": ({"group_offload": {**BLOCKS["group_offload"], "blocks_per_group": 2}},),
    "vae_tiling": ("vae_tiling", "resident"),
    "vae_slicing": ("vae_slicing", "model_offload"),
    "layerwise_casting": ("layerwise_casting", "resident"),
    "layerwise_casting and model_offload": ("layerwise_casting", "model_offload"),
    "layerwise_casting and group_offload": ("layerwise_casting", "group_offload"),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_placement_and_flag_has_an_estimate(name: str) -> None:
    made = plan("dtype", *LISTS[name])
    taken = made.estimate
    known = (taken.peak_allocated_bytes, taken.peak_reserved_bytes, taken.seconds, taken.load_seconds, taken.host_bytes)
    assert None not in known
    assert taken.required_bytes is not None
    assert taken.device_bytes is not None
    assert taken.required_bytes <= taken.device_bytes
    assert inside(taken)
    assert taken.basis == "traced"
    assert made.fits is True
    assert made.rejected == ()
    assert [p.name for p in taken.phases] == ["load", "encode", "denoise", "decode"]


def test_everything_on_the_card_takes_the_most_and_the_least_time() -> None:
    found = {name: plan("dtype", *LISTS[name]).estimate for name in LISTS}
    resident = found["resident"]
    assert max(found.values(), key=lambda e: e.peak_allocated_bytes or 0) == resident
    assert min(e.seconds or 0 for e in found.values()) == resident.seconds
    least = found["sequential_offload"]
    assert (least.required_bytes or 0) <= min(e.required_bytes or 0 for e in found.values())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_it_fits_from_what_is_required_on_and_is_short_by_the_rest_below(name: str) -> None:
    """The headroom of 512 MiB is not part of the budget."""
    required = plan(name).estimate.required_bytes
    assert required is not None
    enough = plan(name, free_gib=required / GIB + 0.5)
    assert (enough.budget_bytes, enough.fits) == (required, True)
    assert enough.estimate.device_bytes == required
    short = plan(name, free_gib=(required - 1) / GIB + 0.5)
    assert (short.budget_bytes, short.fits) == (required - 1, False)
    assert [(r.rule, r.short_bytes) for r in short.rejected] == [("estimate.device", 1)]


def test_where_the_room_is_not_known_it_is_not_known_whether_it_fits() -> None:
    made = engine.resolve(optimizers=["resident"], hardware=machine(card(None, name=RTX_4090)))
    assert made.estimate.required_bytes is not None
    assert made.fits is None
    assert "the budget is not known" in made.explain()


def test_a_host_that_is_too_small_is_short_by_the_rest() -> None:
    taken = plan("resident").estimate
    made = engine.resolve(optimizers=["resident"], host_ram="300MiB", hardware=machine(card(name=RTX_4090)))
    assert taken.host_bytes is not None
    assert made.fits is False
    assert [(r.rule, r.short_bytes) for r in made.rejected] == [("estimate.host", taken.host_bytes - 300 * 2**20)]


def test_more_steps_take_so_much_longer_each_and_no_more_memory() -> None:
    found = [
        engine.resolve(steps=n, optimizers=["resident"], hardware=machine(card(name=RTX_4090))).estimate
        for n in (1, 2, 3, 100)
    ]
    one, two, three, hundred = (e.seconds or 0 for e in found)
    assert three - two == pytest.approx(two - one, abs=0.002)
    assert hundred - two == pytest.approx(98 * (three - two), rel=0.1)
    assert len({e.peak_allocated_bytes for e in found}) == 1


def test_a_choice_with_estimates_fits_and_says_what_the_others_would_take() -> None:
    made = engine.resolve(hardware=machine(card(name=RTX_4090)))
    assert made.fits is True
    assert made.profile is not None
    assert made.profile.name in ("low", "medium")
    slow = {r.profile: r.because for r in made.rejected if r.rule == "preferred"}["extreme-low"]
    assert f"the choice {made.estimate.seconds:.2f} s" in slow
    assert "it fits" in made.explain()


def test_a_plan_with_estimates_obeys_its_schema_and_survives_json() -> None:
    made = engine.resolve(hardware=machine(card(name=RTX_4090)))
    text = made.to_json()
    jsonschema.Draft202012Validator(json.loads(validation.schema_text("plan"))).validate(json.loads(text))
    assert Plan.from_json(text) == made


def test_staged_encoding_never_holds_the_encoders_and_the_rest_at_once() -> None:
    whole_run, staged = plan("resident").estimate, plan("staged_encoding", "resident").estimate
    assert whole_run.peak_allocated_bytes is not None
    assert staged.peak_allocated_bytes is not None
    assert staged.peak_allocated_bytes < whole_run.peak_allocated_bytes
    held = {p.name: p.weights_bytes for p in staged.phases}
    weights = whole_run.phases[0].weights_bytes
    assert weights is not None
    assert held["load"] is not None
    assert held["decode"] is not None
    assert held["load"] + held["decode"] == weights
    assert staged.quality == "exact"


def test_a_run_without_a_number_of_steps_takes_the_pipelines_own() -> None:
    """FluxPipeline's own is 28; the embedded model's defaults say 8, a directory of it says nothing."""
    listed = ["resident"]
    hardware = machine(card(12, name=RTX_4090))
    folder = str(facts.find(None).path)
    usual, asked = (engine.resolve(folder, optimizers=listed, hardware=hardware, steps=n).estimate for n in (None, 28))
    assert usual.seconds == asked.seconds
