"""What a plan sets of the whole process: how the card's memory is taken, and in what float32 is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import compat, facts, optimizers
from engine.errors import IncompatibleError
from engine.estimate import clock
from engine.optimizers import allocator, tf32
from engine.optimizers.spec import Context, NotApplied
from engine.run import device, load, progress
from engine.values import Estimate, Step
from tests.conftest import RTX_4090, card, machine
from truth import pipelines

CARD = Context(device="cuda", dtype="float32")
GROWS = "expandable_segments:True"


def step(name: str) -> Step:
    return optimizers.spec(name).step()


def idle(names: list[str], **known: Any) -> list[str]:
    """Return the rules by which steps of these names do nothing."""
    made = tuple(step(n) for n in names)
    facts_ = compat.Facts(libraries=compat.installed(), **known)
    return [f.rule.id for f in compat.under(facts_).findings(made) if f.is_idle]


def estimate(names: list[str], **more: Any) -> Estimate:
    plan = engine.resolve(optimizers=names, hardware=machine(card(23.0, name=RTX_4090)), height=128, width=128, **more)
    assert plan.estimate is not None
    return plan.estimate


class Cuda:
    """What torch says of CUDA's allocator on a card, as far as it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, started: bool, grows: bool) -> None:
        self.grows = grows
        self.segments = [{"is_expandable": grows, "total_size": 2 << 20}]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: self.segments)

    def snapshot(self) -> dict[str, Any]:
        return {"allocator_settings": {"expandable_segments": self.grows}, "segments": self.segments}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An environment that says nothing of the allocator, and what torch is told of it while it runs."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    yield told


