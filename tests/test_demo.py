"""The demo of the README under each built-in profile: the same picture, whatever holds the weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import engine
from engine import optimizers, paths, profiles
from engine.facts import embedded
from engine.optimizers.spec import Context
from engine.run import load
from engine.run.progress import Quiet
from engine.values import FrozenDict, Step
from tests.conftest import GIB, machine
from tools.tiny_flux.judge import judge
from tools.tiny_flux.scenes import Scene
from truth import device

BUILT_IN = [p.name for p in profiles.built_in()]
SCENE = Scene("red", "circle", "blue")
PROMPT, SEED = "a red circle on a blue background", 7
NEAR = 0.03
"""How far a picture (numbers from 0 to 1) may be off in the mean where a step is near, or the dtype another."""

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="the counted device takes a C++ compiler (c++)")


def chosen(name: str) -> tuple[Step, ...]:
    """Return what a profile comes to for the demo: on a card with room, or on a machine without one for `cpu`."""
    card: dict[str, Any] = {} if name == "cpu" else {"gpu": "H100 80GB", "vram": 60 * GIB}
    plan = engine.resolve(None, profile=name, hardware=machine(), **card)
    assert plan.fits is not False  # without a card it is not known
    return plan.optimizers


def listed(name: str) -> tuple[Step, ...]:
    """Return what a profile lists first: what it is made for, and what so small a model can do without."""
    dtype = optimizers.spec("dtype").step({"value": "float32" if name == "cpu" else "bfloat16"})
    return tuple(dtype if step.name == "dtype" else step for step in profiles.find(name).steps)


def in_float32(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps that compute in float32, which a CPU does four times as fast as in bfloat16."""
    value = FrozenDict({"value": "float32"})
    return tuple(dataclasses.replace(s, params=value) if s.name == "dtype" else s for s in steps)


_pictures: dict[str, np.ndarray] = {}


def drawn(steps: tuple[Step, ...], count: int, where: str = device.NAME) -> np.ndarray:
    """Return the demo's picture, in so many denoising steps; what was drawn already is not drawn again."""
    key = f"{where}, {count}: {'; '.join(map(str, steps))}"
    if key not in _pictures:
        dtype = next(str(s.params["value"]) for s in steps if s.name == "dtype")
        device.load()
        pipe = DiffusionPipeline.from_pretrained(paths.embedded_model_dir(), dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
        load.apply_all(steps, pipe, Context(device=where, dtype=dtype), Quiet())
        meant = embedded.model().defaults
        sizes: dict[str, Any] = {"height": meant.height, "width": meant.width, "num_inference_steps": count}
        noise = torch.Generator().manual_seed(SEED)
        _pictures[key] = pipe(PROMPT, generator=noise, output_type="np", **sizes, **meant.call).images[0]
    return _pictures[key]


def plain(count: int, dtype: str) -> np.ndarray:
    return drawn((optimizers.spec("dtype").step({"value": dtype}), optimizers.spec("resident").step()), count)


def differs(picture: np.ndarray, steps: tuple[Step, ...], wanted: np.ndarray) -> None:
    """Hold a picture against the plain one: equal to the bit where every step is exact, else near it."""
    off = np.abs(picture - wanted)
    told = "; ".join(map(str, steps))
    print(f"{told}: off by {off.mean():.5f} in the mean, {off.max():.5f} at most")
    if all(optimizers.spec(s.name).quality == "exact" for s in steps):
        assert off.max() == 0, told
    else:
        assert 0 < off.mean() < NEAR, told


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_profile_comes_to_draws_the_same_picture(name: str) -> None:
    """In float32 and in two steps; `make slow` draws it whole, in the dtype that is chosen."""
    for steps in map(in_float32, (chosen(name), listed(name))):
        differs(drawn(steps, 2, "cpu" if name == "cpu" else device.NAME), steps, plain(2, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_demo_is_drawn_by_each_profile(name: str) -> None:
    steps = embedded.model().defaults.steps
    assert steps is not None
    for listed_steps in (chosen(name), listed(name)):
        dtype = next(str(s.params["value"]) for s in listed_steps if s.name == "dtype")
        picture = drawn(listed_steps, steps, "cpu" if name == "cpu" else device.NAME)
        differs(picture, listed_steps, plain(steps, dtype))
        verdict = judge((picture * 255).round().astype(np.uint8))
        assert (verdict.background, verdict.figure, verdict.shape) == (SCENE.background, SCENE.figure, SCENE.shape)
    rounded = np.abs(plain(steps, "bfloat16") - plain(steps, "float32"))
    print(f"bfloat16 is off by {rounded.mean():.5f} in the mean, {rounded.max():.5f} at most, from float32")
    assert rounded.mean() < NEAR
