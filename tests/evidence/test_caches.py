"""Caches between steps: beside placements, twice, and which models have them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines

STEPS = 4


def _config(method: str) -> Any:
    import diffusers

    if method == "first_block":
        return diffusers.FirstBlockCacheConfig(threshold=1e9)
    return diffusers.MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=0.0, threshold=10.0
    )


def _pipe() -> Any:
    pipe, call = pipelines.made("flux")
    pipe.transformer = small.transformer(blocks=2)
    return pipe, call


def _forwards(module: Any, where: Any) -> int:
    """Return how often the second block computes in some steps."""
    seen = small.calls(module.transformer_blocks[1].ff.net[0].proj)
    for _ in range(STEPS):
        with module.cache_context("cond"):
            small.forward(module, where)
    return len(seen)


@pytest.mark.rule("a-cache-before-streamed-blocks", "caches-go-with-placements")
@pytest.mark.parametrize("method", ["first_block", "mag"])
@pytest.mark.parametrize(
    "how", ["cpu_offload_with_hook", "cpu_offload", "leaf", "leaf, streamed", "block", "block, streamed"]
)
def test_a_cache_after_streamed_blocks_is_silently_off(counted: torch.device, method: str, how: str) -> None:
    import accelerate

    def place(module: Any) -> None:
        if how.startswith("cpu"):
            getattr(accelerate, how)(module, counted)
        else:
            small.group(module, "block_level" if "block" in how else "leaf_level", stream="streamed" in how)

    for is_first in (True, False):
        module = small.transformer()
        if not is_first:
            place(module)
        module.enable_cache(_config(method))
        if is_first:
            place(module)
        is_off = how == "block, streamed" and not is_first
        assert _forwards(module, counted) == (STEPS if is_off else 1), is_first


@pytest.mark.rule("one-cache-at-a-time")
def test_a_second_cache_is_refused() -> None:
    module = small.transformer()
    module.enable_cache(_config("first_block"))
    with pytest.raises(ValueError, match="already been enabled"):
        module.enable_cache(_config("mag"))


@pytest.mark.rule("a-cache-needs-its-context")
def test_a_cache_is_called_in_its_context() -> None:
    module = small.transformer()
    module.enable_cache(_config("first_block"))
    with pytest.raises(ValueError, match=r"No context is set|No cache context"):
        small.forward(module)


@pytest.mark.rule("models-without-a-cache")
def test_the_denoisers_that_have_no_cache() -> None:
    from diffusers.models.cache_utils import CacheMixin

    assert not hasattr(pipelines._unet(), "enable_cache")
    with_cache = {n for n, c in small.models().items() if issubclass(c, CacheMixin)}
    denoisers = {n for n in small.models() if "Transformer" in n or "UNet" in n}
    assert denoisers - with_cache == small.listed("models-without-a-cache")


def _classes(folder: str) -> Iterator[ast.ClassDef]:
    import diffusers

    for path in (Path(diffusers.__file__).parent / folder).rglob("*.py"):
        yield from (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))


@pytest.mark.rule("pipelines-that-name-no-call")
def test_the_pipelines_that_do_not_name_the_call_of_a_cache() -> None:
    cached = {c.name for c in _classes("models") if any(ast.unparse(b) == "CacheMixin" for b in c.bases)}
    nameless = set()
    for cls in _classes("pipelines"):
        own = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
        if not {"__init__", "__call__"} <= set(own) or "cache_context" in ast.unparse(own["__call__"]):
            continue
        taken = [a.annotation for a in own["__init__"].args.args if a.arg in ("transformer", "transformer_2", "unet")]
        if any(name in ast.unparse(kind) for kind in taken if kind is not None for name in cached):
            nameless.add(cls.name)
    assert nameless == small.listed("pipelines-that-name-no-call")


@pytest.mark.rule("faster-cache-computes-its-first-step")
@pytest.mark.parametrize(("high", "runs"), [(901, True), (2000, False)])
def test_faster_cache_without_guidance_computes_its_first_step(high: int, runs: bool) -> None:
    from diffusers import FasterCacheConfig

    module, now = small.transformer(), [1000]
    module.enable_cache(
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, high),
            current_timestep_callback=lambda: now[0],
            attention_weight_callback=lambda _: 0.3,
            tensor_format="BCHW",
            is_guidance_distilled=True,
            spatial_attention_block_identifiers=("transformer_blocks",),
        )
    )

    def denoise() -> None:
        for step in range(6):
            now[0] = 1000 - 150 * step
            with module.cache_context("cond"):
                small.forward(module)

    if runs:
        denoise()
    else:
        with pytest.raises(TypeError, match="NoneType"):
            denoise()


@pytest.mark.rule("what-a-cache-keeps")
@pytest.mark.parametrize("method", ["first_block", "mag"])
def test_a_cache_takes_memory_until_it_is_reset(counted: torch.device, method: str) -> None:
    def taken(is_cached: bool) -> int:
        module = small.transformer().to(counted)
        if is_cached:
            module.enable_cache(_config(method))

        def denoise() -> None:
            for _ in range(STEPS):
                with module.cache_context("cond"):
                    small.forward(module, counted)

        return small.peak(denoise)

    assert taken(True) > taken(False)
