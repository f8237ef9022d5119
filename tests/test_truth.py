"""Predictions against the counted device, on which the libraries' own hooks run: bytes by phase, weights by name."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

from engine import optimizers
from engine.optimizers.spec import Context
from engine.values import Step
from truth import cases, compare, device, many, pipelines, results
from truth.cases import Case
from truth.results import Row

SEED = 26  # any: `python -m truth` takes others, and more
EVERY = list(cases.every_placement())
# Each placement under a quarter of the architectures, and each architecture under a quarter of the placements.
PLACED = [c for i, c in enumerate(EVERY) if (i + i // len(cases.PLACEMENTS)) % 4 == 0]
MIXED = list(cases.every_mixture())[::7]  # each mixture twice, each architecture once or twice; `make truth` runs all
TILES = list(cases.every_tile())[::4] + list(cases.every_tile())[3::4]  # each architecture once
CASTS = list(cases.every_cast())[::10] + list(cases.every_cast())[8::10]
# Another one of every other architecture; `make truth` runs thousands.
RANDOM = [next(cases.random_cases(SEED + i, [n])) for i, n in enumerate(pipelines.ALL) if i % 2 == 0]
STAGED = [c for c in cases.staged() if c.steps[-1].name != "model_offload"][::3]  # `make truth` runs those too
# Where the tests run side by side, the cores have enough to do.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Give what every case came to, run in as many processes as there are cores."""
    return {row.id: row for row in many.each(results.row, [*PLACED, *RANDOM], JOBS)}


@pytest.fixture(scope="module")
def parted() -> dict[str, Row]:
    """The same of every placement, and of parts that are placed, cast and tiled apart: `make slow` runs these."""
    return {row.id: row for row in many.each(results.row, [*EVERY, *MIXED, *TILES, *CASTS], JOBS)}


@pytest.mark.parametrize("case", PLACED, ids=lambda c: c.id)
def test_placements_and_architectures_hold_what_was_predicted(case: Case, rows: dict[str, Row]) -> None:
    """To the byte in every phase, and to the name at the start of each."""
    assert rows[case.id].differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in EVERY if c not in PLACED], ids=lambda c: c.id)
def test_every_placement_of_every_architecture_holds_what_was_predicted(case: Case, parted: dict[str, Row]) -> None:
    assert parted[case.id].differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED, ids=lambda c: c.id)
def test_components_that_are_placed_apart_hold_what_was_predicted(case: Case, parted: dict[str, Row]) -> None:
    assert parted[case.id].differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASTS, ids=lambda c: c.id)
def test_text_encoders_in_fewer_bits_hold_what_was_predicted(case: Case, parted: dict[str, Row]) -> None:
    assert parted[case.id].differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("case", TILES, ids=lambda c: c.id)
def test_tiles_of_another_size_hold_what_was_predicted(case: Case, parted: dict[str, Row]) -> None:
    assert parted[case.id].differences == ()


def test_random_cases_hold_what_was_predicted(rows: dict[str, Row]) -> None:
    """Sizes, dtypes, casting, tiles, slices, fused projections, sliced attention, under any placement."""
    assert [(c.id, d) for c in RANDOM if (d := rows[c.id].differences)] == []


def test_staged_encoding_holds_what_was_predicted() -> None:
    """A real run, loaded in stages from a folder: the peak is equal, and the weights by name.

    What a pipeline prepares between its text and its first step (latents) belongs to `encode` in a trace, and to the
    second stage in a run: small pipelines show it in a phase that is not the peak.
    """
    found = list(many.each(compare.compared, STAGED, JOBS))
    assert len({r.case.architecture for r in found}) > len(pipelines.ALL) / 2
    assert [(r.case.id, r.error) for r in found if r.error] == []
    assert [(r.case.id, r.differences) for r in found if abs(r.worst_phase_error) > 0.07] == []
    assert [d for r in found for d in r.differences if "bytes were predicted" not in d] == []


def test_a_run_fits_its_predicted_peak_and_does_not_fit_less() -> None:
    found = list(many.each(compare.bounded, RANDOM[::2], JOBS))
    assert [b.id for b in found if not b.with_room] == []
    assert [b.id for b in found if b.when_short] == []


TILED = optimizers.spec("vae_tiling").step()
PLACEMENTS: dict[str, tuple[Step, ...]] = {n: (s,) for n, s in cases.PLACEMENTS.items()}
PLACEMENTS |= {f"{n}, tiled": (TILED, *PLACEMENTS[n]) for n in ("leaf", "leaf, streamed", "model_offload")}
TAKES_A_PICTURE = {"img2img": StableDiffusionXLImg2ImgPipeline, "inpaint": StableDiffusionXLInpaintPipeline}


def _drawn_with_a_vae_that_is_widened(name: str, dtype: str, steps: Sequence[Step]) -> None:
    """Call a small SDXL whose VAE says `force_upcast`, as the real one's does."""
    device.load()
    pipe, call = pipelines.made("sdxl")
    pipe.vae.register_to_config(force_upcast=True)
    call |= {"height": 32, "width": 32}
    if name in TAKES_A_PICTURE:
        given: dict[str, Any] = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.5}
        if name == "inpaint":
            given["mask_image"] = torch.ones(1, 1, 32, 32)
        pipe, call = TAKES_A_PICTURE[name](**pipe.components), {**call, **given, "num_inference_steps": 4}
        pipe.set_progress_bar_config(disable=True)
        if name == "img2img":
            del call["height"], call["width"]
    pipe.to(getattr(torch, dtype))
    here = Context(device=device.NAME, dtype=dtype)
    for step in steps:
        optimizers.get(step.name).apply(pipe, step, here)
        optimizers.get(step.name).verify(pipe, step, here)
    pipe(**call)


def _slow(case: tuple[str, ...]) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


WIDENED = [
    *itertools.product(["text"], sorted(PLACEMENTS)),
    *itertools.product(TAKES_A_PICTURE, ["leaf", "leaf, streamed", "block, streamed"]),
]


# The others say the same of inpainting, and of words under each placement.
WIDENED_QUICK = ("resident", "model_offload", "leaf", "leaf, streamed", "leaf, streamed, tiled")


@pytest.mark.rule("streamed-leaves-stay-narrow")
@pytest.mark.parametrize(
    ("dtype", "name", "placed"),
    [
        case if case[1] == "img2img" or case[1:] in itertools.product(["text"], WIDENED_QUICK) else _slow(case)
        for case in (
            *(("float16", *case) for case in WIDENED),
            # From words it runs in bfloat16 under every placement, which is seen of the one that matters.
            *(("bfloat16", *case) for case in WIDENED if case[0] != "text" or case[1] == "leaf, streamed"),
        )
    ],
)
def test_a_vae_that_is_widened_does_not_run_from_a_stream(name: str, dtype: str, placed: str) -> None:
    """Its layers come from pinned copies, which stay as narrow as they were; under every other placement it runs."""
    narrow = {"float16": "c10::Half", "bfloat16": "c10::BFloat16"}[dtype]
    if placed.startswith("leaf, streamed") and (name in TAKES_A_PICTURE or dtype == "float16"):
        with pytest.raises(RuntimeError, match=rf"Input type \(float\) and bias type \({narrow}\)"):
            _drawn_with_a_vae_that_is_widened(name, dtype, PLACEMENTS[placed])
    else:
        _drawn_with_a_vae_that_is_widened(name, dtype, PLACEMENTS[placed])
