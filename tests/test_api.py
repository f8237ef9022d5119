"""`resolve`: every argument is checked, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import DgRunError, HardwareError, UsageError
from engine.units import GIB
from tests.conftest import card, machine

pytestmark = pytest.mark.usefixtures("no_estimates")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"height": 0}, "height is 0"),
        ({"width": -16}, "width is -16"),
        ({"height": 10**9}, "it must lie between 1 and 16,384"),
        ({"height": 1.5}, "height must be a whole number, not 1.5"),
        ({"height": True}, "height must be a whole number, not True"),
        ({"height": 100, "width": 130}, "height 100 and width 130 cannot be made by FluxPipeline"),
        ({"height": 100}, "height: 96 or 112"),
        ({"height": 8}, "height: 16"),
        ({"batch": 0}, "batch is 0"),
        ({"steps": 10**6}, "steps is 1000000"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"vram": "12"}, "vram: '12' is not a size"),
        ({"vram": -1}, "vram must be a size"),
        ({"headroom": "lots"}, "headroom: 'lots' is not a size"),
        ({"quality": "exat"}, "did you mean 'exact'?"),
        ({"prefer": "sped"}, "did you mean 'speed'?"),
        ({"device": "gpu"}, "device cannot be 'gpu'"),
        ({"require": ["vae_tilling"]}, "did you mean 'vae_tiling'?"),
        ({"forbid": ["vae"]}, "there is no optimizer 'vae'"),
        ({"optimizers": [{"name": "dtype", "params": {"value": "int8"}}]}, "value cannot be 'int8'"),
        ({"optimizers": [{"name": "dtype", "param": {}}]}, "is not an optimizer"),
        ({"optimizers": ["vae_tiling"], "profile": "low"}, "a profile and an exact list"),
        ({"model": 7}, "a int is not a model"),
        ({"call": {"x": float("nan")}}, "call holds what is no plain value"),
        ({"call": {"x": "\ud800"}}, "call holds what is no plain value"),
        ({"call": {"x": object()}}, "call holds what is no plain value"),
    ],
)
def test_an_argument_that_cannot_be_meant(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine.resolve(hardware=machine(), **arguments)
    assert part in str(caught.value)


def test_the_models_own_defaults_are_taken_where_nothing_is_said() -> None:
    plan = engine.resolve("black-forest-labs/FLUX.1-schnell", hardware=machine(card()))
    asked = plan.request
    assert (asked.height, asked.width, asked.steps, asked.guidance) == (1024, 1024, 4, 0.0)
    own = engine.resolve("black-forest-labs/FLUX.1-schnell", height=512, steps=8, hardware=machine(card()))
    assert (own.request.height, own.request.width, own.request.steps) == (512, 1024, 8)


def test_the_card_with_the_most_free_memory_is_taken_unless_one_is_named() -> None:
    hardware = machine(card(8, index=0, name="GeForce RTX 3060"), card(20, index=1, name="GeForce RTX 4090"))

    def index(**more: Any) -> int | None:
        device = engine.resolve(hardware=hardware, **more).device
        return None if device is None else device.index

    assert index() == 1
    assert index(gpu=0) == index(gpu="3060") == index(gpu="GPU-00000000-0000-0000-0000-000000000000") == 0
    assert index(device="cpu") is None
    with pytest.raises(UsageError, match="is not one card"):
        index(gpu="GeForce")
    with pytest.raises(UsageError, match="there is no card 'Voodoo 9', here or in the table"):
        index(gpu="Voodoo 9")


def test_vram_caps_the_card_and_beyond_it_is_hypothetical() -> None:
    capped = engine.resolve(vram="8GiB", hardware=machine(card(20)))
    assert capped.profile is not None
    assert capped.profile.name == "low"
    assert not capped.hardware.gpus[0].hypothetical
    assert engine.resolve(vram="30GiB", hardware=machine(card(20))).hardware.gpus[0].hypothetical
    imagined = engine.resolve(vram="12GiB", hardware=machine())
    assert imagined.hardware.gpus[0].hypothetical
    assert imagined.hardware.gpus[0].name == "hypothetical card"
    assert [n.kind for n in imagined.notes if n.optimizer == "dtype"] == ["undecided"]


def test_the_budget_is_what_is_free_less_the_headroom() -> None:
    plan = engine.resolve(headroom="2GiB", hardware=machine(card(20)))
    assert (plan.budget_bytes, plan.headroom_bytes) == (18 * GIB, 2 * GIB)
    assert engine.resolve(headroom="2GiB", hardware=machine(card(1))).budget_bytes == 0
    assert engine.resolve(hardware=machine(card(None)), profile="cpu").budget_bytes is None
    assert engine.resolve(hardware=machine()).headroom_bytes is None


def test_a_card_that_is_insisted_on_must_be_there() -> None:
    with pytest.raises(HardwareError) as caught:
        engine.resolve(device="cuda", hardware=machine())
    assert caught.value.exit_code == 6


def test_a_plan_for_a_card_that_is_not_here_is_not_run() -> None:
    plan = engine.resolve(vram="12GiB", hardware=machine())
    with pytest.raises(HardwareError, match="hypothetical"):
        plan.load()
    plan = engine.resolve(vram="30GiB", hardware=machine(card(20)))
    with pytest.raises(HardwareError, match="hypothetical"):
        plan.load()


def test_a_pipeline_object_is_a_model(pipe: Any) -> None:
    plan = engine.resolve(pipe, height=128, width=128, hardware=machine())
    assert plan.request.pipeline_class == "FluxPipeline"
    with pytest.raises(UsageError, match="multiples of 16"):
        engine.resolve(pipe, height=100, width=128, hardware=machine())


def test_a_path_object_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(DgRunError, match="is not a model in diffusers layout"):
        engine.resolve(tmp_path, hardware=machine())


def test_guidance_that_does_nothing_is_said_to() -> None:
    plan = engine.resolve(guidance=3.0, hardware=machine())
    assert "guidance does nothing" in plan.explain()
    assert "guidance does nothing" not in engine.resolve(hardware=machine()).explain()
    dev = engine.resolve("black-forest-labs/FLUX.1-dev", guidance=3.0, hardware=machine())
    assert "guidance does nothing" not in dev.explain()
