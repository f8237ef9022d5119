"""The evidence behind the rules: what the installed libraries really do with the embedded pipeline.

The offload hooks run with the CPU as their device: the hooks, the errors and the places of weights are the real ones.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from engine import facts, optimizers
from engine.dryrun import build, run
from engine.errors import IncompatibleError
from engine.facts import attention, catalogue, widening
from engine.facts.model import Model
from engine.optimizers.spec import Context, denoisers
from engine.values import FrozenDict, Request
from tests.conftest import draw
from truth import pipelines

CPU = torch.device("cpu")


def hook(module: Any) -> str:
    return type(getattr(module, "_hf_hook", None)).__name__


def on_meta(module: Any) -> bool:
    return all(p.device.type == "meta" for p in module.parameters())


def group(pipe: Any, **more: Any) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", use_stream=False, **more)


@pytest.mark.rule("model-offload-or-sequential-offload")
def test_sequential_after_model_leaves_only_sequential(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert hook(pipe.transformer) == "CpuOffload"
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert hook(pipe.transformer) == "AlignDevicesHook"
    assert on_meta(pipe.transformer)


@pytest.mark.rule("model-offload-or-group-offload", "sequential-offload-or-group-offload")
@pytest.mark.parametrize("first", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_group_after_an_offload_is_refused(pipe: Any, first: str) -> None:
    getattr(pipe, first)(device="cpu")
    with pytest.raises(ValueError, match="alternative offloading strategy"):
        group(pipe)


@pytest.mark.rule("model-offload-or-group-offload", "sequential-offload-or-group-offload")
@pytest.mark.parametrize("second", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_an_offload_after_group_is_refused(pipe: Any, second: str) -> None:
    group(pipe)
    with pytest.raises(ValueError, match="group offloading enabled"):
        getattr(pipe, second)(device="cpu")


@pytest.mark.rule("resident-or-sequential-offload")
def test_moving_an_offloaded_pipeline_to_the_device_loses_the_offload(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        pipe.to("cpu")


@pytest.mark.rule("resident-or-group-offload")
def test_moving_a_group_offloaded_pipeline_does_nothing(pipe: Any) -> None:
    group(pipe)
    pipe.to(torch.float16)
    assert pipe.transformer.dtype == torch.float32


@pytest.mark.rule("casting-before-sequential-offload")
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


@pytest.mark.rule("casting-computes-in-the-dtype")
def test_casting_that_computes_in_another_dtype_does_not_run(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        draw(pipe)


def fuse(pipe: Any) -> Any:
    """Return the first fused layer of a FLUX pipeline, once it is made."""
    step = optimizers.spec("fuse_qkv").step()
    optimizers.get("fuse_qkv").apply(pipe, step, Context(device="cpu", dtype="float32"))
    return pipe.transformer.transformer_blocks[0].attn.to_qkv


@pytest.mark.rule("fused-qkv-before-casting")
@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
def test_fusing_after_casting_does_not_run(pipe: Any, storage: torch.dtype) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if storage == torch.float8_e4m3fn:
        with pytest.raises(NotImplementedError, match="Float8"):
            fuse(pipe)
        return
    assert fuse(pipe).weight.dtype == storage
    with pytest.raises(RuntimeError, match="same dtype"):
        draw(pipe)


def test_fusing_before_casting_casts_the_fused_weights(pipe: Any) -> None:
    layer = fuse(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert layer.weight.dtype == torch.float16
    draw(pipe)


@pytest.mark.rule("fused-qkv-before-sequential-offload")
def test_fusing_after_sequential_offload_does_not_run(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    layer = fuse(pipe)
    assert on_meta(layer)
    assert not hasattr(layer, "_hf_hook")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        layer(torch.zeros(1, layer.in_features)) + torch.zeros(1, layer.out_features)


@pytest.mark.rule("fused-qkv-before-group-offload")
@pytest.mark.parametrize("is_first", [True, False])
def test_layers_fused_after_group_offload_are_in_no_group(pipe: Any, is_first: bool) -> None:
    if is_first:
        layer = fuse(pipe)
        group(pipe)
    else:
        group(pipe)
        layer = fuse(pipe)
    assert hasattr(pipe.transformer.transformer_blocks[0].attn.to_q, "_diffusers_hook")
    assert hasattr(layer, "_diffusers_hook") is is_first


@pytest.mark.rule("fused-qkv-or-sliced-attention")
def test_of_fused_and_sliced_attention_the_second_undoes_the_first() -> None:
    pipe, _ = pipelines.made("sd")
    run.change(pipe, [optimizers.spec(n).step() for n in ("attention_slicing", "fuse_qkv")], "float32")
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    pipe, call = pipelines.made("sd")
    run.change(pipe, [optimizers.spec(n).step() for n in ("fuse_qkv", "attention_slicing")], "float32")
    assert _fused_that_compute(pipe, call) == 0


def _fused_that_compute(pipe: Any, call: dict[str, Any]) -> int:
    """Return how many fused layers of the denoiser run in one call."""
    used = set()
    for module in denoisers(pipe).values():
        for path, layer in module.named_modules():
            if path.endswith(("to_qkv", "to_kv", "to_added_qkv")):
                layer.register_forward_hook(lambda *_, path=path: used.add(path))
    pipe(**call)
    return len(used)


def _shallow(name: str) -> Model:
    """Return a model of the catalogue with two blocks of each kind in its denoiser, where that is a number."""
    model = facts.find(name)
    parts = dict(model.components)
    for key in set(parts) & set(attention.DENOISERS):
        part = parts[key]
        fewer = {k: 2 for k, v in part.config.items() if k.startswith("num_") and k.endswith("layers") and v}
        parts[key] = dataclasses.replace(part, config=FrozenDict({**part.config, **fewer}))
    return dataclasses.replace(model, components=FrozenDict(parts))


# A model of the catalogue for each class of denoiser.
OF_CLASS = {
    type_of: (model, name)
    for model in map(_shallow, catalogue.ids())
    for name in attention.DENOISERS
    if name in model.components and (type_of := model.class_of(model.components[name]))
}


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "pixart", "wan"])
def test_a_denoiser_that_fuses_computes_with_the_fused_weights(name: str) -> None:
    pipe, call = pipelines.made(name)
    run.change(pipe, [optimizers.spec("fuse_qkv").step()], "float32")
    assert _fused_that_compute(pipe, call) >= 3


TINY = {"UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"}


@pytest.mark.parametrize(
    "cls",
    [
        c if i % 3 == 1 else pytest.param(c, marks=pytest.mark.slow)
        for i, c in enumerate(sorted(attention.FUSES - TINY - {"WanTransformer3DModel"}))
    ],
)
def test_the_classes_that_are_said_to_fuse_compute_so_in_a_dry_run(cls: str) -> None:
    model, name = OF_CLASS[cls]
    frames = None if model.defaults.frames is None else 9
    request = Request(model=model.id, height=256, width=256, frames=frames, call=model.defaults.call)
    found = run.trace(model, request, "bfloat16", (optimizers.spec("fuse_qkv").step(),))
    assert any(e.sign == ">" and e.name.startswith(name) and e.name.endswith(("to_qkv", "to_kv")) for e in found.told())


@pytest.mark.rule("fused-qkv-needs-an-attention-that-fuses")
@pytest.mark.parametrize("cls", sorted(attention.FUSES_NOT - {"LTXVideoTransformer3DModel"}))
def test_a_denoiser_that_is_said_not_to_fuse_does_not(cls: str) -> None:
    model, name = OF_CLASS[cls]
    module = build._component(model, name, model.components[name], torch.bfloat16)
    if not hasattr(module, "fuse_qkv_projections"):
        return
    try:
        module.fuse_qkv_projections()
    except (AttributeError, RuntimeError, ValueError):
        return
    assert not any(getattr(m, "fused_projections", False) for m in module.modules())


@pytest.mark.rule("fused-qkv-needs-an-attention-that-fuses")
def test_what_ltx_fuses_is_never_used() -> None:
    pipe, call = pipelines.made("ltx")
    with pytest.raises(IncompatibleError, match="fuse_qkv cannot act on LTXPipeline"):
        run.change(pipe, [optimizers.spec("fuse_qkv").step()], "float32")
    pipe.transformer.fuse_qkv_projections()
    assert any(m.fused_projections for m in pipe.transformer.modules() if hasattr(m, "fused_projections"))
    assert _fused_that_compute(pipe, call) == 0


@pytest.mark.rule("fused-qkv-needs-an-attention-that-fuses")
def test_fused_attention_without_a_text_does_not_run() -> None:
    """Stable Diffusion 3.5 medium has such a second attention in its first blocks."""
    from diffusers import SD3Transformer2DModel

    pipe, call = pipelines.made("sd3")
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = SD3Transformer2DModel(**config | {"dual_attention_layers": (0,)})
    pipe(**call)
    with pytest.raises(IncompatibleError, match="fuse_qkv cannot act"):
        run.change(pipe, [optimizers.spec("fuse_qkv").step()], "float32")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(AttributeError, match="ndim"):
        pipe(**call)


@pytest.mark.rule("attention-slicing-needs-a-unet")
def test_only_some_unets_have_sliced_attention() -> None:
    for cls in attention.SLICES | attention.FUSES | attention.FUSES_NOT:
        assert hasattr(getattr(diffusers, cls), "set_attention_slice") is (cls in attention.SLICES), cls


def _widened_in(source: str) -> str:
    if re.search(r"^ +if self\.vae\.config\.force_upcast:", source, re.MULTILINE):
        return "any"
    is_asked = re.search(r"self\.\w+\.dtype == torch\.float16 and self\.\w+\.config\.force_upcast", source)
    return "float16" if is_asked else "other"


def test_the_pipelines_that_are_said_to_widen_their_vae_are_those_that_do() -> None:
    """By their source, as there are too many to run; `tests/test_truth.py` runs some."""
    found: dict[str, set[str]] = {"float16": set(), "any": set(), "other": set()}
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = file.read_text(encoding="utf-8")
        if "force_upcast" not in text:
            continue
        for node in ast.parse(text).body:
            source = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.ClassDef) and "force_upcast" in source:
                found[_widened_in(source)].add(node.name)
    assert found == {"float16": widening.IN_FLOAT16, "any": widening.IN_ANY_PRECISION, "other": set()}


def test_what_a_vae_is_without_being_told_is_what_its_class_says() -> None:
    for cls, value in widening._UNLESS_TOLD.items():
        assert inspect.signature(getattr(diffusers, cls)).parameters["force_upcast"].default is value, cls
    for cls in widening._NEVER:
        assert "self.register_to_config(force_upcast=False)" in inspect.getsource(getattr(diffusers, cls)), cls


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


@pytest.mark.rule("slicing-a-single-picture")
def test_slicing_acts_only_on_batches(pipe: Any) -> None:
    pipe.vae.enable_slicing()
    assert _decodes(pipe, "one") == 1
    assert _decodes(pipe, "three", num_images_per_prompt=3) == 3
    pipe.vae.disable_slicing()
    assert _decodes(pipe, "three whole", num_images_per_prompt=3) == 1


@pytest.mark.rule("tiling-a-small-picture")
def test_tiling_starts_strictly_above_the_tile(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    side = pipe.vae.config.sample_size
    assert _decodes(pipe, "equal", height=side, width=side) == 1
    assert _decodes(pipe, "larger", height=side + 16, width=side) > 1


def test_the_same_picture_in_slices(pipe: Any) -> None:
    whole = draw(pipe, num_images_per_prompt=2)
    pipe.vae.enable_slicing()
    assert np.abs(draw(pipe, num_images_per_prompt=2).astype(int) - whole).max() <= 1
