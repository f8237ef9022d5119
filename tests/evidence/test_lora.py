"""LoRA: in which order it is loaded and fused beside casting and offloads. These tests take peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines

pytest.importorskip("peft")


def _drawn(*steps: str) -> Any:
    pipe, call = pipelines.made("sd3")
    for step in steps:
        match step:
            case "lora":
                pipe.load_lora_weights(small.lora(pipe.transformer))
            case "fuse_lora":
                pipe.fuse_lora()
            case "fp8":
                small.cast(pipe.transformer)
            case "bf16":
                small.cast(pipe.transformer, torch.bfloat16)
            case _:
                small.apply(pipe, step)
    return small.draw(pipe, call)


@pytest.fixture(scope="module")
def with_it() -> Any:
    return _drawn("lora")


@pytest.fixture(scope="module")
def without_it() -> Any:
    return _drawn()


@pytest.mark.rule("fused-lora-before-sequential-offload", "lora-goes-with-offloads")
def test_a_lora_that_is_fused_after_sequential_offload_is_lost(
    counted: torch.device, with_it: Any, without_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.pipelines.pipeline_utils as library

    # Loading sets the offload anew, on whatever accelerator the library finds by itself.
    monkeypatch.setattr(library, "get_device", lambda: str(counted))
    assert not small.alike(with_it, without_it, 1e-2)
    for right in (
        ("lora", "fuse_lora", "sequential_offload"),
        ("lora", "sequential_offload"),
        ("sequential_offload", "lora"),
        ("model_offload", "lora", "fuse_lora"),
        ("group_offload", "lora", "fuse_lora"),
        ("lora", "group_offload", "fuse_lora"),
    ):
        assert small.alike(_drawn(*right), with_it, 5e-3), right
    for wrong in (("sequential_offload", "lora", "fuse_lora"), ("lora", "sequential_offload", "fuse_lora")):
        assert small.alike(_drawn(*wrong), without_it, 5e-3), wrong


@pytest.mark.rule("lora-before-casting-to-float8")
def test_a_lora_is_not_loaded_into_float8() -> None:
    with pytest.raises(NotImplementedError, match="Float8"):
        _drawn("fp8", "lora")
    _drawn("lora", "fp8")
    _drawn("bf16", "lora")


@pytest.mark.rule("fused-lora-before-casting-to-float8")
def test_a_lora_is_not_fused_in_float8() -> None:
    with pytest.raises(RuntimeError, match="Float8"):
        _drawn("lora", "fp8", "fuse_lora")
    _drawn("lora", "fuse_lora", "fp8")


@pytest.mark.rule("fusing-a-lora-needs-one")
def test_without_a_lora_there_is_nothing_to_fuse(without_it: Any) -> None:
    pipe, call = pipelines.made("sd3")
    pipe.fuse_lora()
    assert small.alike(small.draw(pipe, call), without_it, 1e-6)
