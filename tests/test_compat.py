"""The rules: the guide's matrix, and what each kind of rule says."""

from __future__ import annotations

import dataclasses
import itertools
import time
import timeit
from collections.abc import Sequence
from typing import Any

import pytest

import engine
from engine import compat, facts, optimizers, versions
from engine.errors import IncompatibleError
from engine.facts import catalogue
from engine.facts.model import Component, Model
from engine.values import FrozenDict, Step
from tests.conftest import card, machine

pytestmark = pytest.mark.usefixtures("no_estimates")

ROWS = {
    # The guide's compatibility matrix, cell by cell: which pairs go together.
    "vae_slicing": {"model_offload": True, "sequential_offload": True, "group_offload": True, "xdit": True},
    "vae_tiling": {"model_offload": True, "sequential_offload": True, "group_offload": True, "xdit": True},
    "model_offload": {"sequential_offload": False, "group_offload": False, "xdit": False},
    "sequential_offload": {"model_offload": False, "group_offload": False, "xdit": False},
    "group_offload": {"model_offload": False, "sequential_offload": False, "xdit": False},
    "layerwise_casting": {"model_offload": True, "sequential_offload": True, "group_offload": True, "xdit": True},
}
PAIRS = [(row, column, works) for row, cells in ROWS.items() for column, works in cells.items()]
CARD = compat.Facts(device="cuda", batch=2, libraries=compat.installed())


def steps(*names: str) -> tuple[Step, ...]:
    return tuple(optimizers.spec(n).step() for n in names)


def findings(listed: Sequence[Step], facts: compat.Facts = CARD) -> tuple[compat.Finding, ...]:
    return compat.under(facts).findings(listed)


@pytest.mark.rule("xdit-or-model-offload", "xdit-or-sequential-offload", "xdit-or-group-offload")
@pytest.mark.parametrize(("row", "column", "works"), PAIRS)
def test_the_matrix(row: str, column: str, works: bool) -> None:
    listed = optimizers.in_order(steps(row, column))
    broken = [f for f in findings(listed) if f.breaks and f.rule.kind != "requires"]
    assert (broken == []) is works


