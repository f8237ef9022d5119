"""Bounds are never more than what a replay answers: over shipped traces, placements, castings and ways."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

import engine
from engine import facts, optimizers
from engine.estimate import bounds, clock, store, whole, workspaces
from engine.estimate.bounds import Bounds
from engine.estimate.estimator import Estimator
from engine.estimate.ways import QUADRATIC, way
from engine.values import Gpu, Request, Step
from tests.conftest import card

RTX_4090 = "GeForce RTX 4090"
SMALL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
FLUX = "black-forest-labs/FLUX.1-dev"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"  # its VAE is widened while it runs
COGVIDEOX = "THUDM/CogVideoX-2b"  # where it decodes, the allocator's segments take a quarter more than is in them
OTHERS = (FLUX, SDXL, "stabilityai/stable-diffusion-3.5-medium", COGVIDEOX, "Lightricks/LTX-Video")


def _step(name: str, **params: Any) -> Step:
    return optimizers.spec(name).step(params)


PLACEMENTS = {
    "resident": [_step("resident")],
    "model": [_step("model_offload")],
    "sequential": [_step("sequential_offload")],
    "leaves, streamed": [_step("group_offload")],
    "leaves": [_step("group_offload", use_stream=False)],
    "blocks, streamed": [_step("group_offload", type="block_level")],
    "four blocks": [_step("group_offload", type="block_level", use_stream=False, blocks_per_group=4)],
    "leaves, pinned as they come": [_step("group_offload", low_cpu_mem_usage=True)],
    "VAE resident, leaves": [_step("resident", components=["vae"]), _step("group_offload")],
    "VAE resident, model": [_step("resident", components=["vae"]), _step("model_offload")],
    "staged": [_step("staged_encoding"), _step("resident")],
    "staged, leaves": [_step("staged_encoding"), _step("group_offload")],
}
BESIDE = {
    "plain": [],
    "cast": [_step("layerwise_casting")],
    "text encoders cast too": [_step("layerwise_casting", components=["transformer", "unet", "text_encoder"])],
    "tiled": [_step("vae_tiling")],
    "cast and tiled": [_step("layerwise_casting"), _step("vae_tiling")],
}


def _request(model: str) -> Request:
    return engine.resolve(model, gpu="RTX 4090", optimizers=[_step("dtype", value="bfloat16"), "resident"]).request


@pytest.mark.parametrize("model", [SMALL, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_a_bound_is_never_more_than_the_replay(model: str) -> None:
    known, request = facts.find(model), _request(model)
    gpu = card(23.0, name=RTX_4090)
    assert gpu.compute_capability is not None
    trace = store.find(known, request, "bfloat16")
    assert trace is not None
    stored = {n: c.stored_dtype for n, c in known.components.items()}
    speed = clock.speeds(gpu)
    assert speed is not None
    steps_taken = request.steps
    every = itertools.product(PLACEMENTS.items(), BESIDE.items())
    # Of the quick one a part: each placement, and each of what may be beside it.
    for (placed, placement), (beside, more) in itertools.islice(every, 0, None, 3 if model == SMALL else 1):
        steps = [_step("dtype", value="bfloat16"), *more, *placement]
        taken = whole.estimate(trace, steps, gpu, dtype="bfloat16", denoising_steps=steps_taken, stored=stored)
        along = trace.along(way(steps))
        seconds = whole.computing_seconds(along, speed, steps_taken)
        assert seconds is not None
        made = Bounds.from_json(bounds.of_trace(along).to_json())
        least = made.least(
            steps,
            context_bytes=workspaces.context_bytes(gpu.compute_capability, None),
            computing_s=sum(s for n, s in seconds.items() if n != QUADRATIC),
            speed=speed,
            denoising_steps=steps_taken,
        )
        case = f"{model}, {placed}, {beside}"
        assert least.required_bytes <= (taken.required_bytes or 0), case
        assert least.host_bytes <= (taken.host_bytes or 0), case
        assert least.seconds is not None, case
        assert least.seconds <= (taken.seconds or 0) + 0.001, case
        if placed == "resident" and not more:
            # Not only safe but of use: with everything on the card the bound is the answer but for the allocator.
            answer = taken.peak_allocated_bytes if model == COGVIDEOX else taken.required_bytes
            assert least.required_bytes > 0.9 * (answer or 0), case
            assert least.seconds == pytest.approx(taken.seconds, abs=0.002), case


@pytest.mark.slow
def test_a_faster_bus_never_makes_a_run_slower() -> None:
    model = FLUX
    known, request = facts.find(model), _request(model)

    def seconds(gpu: Gpu, steps: list[Step]) -> float:
        found = Estimator(known, request, gpu, None)([_step("dtype", value="bfloat16"), *steps]).seconds
        assert found is not None
        return found

    def on_bus(generation: int) -> Gpu:

        return dataclasses.replace(card(23.0, name=RTX_4090), pcie_generation=generation, pcie_width=16)

    for name in ("resident", "model", "leaves, streamed", "blocks, streamed"):
        taken = [seconds(on_bus(generation), PLACEMENTS[name]) for generation in (3, 4, 5)]
        assert taken == sorted(taken, reverse=True), name


def test_the_bounds_of_another_tile_leave_out_what_decoding_holds() -> None:
    model = SDXL
    known, request = facts.find(model), _request(model)
    estimates = Estimator(known, request, card(23.0, name=RTX_4090), None)
    own = estimates.least([_step("dtype", value="bfloat16"), _step("resident")])
    assert own is not None
    found = estimates._bounds("bfloat16", (), "")
    assert found is not None
    without = found[0].least(
        [_step("resident")],
        context_bytes=0,
        computing_s=1.0,
        speed=None,
        denoising_steps=request.steps,
        is_own=False,
    )
    assert without.required_bytes < own.required_bytes
    assert without.required_bytes >= sum(p.weights_bytes for p in found[0].parts.values())
