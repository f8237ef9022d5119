"""`cache`: what is skipped, what is kept, and that the next call begins anew."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import optimizers
from engine.errors import IncompatibleError, UsageError
from engine.optimizers.spec import Context, NotApplied
from engine.run import applied, load
from engine.run.progress import Quiet
from engine.values import FrozenDict
from tests.conftest import card, machine
from tests.test_run import step
from truth import executed, pipelines
from truth.cases import PLACEMENTS, Case
from truth.predicted import later_peak_bytes, predicted

HERE = Context(device="cpu", dtype="float32")
STEPS = 6

needs_device = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


def made(**params: Any) -> Any:
    return optimizers.spec("cache").step(params)


def apply(pipe: Any, **params: Any) -> Any:
    load.apply_all([made(**params)], pipe, HERE, Quiet())
    return pipe


def picture(pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(**call | {"num_inference_steps": STEPS}, generator=torch.Generator().manual_seed(0)).images


def counted(module: Any) -> list[int]:
    """Return a list that grows with each forward of a module's last block."""
    seen: list[int] = []
    part = module.single_transformer_blocks[-1].norm.linear
    part.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.rule("what-a-cache-skips-is-not-known")
@pytest.mark.parametrize(("threshold", "computed"), [(1.0, 1), (1e-6, STEPS)])
def test_how_many_steps_are_skipped_depends_on_the_threshold(threshold: float, computed: int) -> None:
    pipe, call = pipelines.made("flux")
    plain = picture(pipe, call)
    apply(pipe, threshold=threshold)
    seen = counted(pipe.transformer)
    first = picture(pipe, call)
    assert len(seen) == 2 * computed  # with guidance two calls a step, of which each has its own
    assert np.array_equal(first, plain) == (computed == STEPS)
    load.verify_after_call(pipe)
    assert np.array_equal(picture(pipe, call), first), "the second call begins with what the first one kept"
    assert len(seen) == 4 * computed


@needs_device
@pytest.mark.parametrize("method", ["first_block", "taylor_seer"])
@pytest.mark.parametrize(
    "placement",
    [n if n == "leaf, streamed" else pytest.param(n, marks=pytest.mark.slow) for n in PLACEMENTS if n != "resident"],
)
def test_what_is_skipped_is_skipped_under_every_placement_and_leaves_nothing_on_the_device(
    method: str, placement: str
) -> None:
    """The layer before what is skipped has it copied ahead; steps that are skipped never hold more than others."""
    skipping = made(**{"method": method} | ({"threshold": 1.0} if method == "first_block" else {"interval": 2}))
    plain = Case(architecture="flux", steps=(skipping,), call=FrozenDict({"num_inference_steps": STEPS}))
    placed = dataclasses.replace(plain, steps=(skipping, PLACEMENTS[placement]))
    _, (wanted,) = executed.drawn(dataclasses.replace(plain, steps=(skipping, PLACEMENTS["resident"])), 1)
    seen, calls = executed.drawn(placed, 2)
    assert all(np.array_equal(call.picture, wanted.picture) for call in calls)
    if method == "first_block":
        assert seen.peak_bytes <= predicted(placed).peak_bytes
        assert calls[1].peak_bytes <= later_peak_bytes(placed)


def test_attention_is_extrapolated_every_few_steps_and_the_next_call_begins_anew() -> None:
    pipe, call = pipelines.made("flux")
    plain = picture(pipe, call)
    apply(pipe, method="taylor_seer", interval=2)
    first = picture(pipe, call)
    assert np.abs(first - plain).max() > 0
    load.verify_after_call(pipe)
    assert np.array_equal(picture(pipe, call), first)


@pytest.mark.parametrize("method", ["first_block", "taylor_seer"])
def test_an_undone_cache_leaves_the_plain_pipeline(method: str) -> None:
    pipe, call = pipelines.made("flux")
    plain = picture(pipe, call)
    apply(pipe, method=method)
    applied.undo(pipe, load._planned([made(method=method)], pipe), HERE, Quiet())
    assert np.array_equal(picture(pipe, call), plain)


@pytest.mark.parametrize("method", ["first_block", "taylor_seer"])
def test_a_block_without_its_hook_or_with_another_number_is_seen(method: str) -> None:
    pipe, _ = pipelines.made("flux")
    apply(pipe, method=method)
    cache, own = optimizers.get("cache"), made(method=method)
    other = {"threshold": 0.5} if method == "first_block" else {"interval": 9}
    with pytest.raises(NotApplied, match=r"threshold of|cache_interval of"):
        cache.verify(pipe, made(method=method, **other), HERE)
    block = pipe.transformer.single_transformer_blocks[0]
    part, name = (block, "fbc_block_hook") if method == "first_block" else (block.attn, "taylorseer_cache")
    part._diffusers_hook.remove_hook(name, recurse=False)
    with pytest.raises(NotApplied, match=r"single_transformer_blocks.0.* of transformer has no hook of the cache"):
        cache.verify(pipe, own, HERE)


def test_what_has_no_cache_or_names_no_call_is_refused() -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe, _ = pipelines.made("sd")
    with pytest.raises(IncompatibleError, match="cache cannot act on StableDiffusionPipeline"):
        apply(pipe)
    flux, _ = pipelines.made("flux")
    with pytest.raises(IncompatibleError, match="cache cannot act on FluxImg2ImgPipeline") as caught:
        apply(FluxImg2ImgPipeline(**flux.components))
    assert "cache_context" in caught.value.why


def test_a_number_of_another_method_is_refused() -> None:
    pipe, _ = pipelines.made("flux")
    with pytest.raises(UsageError, match="interval belongs to taylor_seer"):
        apply(pipe, interval=3)
    with pytest.raises(UsageError, match="above 0"):
        made(threshold=0)


def test_what_a_cache_keeps_is_predicted_to_the_byte() -> None:
    """On the counted device; nothing is skipped with this threshold, which is what is predicted."""
    from truth.compare import compared

    resident = optimizers.spec("resident").step()
    for architecture in ("flux", "wan"):
        found = compared(Case(architecture=architecture, steps=(made(threshold=1e-6), resident)))
        assert found.differences == ()
        plain = predicted(Case(architecture=architecture, steps=(resident,)))
        assert found.executed.peak_bytes > plain.peak_bytes


def test_a_plan_says_what_is_not_known_of_a_cache() -> None:
    def plan(*steps: Any) -> Any:
        return engine.resolve(optimizers=list(steps), hardware=machine(card()), quality="lossy")

    plain, cached = plan("resident"), plan("cache", "resident")
    assert cached.estimate.peak_allocated_bytes > plain.estimate.peak_allocated_bytes
    assert any(n.optimizer == "cache" and "skipped" in n.because for n in cached.notes)
    assert cached.estimate.quality == "lossy"
    taylor = plan(step("cache", method="taylor_seer"), "resident")
    assert taylor.estimate.peak_allocated_bytes is None and taylor.fits is None
    assert any(n.kind == "not_estimated" and "taylor_seer" in n.because for n in taylor.notes)