@pytest.mark.parametrize(("row", "column"), [(r, c) for r, c, works in PAIRS if not works and c != "xdit"])
def test_a_refused_pair_names_both_and_the_remedy(row: str, column: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        engine.resolve(optimizers=[row, column], hardware=machine(card()))
    error = caught.value
    assert error.exit_code == 3
    assert row in error.what
    assert column in error.what
    assert error.do


def test_every_pair_of_placements_is_refused() -> None:
    placements = [s.name for s in optimizers.specs() if s.is_placement]
    for pair in itertools.combinations(placements, 2):
        assert any(f.rule.kind == "excludes" for f in findings(steps(*pair))), pair


def test_order_is_held_only_when_both_are_there() -> None:
    wrong = findings(steps("sequential_offload", "layerwise_casting"))
    assert [f.sentence for f in wrong] == ["layerwise_casting must come before sequential_offload"]
    assert findings(steps("layerwise_casting", "sequential_offload")) == ()
    assert findings(steps("sequential_offload")) == ()


@pytest.mark.rule("xdit-is-not-started")
def test_xdit_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(IncompatibleError, match="xdit cannot be used here"):
        engine.resolve(optimizers=["xdit"], hardware=machine(card(), card(index=1)))


@pytest.mark.rule("offload-without-accelerator")
def test_offloads_have_no_effect_without_an_accelerator() -> None:
    for name in ("model_offload", "sequential_offload", "group_offload"):
        plan = engine.resolve(optimizers=[name], hardware=machine())
        assert [n.optimizer for n in plan.notes if n.kind == "no_effect"] == [name]
        with_card = engine.resolve(optimizers=[name], hardware=machine(card()))
        assert [n for n in with_card.notes if n.kind == "no_effect"] == []


def test_an_unknown_fact_says_nothing() -> None:
    known = dataclasses.replace(CARD, model=facts.find(None), height=64, width=64)
    assert [f.rule.id for f in findings(steps("vae_tiling"), known)] == ["tiling-a-small-picture"]
    for unknown in ({"model": None}, {"height": None}, {"model": _of("SomePipeline", "VaeOfTomorrow", {})}):
        assert findings(steps("vae_tiling"), dataclasses.replace(known, **unknown)) == ()


@pytest.mark.parametrize(
    ("model", "fuses", "slices"),
    [
        (None, True, False),
        ("black-forest-labs/FLUX.1-dev", True, False),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True, True),
        ("guoyww/animatediff-motion-adapter-v1-5-2", True, False),  # the pipeline makes a UNet with motion of its UNet
        ("kandinsky-community/kandinsky-2-2-decoder", False, True),
        ("stabilityai/stable-diffusion-3-medium-diffusers", True, False),
        ("stabilityai/stable-diffusion-3.5-medium", False, False),  # a second attention in some blocks
        ("Lightricks/LTX-Video", False, False),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", True, False),
    ],
)
def test_what_a_denoisers_attention_lets_be_done_is_known_before_a_run(
    model: str | None, fuses: bool, slices: bool
) -> None:
    known = facts.find(model)
    assert (known.can_fuse_qkv, known.can_slice_attention) == (fuses, slices)
    plan = engine.resolve(model, optimizers=["fuse_qkv"], hardware=machine())
    assert ([n.optimizer for n in plan.notes if n.kind == "no_effect"] == ["fuse_qkv"]) is not fuses
    plan = engine.resolve(model, optimizers=["attention_slicing"], hardware=machine())
    assert ([n.optimizer for n in plan.notes if n.kind == "no_effect"] == ["attention_slicing"]) is not slices


def test_every_denoiser_of_the_catalogue_is_known() -> None:
    for model in map(facts.find, catalogue.ids()):
        assert model.can_fuse_qkv is not None, model.id
        assert model.can_slice_attention is not None, model.id


def test_fusing_comes_before_what_takes_the_weights_away() -> None:
    for later in ("layerwise_casting", "sequential_offload", "group_offload"):
        assert [f.sentence for f in findings(steps(later, "fuse_qkv"))] == [f"fuse_qkv must come before {later}"]
        assert findings(steps("fuse_qkv", later)) == ()


def test_casting_must_compute_in_the_dtype() -> None:
    half = dtype("float16")
    cast = {"name": "layerwise_casting", "params": {"compute": "bfloat16"}}
    with pytest.raises(IncompatibleError, match="layerwise_casting cannot be used here"):
        engine.resolve(optimizers=[half, cast], hardware=machine(card()))
    same = cast | {"params": {"compute": "float16"}}
    assert engine.resolve(optimizers=[half, same], hardware=machine(card())).fits is not False


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
STREAMED_LEAVES = {"name": "group_offload", "params": {}}
OTHER_GROUPS = [
    {"name": "group_offload", "params": {"use_stream": False}},
    {"name": "group_offload", "params": {"type": "block_level"}},
]


def dtype(value: str) -> dict[str, Any]:
    return {"name": "dtype", "params": {"value": value}}


def test_a_vae_that_is_widened_is_not_streamed() -> None:
    turing, listed = card(arch="7.5"), [dtype("float16"), STREAMED_LEAVES]
    for value in ("float16", "auto"):
        with pytest.raises(IncompatibleError, match="group_offload cannot be used here") as caught:
            engine.resolve(SDXL, optimizers=[dtype(value), STREAMED_LEAVES], hardware=machine(turing))
        error = caught.value
        assert error.exit_code == 3
        assert "streamed-leaves-stay-narrow" in error.why
        assert "use_stream" in error.do
    for other in OTHER_GROUPS:
        assert engine.resolve(SDXL, optimizers=[dtype("float16"), other], hardware=machine(turing)).optimizers
    for value in ("bfloat16", "float32"):
        assert engine.resolve(SDXL, optimizers=[dtype(value), STREAMED_LEAVES], hardware=machine(turing)).optimizers
    assert engine.resolve(None, optimizers=listed, hardware=machine(turing)).optimizers
    assert engine.resolve(SDXL, optimizers=listed, hardware=machine()).optimizers  # nothing is streamed on the CPU