def test_the_allocator_is_set_before_cuda_starts(settings: list[str]) -> None:
    allocator.before_start(step("allocator"))
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == GROWS
    assert settings == [GROWS]
    assert not os.environ["PYTORCH_ALLOC_CONF"]


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ("max_split_size_mb:128", f"max_split_size_mb:128,{GROWS}"),
        ("roundup_power2_divisions:[256:1,512:2,>:4],", f"roundup_power2_divisions:[256:1,512:2,>:4],{GROWS}"),
        ("backend:native, expandable_segments:True", "backend:native, expandable_segments:True"),
    ],
)
def test_what_the_user_has_set_is_kept(
    said: str, becomes: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
    allocator.before_start(step("allocator"))
    assert os.environ["PYTORCH_ALLOC_CONF"] == becomes
    assert settings == [becomes]
    assert not os.environ["PYTORCH_CUDA_ALLOC_CONF"]  # which torch would read in its place


@pytest.mark.parametrize("said", ["expandable_segments:False", "backend:cudaMallocAsync"])
def test_settings_that_say_otherwise_are_not_overridden(
    said: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
    with pytest.raises(IncompatibleError, match="of your own") as caught:
        allocator.before_start(step("allocator"))
    assert said in caught.value.why
    assert settings == []


def test_torch_knows_the_setting() -> None:
    torch._C._accelerator_setAllocatorSettings(GROWS)
    assert GROWS in torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def test_what_has_started_otherwise_is_an_error(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, started=True, grows=False)
    with pytest.raises(IncompatibleError, match="CUDA has started without expandable segments"):
        allocator.apply(None, step("allocator"), CARD)
    Cuda(monkeypatch, started=True, grows=True)
    allocator.apply(None, step("allocator"), CARD)  # as it is meant to be: twice is once
    assert settings == []


def test_the_allocator_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Cuda(monkeypatch, started=True, grows=True)
    assert "expandable_segments" in allocator.verify(None, step("allocator"), CARD)
    seen.segments.append({"is_expandable": False, "total_size": 20 << 20})
    with pytest.raises(NotApplied, match="1 segments with 20971520 bytes"):
        allocator.verify(None, step("allocator"), CARD)
    seen.grows = False
    with pytest.raises(NotApplied, match="do not grow"):
        allocator.verify(None, step("allocator"), CARD)
    Cuda(monkeypatch, started=False, grows=True)
    with pytest.raises(NotApplied, match="has not started"):
        allocator.verify(None, step("allocator"), CARD)


def test_loading_sets_the_allocator_before_it_looks_at_the_card(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(allocator, "before_start", lambda step: order.append("allocator"))
    monkeypatch.setattr(device, "choose", lambda plan: order.append("card"))
    with_card = engine.resolve(optimizers=["allocator"], hardware=machine(card()), height=64, width=64)
    with load.opened(with_card, progress.Quiet()):
        assert order == ["allocator", "card"]
    without = engine.resolve(optimizers=["allocator"], hardware=machine())
    with load.opened(without, progress.Quiet()):
        assert order[2:] == ["card"]


@pytest.mark.rule("settings-of-a-card-without-one")
@pytest.mark.parametrize("name", ["allocator", "tf32"])
def test_settings_of_a_card_have_no_effect_without_one(name: str, pipe: Any) -> None:
    plan = engine.resolve(optimizers=[name], hardware=machine())
    assert [n.optimizer for n in plan.notes if n.kind == "no_effect"] == [name]
    said: list[str] = []

    class Told(progress.Quiet):
        def say(self, line: str) -> None:
            said.append(line)

    before = torch.backends.cuda.matmul.fp32_precision, os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    load.apply(plan, pipe, Told())
    assert f"  {name}: no effect without an accelerator" in said
    assert before == (torch.backends.cuda.matmul.fp32_precision, os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))


@pytest.mark.rule("segments-grow-on-linux")
def test_expandable_segments_are_for_linux() -> None:
    assert idle(["allocator"], device="cuda", platform="win32") == ["segments-grow-on-linux"]
    assert idle(["allocator"], device="cuda", platform="linux") == []


def test_growing_segments_reserve_less_and_allocate_no_more() -> None:
    """Of a large block what is left stays free from 512 bytes on, and not only above 1 MiB."""
    plain, grown = (
        engine.resolve(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            optimizers=[*more, {"name": "dtype", "params": {"value": "float16"}}],
            hardware=machine(card(23.0, name=RTX_4090)),
            height=512,
            width=512,
        ).estimate
        for more in ([], ["allocator"])
    )
    assert plain is not None and grown is not None
    assert 0.98 * (plain.peak_allocated_bytes or 0) < (grown.peak_allocated_bytes or 0)
    assert (grown.peak_allocated_bytes or 0) <= (plain.peak_allocated_bytes or 0)
    assert (grown.peak_reserved_bytes or 0) < 0.9 * (plain.peak_reserved_bytes or 0)
    assert (grown.required_bytes or 0) < (plain.required_bytes or 0)
    assert (grown.quality, grown.seconds) == (plain.quality, plain.seconds)


# TF32


@pytest.fixture
def switches() -> Iterator[None]:
    """The switches as they are when torch starts; afterwards as they were."""
    names = tf32._switches()
    before = {n: s.fp32_precision for n, s in names.items()}
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, switch in names.items():
        switch.fp32_precision = before[name]


def _all() -> list[str]:
    return [s.fp32_precision for s in tf32._switches().values()]


def test_tf32_is_set_seen_and_put_back(switches: None) -> None:
    made, before = step("tf32"), _all()
    pipe, call = pipelines.made("sd")
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with pytest.raises(NotApplied, match="products of float32"):
        tf32.verify(pipe, made, CARD)
    for _ in range(2):
        tf32.apply(pipe, made, CARD)
        assert "TF32" in tf32.verify(pipe, made, CARD)
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert np.array_equal(pipe(**call, generator=torch.Generator().manual_seed(0)).images, plain)  # of a card only
    torch.backends.cudnn.allow_tf32 = False
    with pytest.raises(NotApplied, match="convolutions of float32"):
        tf32.verify(pipe, made, CARD)
    tf32.undo(pipe, made, CARD)
    assert _all() == before
    assert torch.get_float32_matmul_precision() == "highest"  # torch's two kinds of switch agree


def test_tf32_stays_while_a_pipeline_asks_for_it(switches: None) -> None:
    made, before = step("tf32"), _all()
    one, other = (pipelines.made("sd")[0] for _ in range(2))
    for pipe in (one, other):
        tf32.apply(pipe, made, CARD)
    tf32.undo(one, made, CARD)
    assert tf32.verify(other, made, CARD)
    tf32.undo(other, made, CARD)
    assert _all() == before
    tf32.undo(other, made, CARD)  # nothing is left to undo
    assert _all() == before


def test_what_the_user_has_set_in_tf32_is_left_so(switches: None) -> None:
    made = step("tf32")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tf32._switches()["convolutions"].fp32_precision = "ieee"
    before = _all()
    pipe, _ = pipelines.made("sd")
    tf32.apply(pipe, made, CARD)
    tf32.undo(pipe, made, CARD)
    assert _all() == before


@pytest.mark.rule("tf32-needs-tensor-cores-for-it", "tf32-is-for-float32")
def test_tf32_is_for_float32_from_ampere_on() -> None:
    sd = facts.find("stable-diffusion-v1-5/stable-diffusion-v1-5")
    ampere: dict[str, Any] = {"device": "cuda", "compute_capability": (8, 6), "model": sd}
    assert idle(["tf32"], **ampere) == []
    assert idle(["tf32"], **{**ampere, "compute_capability": (7, 5)}) == ["tf32-needs-tensor-cores-for-it"]
    half = (optimizers.spec("dtype").step({"value": "bfloat16"}), step("tf32"))
    found = compat.under(compat.Facts(libraries=compat.installed(), **ampere)).findings(half)
    assert [f.rule.id for f in found if f.is_idle] == ["tf32-is-for-float32"]
    # A VAE that is widened to float32 computes in it, whatever the rest does.
    sdxl = {**ampere, "model": facts.find("stabilityai/stable-diffusion-xl-base-1.0")}
    half = (optimizers.spec("dtype").step({"value": "float16"}), step("tf32"))
    assert not any(f.is_idle for f in compat.under(compat.Facts(**sdxl)).findings(half))


def test_products_of_float32_are_as_fast_as_the_table_says() -> None:
    plain, fast = (estimate(more) for more in ([], ["tf32"]))
    assert plain.seconds is not None and fast.seconds is not None
    assert fast.seconds <= plain.seconds
    assert (fast.quality, plain.quality) == ("near", "exact")
    assert fast.peak_allocated_bytes == plain.peak_allocated_bytes
    a100 = card(name="A100-SXM4-40GB", arch="8.0")
    before, after = clock.speeds(a100), clock.speeds(a100, tf32=True)
    assert before is not None and after is not None
    assert after.flop_per_s["float32"] == pytest.approx(156e12 * 0.8)
    assert after.flop_per_s["float32"] > 7 * before.flop_per_s["float32"]
    rest = {k: v for k, v in after.flop_per_s.items() if k != "float32"}
    assert rest.items() <= before.flop_per_s.items()


def test_a_rate_that_is_not_known_is_not_made_up() -> None:
    turing = card(name="GeForce RTX 2080 Ti", arch="7.5")
    assert clock.speeds(turing) is not None
    assert clock.speeds(turing, tf32=True) is None
