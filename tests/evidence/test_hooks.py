"""What is put on a whole component, and whether it is still there at the second call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines


@pytest.mark.rule("a-hook-on-a-component-before-model-offload", "context-parallel-before-model-offload")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_hook_after_model_offload_is_gone_from_the_second_call(counted: torch.device, is_first: bool) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    seen: list[int] = []

    class Counted(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **given: Any) -> Any:
            seen.append(1)
            return args, given

    pipe, call = pipelines.made("pixart")
    steps: list[Callable[[], Any]] = [
        lambda: HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Counted(), "counted"),
        lambda: small.apply(pipe, "model_offload"),
    ]
    for step in steps if is_first else steps[::-1]:
        step()
    pipe(**call)
    once = len(seen)
    pipe(**call)
    assert (once, len(seen) - once) == (2, 2 if is_first else 0)


@pytest.mark.rule("compile-before-model-offload", "compiling-in-place-goes-with-model-offload")
@pytest.mark.parametrize(
    ("by", "is_first"),
    [
        ("wrapper", True),
        ("wrapper", False),
        ("in_place", False),
        pytest.param("in_place", True, marks=pytest.mark.slow),
    ],
)
def test_a_wrapper_after_model_offload_is_gone_from_the_second_call(
    counted: torch.device, by: str, is_first: bool
) -> None:
    seen: list[int] = []

    def backend(module: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append(1)
            return module(*args)

        return run

    torch._dynamo.reset()
    pipe, call = pipelines.made("pixart")

    def compile_it() -> None:
        if by == "wrapper":
            pipe.transformer = torch.compile(pipe.transformer, backend=backend)
        else:
            pipe.transformer.compile(backend=backend)

    if is_first:
        compile_it()
    small.apply(pipe, "model_offload")
    if not is_first:
        compile_it()
    pipe(**call)
    once = len(seen)
    pipe(**call)
    torch._dynamo.reset()
    assert once > 0
    assert (len(seen) > once) is (is_first or by == "in_place")
