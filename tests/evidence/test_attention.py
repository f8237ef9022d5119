"""Attention: backends, slices, fused projections."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines


def _unet() -> Any:
    torch.manual_seed(0)
    return pipelines._unet().eval()


def _denoise(unet: Any, where: Any = small.CPU) -> Any:
    noise = torch.Generator().manual_seed(0)
    given = torch.randn(1, 4, 16, 16, generator=noise).to(where), 1, torch.randn(1, 8, 32, generator=noise).to(where)
    return unet(*given, return_dict=False)[0].cpu()


@pytest.fixture
def math_calls() -> Iterator[list[int]]:
    """The calls of the backend that is named `_native_math`; afterwards the default is what it was."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    seen: list[int] = []
    registry, name = _AttentionBackendRegistry, AttentionBackendName._NATIVE_MATH
    plain, (before, _) = registry._backends[name], registry.get_active_backend()

    def counted(*args: Any, **given: Any) -> Any:
        seen.append(1)
        return plain(*args, **given)

    registry._backends[name] = counted
    yield seen
    registry._backends[name] = plain
    registry.set_active_backend(before)


@pytest.mark.rule("an-attention-backend-is-of-the-process")
def test_a_backend_that_is_set_on_one_model_is_everybodys(math_calls: list[int]) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    one, other = small.transformer(), small.transformer()
    one.set_attention_backend("_native_math")
    small.forward(other)
    assert len(math_calls) == 4
    one.reset_attention_backend()
    math_calls.clear()
    small.forward(one)
    assert len(math_calls) == 4
    math_calls.clear()
    with attention_backend("native"):
        small.forward(one)
    assert not math_calls


@pytest.mark.rule("attention-backends-are-not-for-unets")
def test_a_unet_has_no_backends(math_calls: list[int]) -> None:
    unet, vae = _unet(), small.vae()
    unet.set_attention_backend("_native_math")
    vae.set_attention_backend("_native_math")
    _denoise(unet)
    vae.decode(small.latents())
    assert not math_calls
    assert not any(hasattr(p, "_attention_backend") for p in unet.attn_processors.values())
    assert {"UNet2DConditionModel"} <= small.listed("attention-backends-are-not-for-unets")


@pytest.mark.rule("an-attention-backend-needs-its-kernels")
def test_a_backend_without_its_kernels(math_calls: list[int]) -> None:
    for name in ("flash", "sage", "xformers"):
        with pytest.raises((RuntimeError, ImportError), match=r"(?i)not|install|usable"):
            small.transformer().set_attention_backend(name)
    small.transformer().set_attention_backend("_native_flash")  # taken, and seen to work or not when it runs


@pytest.mark.rule("attention-slicing-needs-a-unet")
def test_slices_of_a_pipeline_without_a_unet_are_passed_over() -> None:
    pipe, _ = pipelines.made("pixart")
    before = {type(p) for p in pipe.transformer.attn_processors.values()}
    pipe.enable_attention_slicing("max")
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == before
    unet = _unet()
    unet.set_attention_slice("max")
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert not hasattr(small.vae(), "set_attention_slice")


@pytest.mark.rule("attention-slicing-holds-scores")
@pytest.mark.parametrize("side", [16, 32])
def test_slices_hold_the_scores_that_a_fused_kernel_does_not(counted: torch.device, side: int) -> None:
    """The counted device computes attention by a fused kernel, as CUDA does."""

    def taken(slices: str | None) -> int:
        unet = _unet().to(counted)
        if slices is not None:
            unet.set_attention_slice(slices)
        given = torch.randn(2, 4, side, side).to(counted), 1, torch.randn(2, 8, 32).to(counted)
        return small.peak(lambda: unet(*given))

    assert taken("auto") >= taken("max") >= taken(None)
    assert side < 32 or taken("auto") > taken(None)


@pytest.mark.rule("fused-projections-stay-beside-the-old")
@pytest.mark.parametrize(
    ("made", "frees"), [(small.transformer, True), (_unet, False), (small.vae, False)], ids=["flux", "unet", "vae"]
)
def test_what_is_fused_stays_beside_what_it_was_made_of(made: Any, frees: bool) -> None:
    module = made()
    before = small.nbytes(module)
    module.fuse_qkv_projections()
    assert small.nbytes(module) > before
    module.unfuse_qkv_projections()
    assert (small.nbytes(module) == before) is frees


@pytest.mark.rule("fused-qkv-before-group-offload", "fused-qkv-before-sequential-offload")
def test_what_is_fused_later_is_not_where_it_computes(counted: torch.device) -> None:
    for is_first in (True, False):
        module = small.transformer()
        if is_first:
            module.fuse_qkv_projections()
        small.group(module, stream=True)
        if is_first:
            small.forward(module, counted)
            continue
        module.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="same device"):
            small.forward(module, counted)
    pipe, call = pipelines.made("pixart")
    small.apply(pipe, "sequential_offload")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pipe(**call)


@pytest.mark.rule("channels-last-before-what-copies-weights", "channels-last-goes-with-what-moves-weights")
@pytest.mark.parametrize("how", ["cpu_offload_with_hook", "cpu_offload", "leaf", "leaf, streamed", "block, streamed"])
def test_which_offloads_lose_channels_last(counted: torch.device, how: str) -> None:
    import accelerate

    def place(unet: Any) -> None:
        if how.startswith("cpu"):
            getattr(accelerate, how)(unet, counted)
        else:
            small.group(unet, "block_level" if "block" in how else "leaf_level", stream="streamed" in how)

    def laid_out(is_first: bool) -> bool:
        unet = _unet()
        if not is_first:
            place(unet)
        unet.to(memory_format=torch.channels_last)
        if is_first:
            place(unet)
        seen = []
        layer = unet.up_blocks[0].resnets[0].conv1
        plain = layer._conv_forward

        def convolve(x: Any, weight: Any, bias: Any) -> Any:
            seen.append(weight.is_contiguous(memory_format=torch.channels_last))
            return plain(x, weight, bias)

        layer._conv_forward = convolve
        _denoise(unet, counted)
        return bool(seen[0])

    assert laid_out(is_first=True)
    assert laid_out(is_first=False) is (how in ("cpu_offload_with_hook", "leaf"))


@pytest.mark.rule("attention-backends-are-for-those-that-ask")
def test_the_denoisers_that_ask_for_no_backend() -> None:
    """None of the processors that their modules have, or the modules that they take blocks from."""

    def nearby(module: str) -> set[str]:
        space = vars(sys.modules[module]).values()
        layers = {v for v in space if isinstance(v, type) and issubclass(v, torch.nn.Module)}
        return {module, *(v.__module__ for v in layers if v.__module__.startswith("diffusers."))}

    def asks(cls: type) -> bool:
        spaces = (vars(sys.modules[m]).values() for m in nearby(cls.__module__))
        return any(isinstance(v, type) and hasattr(v, "_attention_backend") for space in spaces for v in space)

    wanted = re.compile(r"Transformer|UNet|Prior")
    denoising = {n: c for n, c in small.models().items() if wanted.search(n) and "ControlNet" not in n}
    silent = {n for n, c in denoising.items() if not asks(c)}
    transformers = small.listed("attention-backends-are-for-those-that-ask")
    assert transformers == {n for n in silent if "UNet" not in n}
    assert silent - transformers <= small.listed("attention-backends-are-not-for-unets")
    assert not any(
        hasattr(p, "_attention_backend") for p in pipelines.made("sd3")[0].transformer.attn_processors.values()
    )