def test_what_is_required_of_every_profile_is_rejected_with_the_rule() -> None:
    wanted: list[Any] = ["group_offload", {"name": "dtype", "params": {"value": "float16"}}]
    with pytest.raises(IncompatibleError, match="streamed-leaves-stay-narrow"):
        engine.resolve(SDXL, require=wanted, hardware=machine(card(arch="7.5")))
    # Where the dtype is open, the one that runs is taken.
    open_ = engine.resolve(SDXL, require=["group_offload"], hardware=machine(card(arch="7.5")))
    assert str(open_.optimizers[0]) == "dtype: float32"
    assert engine.resolve(SDXL, require=["group_offload"], hardware=machine(card(arch="8.9"))).profile is not None


def _of(pipeline: str, cls: str, config: dict[str, Any], name: str = "vae") -> Model:
    part = Component(library="diffusers", cls=cls, config=FrozenDict(config))
    return Model(id="any", source="directory", pipeline_class=pipeline, components=FrozenDict({name: part}))


@pytest.mark.parametrize(
    ("model", "precisions"),
    [
        (_of("StableDiffusionXLPipeline", "AutoencoderKL", {"force_upcast": True}), ("float16",)),
        (
            _of("StableDiffusionXLPipeline", "AutoencoderKL", {"latent_channels": 4}),
            ("float16",),
        ),  # as the class has it
        (_of("StableDiffusionXLPipeline", "AutoencoderKL", {"force_upcast": False}), ()),
        (_of("StableDiffusionXLPipeline", "AutoencoderKL", {}), None),
        (_of("StableDiffusionXLPipeline", "AutoencoderTiny", {"force_upcast": True}), ()),
        (_of("StableDiffusionXLPipeline", "AutoencoderKLOfTomorrow", {"latent_channels": 4}), None),
        (_of("StableDiffusionXLImg2ImgPipeline", "AutoencoderKL", {"force_upcast": True}), ("bfloat16", "float16")),
        (_of("StableDiffusionPipeline", "AutoencoderKL", {"force_upcast": True}), ()),
        (_of("AmusedPipeline", "VQModel", {"force_upcast": True}, "vqvae"), ("float16",)),
        (_of("AmusedPipeline", "VQModel", {"latent_channels": 4}, "vqvae"), ()),
    ],
)
def test_whether_a_pipeline_widens_its_vae_is_known_before_a_run(
    model: Model, precisions: tuple[str, ...] | None
) -> None:
    assert model.widens_vae_in == precisions


def test_every_vae_of_the_catalogue_is_known() -> None:
    found = {model.id: model.widens_vae_in for model in map(facts.find, catalogue.ids())}
    assert None not in found.values()
    assert {facts.find(i).pipeline_class for i, p in found.items() if p} == {
        "AuraFlowPipeline",
        "StableDiffusionXLPipeline",
    }


def _speaks(listed: Sequence[Step], rule: str, **known: Any) -> bool:
    return any(f.rule.id == rule for f in findings(listed, dataclasses.replace(CARD, **known)))


STREAMED = {"type": "leaf_level", "use_stream": True, "blocks_per_group": 1}


