"""Layerwise casting beside placements, text encoders, VAEs, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines


@pytest.mark.rule("casting-before-streamed-groups", "casting-goes-with-model-offload-and-unstreamed-groups")
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("stream", [True, False])
def test_casting_after_streamed_groups_is_undone(counted: torch.device, kind: str, stream: bool) -> None:
    module = small.transformer()
    plain = small.forward(module)
    small.cast(module)
    cast = small.forward(module)
    assert not small.alike(cast, plain)
    for is_first in (True, False):
        module = small.transformer()
        if is_first:
            small.cast(module)
        small.group(module, kind, stream=stream)
        if not is_first:
            small.cast(module)
        small.forward(module, counted)
        found = small.forward(module, counted)
        if is_first or not stream:
            assert small.alike(found, cast)
        elif kind == "leaf_level":
            assert small.alike(found, plain)
        else:  # what is in no block is not streamed, and stays cast
            assert not small.alike(found, cast)
            assert module.transformer_blocks[0].ff.net[0].proj.weight.dtype == torch.float32


@pytest.mark.rule("casting-before-sequential-offload", "casting-goes-with-model-offload-and-unstreamed-groups")
@pytest.mark.parametrize("offload", ["model_offload", "sequential_offload"])
def test_the_order_of_casting_and_an_offload(counted: torch.device, offload: str) -> None:
    def drawn(*steps: str) -> Any:
        pipe, call = pipelines.made("pixart")
        for name in steps:
            if name == "layerwise_casting":
                small.cast(pipe.transformer)
            else:
                small.apply(pipe, name)
        return small.draw(pipe, call)

    first, second, plain = drawn("layerwise_casting", offload), drawn(offload, "layerwise_casting"), drawn(offload)
    assert not small.alike(first, plain, 1e-4)
    assert small.alike(second, plain if offload == "sequential_offload" else first, 1e-4)


@pytest.mark.rule("pinned-copies-are-as-wide-as-the-weights-were")
def test_what_is_pinned_is_what_was_there(counted: torch.device) -> None:
    before = small.pinned()
    wide = small.transformer()
    small.group(wide, stream=True)
    whole = small.pinned() - before
    assert whole == small.nbytes(small.transformer())
    small.cast(wide)
    narrow = small.transformer()
    small.cast(narrow)
    cast = small.nbytes(narrow)
    small.group(narrow, stream=True)
    assert small.pinned() - before - whole == cast < whole


@pytest.mark.rule("what-is-cast-after-grouping-travels-wide")
@pytest.mark.parametrize("is_first", [True, False])
def test_in_which_precision_a_cast_layer_travels(counted: torch.device, is_first: bool) -> None:
    module = small.transformer()
    if is_first:
        small.cast(module)
    small.group(module)
    if not is_first:
        small.cast(module)
    layer = module.transformer_blocks[0].ff.net[0].proj
    moved = layer._diffusers_hook.get_hook("group_offloading").group
    seen = []
    plain = moved._transfer_tensor_to_device

    def transfer(tensor: Any, source: Any, where: Any) -> None:
        seen.append(source.dtype)
        plain(tensor, source, where)

    moved._transfer_tensor_to_device = transfer
    small.forward(module, counted)
    assert seen[0] == (small.FP8 if is_first else torch.float32)


@pytest.mark.rule("t5-is-cast-without-its-wo")
def test_a_t5_that_is_cast_whole_does_not_run() -> None:
    from diffusers.hooks import apply_layerwise_casting

    module = small.t5().to(torch.bfloat16)
    assert not hasattr(module, "enable_layerwise_casting")
    apply_layerwise_casting(module, small.FP8, torch.bfloat16)
    with pytest.raises(RuntimeError, match="Float8"):
        module(small.ids())
    module = small.t5().to(torch.bfloat16)
    apply_layerwise_casting(module, small.FP8, torch.bfloat16, skip_modules_pattern=("wo", "norm"))
    assert not module(small.ids())[0].isnan().any()
    other = small.clip().to(torch.bfloat16)
    apply_layerwise_casting(other, small.FP8, torch.bfloat16)
    assert not other(small.ids())[0].isnan().any()


@pytest.mark.rule("a-cast-vae-is-not-widened")
def test_a_cast_vae_that_is_widened_does_not_run(counted: torch.device) -> None:
    pipe, call = pipelines.made("sdxl")
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    pipe.to(counted)
    small.cast(pipe.vae, compute=torch.float16)
    with pytest.raises(RuntimeError, match="Half"):
        small.draw(pipe, call | {"num_inference_steps": 1})


@pytest.mark.rule("casting-leaves-what-a-class-keeps-wide")
def test_what_a_class_keeps_wide_is_not_cast() -> None:
    pipe, _ = pipelines.made("wan")
    module = pipe.transformer
    assert "time_embedder" in module._keep_in_fp32_modules
    small.cast(module)
    wide = {n for n, p in module.named_parameters() if p.dtype == torch.float32}
    assert any("time_embedder" in n for n in wide)
    assert any(p.dtype == small.FP8 for p in module.parameters())


@pytest.mark.rule("channels-last-goes-with-casting")
@pytest.mark.parametrize("is_first", [True, False])
def test_channels_last_survives_casting(is_first: bool) -> None:
    def laid_out(module: Any) -> int:
        return sum(
            p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
            for p in module.parameters()
            if p.dim() == 4
        )

    module = pipelines._unet().eval()
    if is_first:
        module.to(memory_format=torch.channels_last)
    small.cast(module)
    if not is_first:
        module.to(memory_format=torch.channels_last)
    before = laid_out(module)
    module(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 8, 32))
    assert laid_out(module) == before > 0
