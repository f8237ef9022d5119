"""Which kernel computes attention: set for one pipeline, and what each of them holds."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import facts, optimizers
from engine.dryrun import run
from engine.errors import IncompatibleError
from engine.estimate import clock, workspaces
from engine.estimate.trace import NAMED, Work
from engine.optimizers import attention_backend as optimizer
from engine.optimizers.spec import Context, NotApplied
from engine.plan import Plan
from engine.run import load
from engine.values import Request, Step
from tests.conftest import RTX_4090, card, draw, machine
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")


def step(backend: str = "_native_math") -> Step:
    return optimizers.spec("attention_backend").step({"backend": backend})


def plan(*backends: str, model: str | None = None, arch: str = "8.9", dtype: str = "bfloat16", **more: Any) -> Plan:
    """Return a plan of exactly these backends, on a card of a capability."""
    name = RTX_4090 if arch == "8.9" else "NVIDIA H100 80GB HBM3"
    listed = [*map(step, backends), optimizers.spec("dtype").step({"value": dtype})]
    where = machine(card(23.0, name=name, arch=arch))
    return engine.resolve(model, optimizers=listed, hardware=where, **{"height": 256, "width": 256, **more})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that are called, one after the other, in this process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    seen: list[str] = []

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            seen.append(name)
            return plain(*args, **given)

        return call

    for name in ("native", "_native_math"):
        key = next(k for k in Registry._backends if k.value == name)
        monkeypatch.setitem(Registry._backends, key, counted(name, Registry._backends[key]))
    return seen


def test_a_backend_is_of_one_pipeline(pipe: Any, asked: list[str]) -> None:
    """Two pipelines in one process: the other, a later one and the process's default are as they were."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    default = Registry.get_active_backend()[0]
    other, call = pipelines.made("flux")
    plain = draw(pipe)
    assert set(asked) == {"native"}
    optimizer.apply(pipe, step(), HERE)
    for _ in range(2):
        asked.clear()
        assert np.abs(draw(pipe).astype(int) - plain).max() <= 1  # another order of sums, rounded to 8 bits
        assert set(asked) == {"_native_math"}
    asked.clear()
    for unchanged in (other, pipelines.made("flux")[0]):
        unchanged(**call)
    assert set(asked) == {"native"}
    assert Registry.get_active_backend()[0] == default
    optimizer.undo(pipe, step(), HERE)
    asked.clear()
    assert np.array_equal(draw(pipe), plain)
    assert set(asked) == {"native"}
    with pytest.raises(NotApplied):
        optimizer.verify(pipe, step(), HERE)


def test_a_backend_is_seen_to_hold(pipe: Any) -> None:
    with pytest.raises(NotApplied, match="ask for another"):
        optimizer.verify(pipe, step(), HERE)
    for _ in range(2):
        optimizer.apply(pipe, step(), HERE)
    assert "of transformer by _native_math" in optimizer.verify(pipe, step(), HERE)
    pipe.transformer.reset_attention_backend()
    with pytest.raises(NotApplied, match="ask for another"):
        optimizer.verify(pipe, step(), HERE)
    optimizer.undo(pipe, step(), HERE)
    processors = [p for several in optimizer._processors(pipe).values() for p in several]
    assert {p._attention_backend for p in processors} == {None}


def test_native_is_torchs_choice_whatever_the_process_says(pipe: Any, asked: list[str]) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    optimizer.apply(pipe, step("native"), HERE)
    with attention_backend("_native_math"):
        draw(pipe)
    assert set(asked) == {"native"}


def test_a_kernel_that_is_not_installed_is_an_error_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_from_pretrained", lambda *_: pytest.fail("it was loaded"))
    for backend, package in (("flash", "flash-attn"), ("xformers", "xformers")):
        made = plan(backend)
        with pytest.raises(IncompatibleError, match=f"cannot be {backend} here") as caught:
            made.load()
        assert package in caught.value.why


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.28")
    with pytest.raises(IncompatibleError) as caught:
        optimizer.before_start(step("xformers"))
    assert "0.0.28" in caught.value.why
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3")
    optimizer.before_start(step("flash"))


def test_a_unet_is_told_so_in_the_plan() -> None:
    pipe, _ = pipelines.made("sd")
    with pytest.raises(IncompatibleError, match="attention_backend cannot act on StableDiffusionPipeline"):
        optimizer.apply(pipe, step(), HERE)
    for model, acts in (("stable-diffusion-v1-5/stable-diffusion-v1-5", False), (None, True)):
        made = engine.resolve(model, optimizers=[step()], hardware=machine())
        assert ("attention_backend" in {n.optimizer for n in made.notes if n.kind == "no_effect"}) is not acts


