"""`compile`: which blocks are, that they are called compiled, and what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import optimizers
from engine.errors import IncompatibleError
from engine.optimizers import compile as compiling
from engine.optimizers.spec import Context, NotApplied
from engine.run import applied, load
from engine.run.progress import Quiet
from tests.conftest import card, machine
from tests.test_run import ACTING
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    compiling._refuse_without_tools.cache_clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    compiling._refuse_without_tools.cache_clear()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch follow what is computed, and compute it as ever."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


def made(**params: Any) -> Any:
    return optimizers.spec("compile").step(params)


def picture(pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def _drawn_compiled(*steps: Any) -> None:
    pipe, call = pipelines.made("flux")
    plain = picture(pipe, call)
    load.apply_all(steps, pipe, HERE, Quiet())
    with pytest.raises(NotApplied, match=r"there is no compiled code for transformer_blocks.0"):
        load.verify_after_call(pipe)
    for _ in range(2):
        assert np.abs(picture(pipe, call) - plain).max() < 1e-4
    assert "computed with compiled code" in load.verify_after_call(pipe)[str(steps[0])]


@pytest.mark.parametrize("placement", [None, "model_offload"])
def test_blocks_are_compiled_and_draw_the_same_twice_in_a_row(eager: None, placement: str | None) -> None:
    other = [] if placement is None else [optimizers.spec(placement).step(ACTING[placement]["params"])]
    _drawn_compiled(made(), *other)


@pytest.mark.slow
def test_blocks_are_compiled_into_kernels_of_their_own() -> None:
    _drawn_compiled(made())


def test_one_block_that_is_not_compiled_is_seen_and_all_are_plain_after_an_undo(eager: None) -> None:
    pipe, _ = pipelines.made("flux")
    load.apply_all([made()], pipe, HERE, Quiet())
    block = pipe.transformer.single_transformer_blocks[0]
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    with pytest.raises(NotApplied, match=r"single_transformer_blocks.0 of transformer is not compiled"):
        optimizers.get("compile").verify(pipe, made(), HERE)
    block._compiled_call_impl = compiled
    applied.undo(pipe, load._planned([made()], pipe), HERE, Quiet())
    assert not any(m._compiled_call_impl for m in pipe.transformer.modules())


def test_the_whole_denoiser_is_compiled_where_its_blocks_are_not_named(eager: None) -> None:
    pipe, _ = pipelines.made("sd3")
    with pytest.raises(IncompatibleError, match="compile cannot act on transformer by regions"):
        load.apply_all([made()], pipe, HERE, Quiet())
    load.apply_all([made(scope="whole")], pipe, HERE, Quiet())
    assert pipe.transformer._compiled_call_impl is not None


def test_what_somebody_else_compiled_is_seen(eager: None, pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")
    plan = engine.resolve(optimizers=["resident"], hardware=machine())
    with pytest.raises(IncompatibleError, match="compile acts on this pipeline already, and is not in the plan"):
        plan.apply(pipe)


def test_without_a_compiler_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(IncompatibleError, match="compile cannot act on this machine") as caught:
        optimizers.get("compile").load_arguments(made(), HERE)
    assert "apt install g++" in caught.value.do
    plan = engine.resolve(optimizers=["compile"], hardware=machine())
    with pytest.raises(IncompatibleError, match="compile cannot act on this machine"):
        plan.load()


def test_without_triton_it_is_refused_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(IncompatibleError, match="compile cannot act on this machine") as caught:
        optimizers.get("compile").load_arguments(made(), Context(device="cuda", dtype="bfloat16"))
    assert "pip install triton" in caught.value.do


def test_a_plan_with_it_has_no_estimate_and_says_why() -> None:
    plan = engine.resolve(optimizers=["compile", "resident"], hardware=machine(card()))
    assert plan.estimate.peak_allocated_bytes is None and plan.estimate.seconds is None and plan.fits is None
    assert any(n.kind == "not_estimated" and "compile is not estimated" in n.because for n in plan.notes)