def placed(name: str, *components: str, **params: Any) -> Step:
    """Return a placement of some components, as other versions of the optimizers may take them."""
    step = optimizers.spec(name).step(params)
    held = {"components": components or None}
    return dataclasses.replace(step, params=FrozenDict({**step.params, **held}))


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        (placed("resident"), placed("group_offload"), True),
        (placed("resident", "vae"), placed("group_offload"), False),
        (placed("resident"), placed("sequential_offload", "transformer"), False),
        (placed("resident", "vae"), placed("group_offload", "transformer", "vae"), True),
        (placed("resident", "vae"), placed("model_offload", "transformer"), False),
        # one pipeline takes one of these, whatever they hold
        (placed("model_offload", "vae"), placed("group_offload", "transformer"), True),
        (placed("sequential_offload", "vae"), placed("group_offload"), True),
        (placed("model_offload", "vae"), placed("sequential_offload"), True),
        # twice is well where no component is held twice
        (placed("group_offload", "vae", use_stream=False), placed("group_offload"), False),
        (placed("group_offload", "vae", use_stream=False), placed("group_offload", "vae"), True),
    ],
    ids=str,
)
def test_placements_exclude_each_other_where_they_hold_the_same(one: Step, other: Step, is_refused: bool) -> None:
    for listed in ((one, other), (other, one)):
        assert any(f.breaks for f in findings(listed)) is is_refused


def test_a_rule_about_a_component_speaks_of_the_placement_that_holds_it() -> None:
    known: dict[str, Any] = {"model": facts.find(SDXL)}
    half = Step(name="dtype", params=FrozenDict(value="float16"))
    narrow = "streamed-leaves-stay-narrow"
    assert _speaks([half, placed("group_offload")], narrow, **known)
    assert _speaks([half, placed("group_offload", "vae")], narrow, **known)
    assert not _speaks([half, placed("group_offload", "unet")], narrow, **known)
    assert not _speaks([half, placed("resident", "vae"), placed("group_offload")], narrow, **known)
    assert _speaks([half, placed("resident", "unet"), placed("group_offload")], narrow, **known)


def test_components_that_are_left_open_are_not_known() -> None:
    left_open = dataclasses.replace(placed("resident"), params=FrozenDict(components="auto"))
    assert findings([left_open, placed("group_offload", "auto")]) == ()
    half = Step(name="dtype", params=FrozenDict(value="float16"))
    grouped = dataclasses.replace(placed("group_offload"), params=FrozenDict({**STREAMED, "components": "auto"}))
    assert not _speaks([half, grouped], "streamed-leaves-stay-narrow", model=facts.find(SDXL))


def test_findings_are_told_in_the_order_of_the_file() -> None:
    listed = steps("sequential_offload", "layerwise_casting", "fuse_qkv", "model_offload", "resident")
    places = [compat.rules().index(f.rule) for f in findings(listed)]
    assert places == sorted(places)
    assert len(places) == len(set(places)) >= 6


@pytest.mark.parametrize(
    ("version", "ranges", "is_within"),
    [
        ("0.42.1", ">=0.42.1,<0.43", True),
        ("0.42.0", ">=0.42.1,<0.43", False),
        ("0.43.0.dev0", ">=0.42.1,<0.43", False),
        ("0.43", "<=0.43.0", True),
        ("2.13.0+cpu", "==2.13", True),
        ("1.2", "!=1.2.0", False),
        ("1.10", ">1.9", True),
    ],
)
def test_a_version_is_held_against_ranges(version: str, ranges: str, is_within: bool) -> None:
    assert versions.within(version, ranges) is is_within


def test_thousands_of_lists_are_judged_in_little_time() -> None:
    speaking = compat.under(dataclasses.replace(CARD, model=facts.find(SDXL), height=1024, width=1024))
    names = ("dtype", "fuse_qkv", "layerwise_casting", "vae_slicing", "vae_tiling", "group_offload")
    listed = [Step(name="lora"), *steps(*names), Step(name="compile")]
    speaking.findings(listed)
    runs = timeit.repeat(lambda: speaking.findings(listed), number=500, repeat=5, timer=time.process_time)
    assert min(runs) / 500 < 100e-6  # some 15 where the machine does nothing else