@pytest.mark.rule("kernels-of-a-card-need-one")
def test_kernels_of_a_card_have_no_effect_without_one(pipe: Any) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)
    for backend, kernel in (
        ("_native_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("_native_cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(kernel), pytest.raises(RuntimeError, match="No viable backend"):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        made = engine.resolve(optimizers=[step(backend)], hardware=machine())
        assert [n.optimizer for n in made.notes if n.kind == "no_effect"] == ["attention_backend"]
        load.apply(made, pipe)
        assert not any(hasattr(p, "_dg_run_attention_backend") for p in pipe.transformer.attn_processors.values())
        made.undo(pipe)


@pytest.mark.rule("flash-attention-is-of-half-precision")
def test_a_kernel_that_does_not_fit_is_refused() -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    wide = torch.ones(1, 8, 1, 16)
    for backend in ("_native_flash", "_native_cudnn", "flash"):
        with pytest.raises(IncompatibleError, match="attention_backend cannot be used here"):
            plan(backend, dtype="float32")
    with pytest.raises(RuntimeError, match="No viable backend"):
        dispatch_attention_fn(wide, wide, wide, backend="_native_cudnn")


@pytest.mark.rule("flash-attention-from-ampere-on")
def test_flash_attention_is_for_ampere_and_later() -> None:
    for backend in ("_native_flash", "_native_cudnn", "flash"):
        with pytest.raises(IncompatibleError, match="attention_backend cannot be used here"):
            plan(backend, arch="7.5", dtype="float16")
    assert plan("_native_efficient", arch="7.5", dtype="float16").estimate is not None


def test_what_each_kernel_holds_is_in_the_estimate() -> None:
    """The matrix of scores is held by torch's own steps, and by no kernel."""
    plain, flash, efficient, apart = (
        plan(*named).estimate for named in ((), ("_native_flash",), ("_native_efficient",), ("_native_math",))
    )
    assert plain is not None and flash is not None and efficient is not None and apart is not None
    assert flash.peak_allocated_bytes == plain.peak_allocated_bytes
    assert efficient.peak_allocated_bytes is not None and apart.peak_allocated_bytes is not None
    denoise = [next(p.activation_bytes or 0 for p in e.phases if p.name == "denoise") for e in (plain, apart)]
    scores = 2 * (256 // 16) ** 4  # one head's scores, in half precision
    assert denoise[1] - denoise[0] > scores
    assert {e.quality for e in (flash, efficient, apart)} == {"exact"}


def test_what_is_not_known_of_a_kernel_is_not_guessed() -> None:
    for backend in ("flash", "xformers", "_native_cudnn"):
        made = plan(backend)
        assert made.estimate is None or made.estimate.peak_allocated_bytes is None
        (note,) = (n for n in made.notes if n.kind == "not_estimated")
        assert "is not known" in note.because or "is known of compute capability 9.0" in note.because
    assert plan("_native_cudnn", arch="9.0").estimate is not None


def test_a_run_that_stops_for_a_step_is_refused_and_not_stood_in_for() -> None:
    """In float32 no kernel but torch's own steps is left of what is named; the plain run does not stop."""
    request = Request(model="embedded", height=64, width=64, frames=None, batch=1)
    with pytest.raises(IncompatibleError, match=r"backend: _native_cudnn\) cannot be used for") as caught:
        run.trace(facts.find(None), request, "float32", [step("_native_cudnn")], is_plain=True)
    assert "no kernel of attention that is allowed" in caught.value.why


def test_a_named_kernel_is_not_cudnns() -> None:
    """On 9.0 torch prefers cuDNN's to both: a kernel that is named holds, and takes as long as, its own."""
    wide = (1, 20, 256, 300, 160)
    preferred, named = (Work("attention", "bfloat16", (*wide, k), 0) for k in (2, 2 + NAMED))
    assert workspaces.attention_bytes(preferred, (9, 0)) == 0
    assert workspaces.attention_bytes(named, (9, 0)) == 20 * 256 * 160 * 4
    hopper = clock.speeds(card(name="NVIDIA H100 80GB HBM3", arch="9.0"))
    assert hopper is not None
    flash = [Work("attention", "bfloat16", (1, 24, 4608, 4608, 128, k), 0) for k in (1, 1 + NAMED)]
    slower = [clock.work_seconds(w, hopper) for w in flash]
    assert slower[1] == pytest.approx(slower[0] * 0.62 / 0.34, rel=0.02)
