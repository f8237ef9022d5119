"""The evidence behind the rules: what the installed libraries really do with the embedded pipeline.

The offload hooks run with the CPU as their device: the hooks, the errors and the places of weights are the real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import draw

CPU = torch.device("cpu")


def hook(module: Any) -> str:
    return type(getattr(module, "_hf_hook", None)).__name__


def on_meta(module: Any) -> bool:
    return all(p.device.type == "meta" for p in module.parameters())


def group(pipe: Any, **more: Any) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", use_stream=False, **more)


def test_sequential_after_model_leaves_only_sequential(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert hook(pipe.transformer) == "CpuOffload"
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert hook(pipe.transformer) == "AlignDevicesHook"
    assert on_meta(pipe.transformer)


@pytest.mark.parametrize("first", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_group_after_an_offload_is_refused(pipe: Any, first: str) -> None:
    getattr(pipe, first)(device="cpu")
    with pytest.raises(ValueError, match="alternative offloading strategy"):
        group(pipe)


@pytest.mark.parametrize("second", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_an_offload_after_group_is_refused(pipe: Any, second: str) -> None:
    group(pipe)
    with pytest.raises(ValueError, match="group offloading enabled"):
        getattr(pipe, second)(device="cpu")


def test_moving_an_offloaded_pipeline_to_the_device_loses_the_offload(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        pipe.to("cpu")


def test_moving_a_group_offloaded_pipeline_does_nothing(pipe: Any) -> None:
    group(pipe)
    pipe.to(torch.float16)
    assert pipe.transformer.dtype == torch.float32


def test_casting_after_sequential_offload_casts_nothing(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer._hf_hook.weights_map["weight"].dtype == torch.float32


def test_casting_before_sequential_offload_casts(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.enable_sequential_cpu_offload(device="cpu")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer._hf_hook.weights_map["weight"].dtype == torch.float8_e4m3fn


def test_casting_that_computes_in_another_dtype_does_not_run(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        draw(pipe)


def _decodes(pipe: Any, name: str, **more: Any) -> int:
    """Return how often the VAE's decoder ran for one call."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = pipe.vae.decoder.register_forward_hook(counted)
    draw(pipe, **more)
    handle.remove()
    return count


def test_slicing_acts_only_on_batches(pipe: Any) -> None:
    pipe.vae.enable_slicing()
    assert _decodes(pipe, "one") == 1
    assert _decodes(pipe, "three", num_images_per_prompt=3) == 3
    pipe.vae.disable_slicing()
    assert _decodes(pipe, "three whole", num_images_per_prompt=3) == 1


def test_tiling_starts_strictly_above_the_tile(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    side = pipe.vae.config.sample_size
    assert _decodes(pipe, "equal", height=side, width=side) == 1
    assert _decodes(pipe, "larger", height=side + 16, width=side) > 1


def test_the_same_picture_in_slices(pipe: Any) -> None:
    whole = draw(pipe, num_images_per_prompt=2)
    pipe.vae.enable_slicing()
    assert np.abs(draw(pipe, num_images_per_prompt=2).astype(int) - whole).max() <= 1
