"""The names that trainers give the layers of a LoRA: whichever they are, what the library would add is fused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine import facts
from engine.errors import ModelError
from engine.facts import loras
from engine.facts.model import Model
from engine.run import fuse, parts
from engine.values import Request
from truth import pipelines, saved

RANK, ALPHA = 4, 2.0
FLUX = "black-forest-labs/FLUX.1-dev"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
State = dict[str, torch.Tensor]
Sizes = Iterable[tuple[str, tuple[int, int]]]


def layers(module: Any, *ends: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the linear layers with these ends, by name: (out, in)."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
            yield name, (layer.out_features, layer.in_features)


def spelt(sizes: Sizes, name: Callable[[str], str], down: str, up: str, alpha: float | None = None) -> State:
    """Return a random LoRA for these layers, called as a trainer does."""
    noise, found = torch.Generator().manual_seed(1), {}
    for layer, (rows, columns) in sizes:
        found[f"{name(layer)}{down}.weight"] = torch.randn(RANK, columns, generator=noise) / 8
        found[f"{name(layer)}{up}.weight"] = torch.randn(rows, RANK, generator=noise) / 8
        if alpha is not None:
            found[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return found


def kohya(prefix: str, sizes: Sizes) -> State:
    return spelt(sizes, lambda n: prefix + n.replace(".", "_"), ".lora_down", ".lora_up", ALPHA)


def kohya_clip(prefix: str, encoder: Any, *ends: str) -> State:
    """CLIP's layers lie within a `text_model`, as they did when these files were made."""
    return kohya(f"{prefix}text_model_", ((n.removeprefix("text_model."), s) for n, s in layers(encoder, *ends)))


def peft(prefix: str, sizes: Sizes) -> State:
    return spelt(sizes, lambda n: prefix + n, ".lora_A", ".lora_B")


def _processors(unet: Any) -> State:
    """diffusers of 2023: `….attn1.processor.to_q_lora.down.weight`."""

    def name(layer: str) -> str:
        block, _, rest = layer.rpartition(".attn")
        number, _, projection = rest.partition(".")
        return f"unet.{block}.attn{number}.processor.{projection.replace('to_out.0', 'to_out')}_lora"

    return spelt(layers(unet, *ATTENTION), name, ".down", ".up")


def _wan(transformer: Any) -> Sizes:
    """Wan's own names."""
    width, wide = transformer.blocks[0].ffn.net[0].proj.in_features, transformer.config.ffn_dim
    for i in range(transformer.config.num_layers):
        for attention, projection in itertools.product(("self_attn", "cross_attn"), "qkvo"):
            yield f"blocks.{i}.{attention}.{projection}", (width, width)
        yield f"blocks.{i}.ffn.0", (wide, width)
        yield f"blocks.{i}.ffn.2", (width, wide)


def _xlabs(transformer: Any) -> State:
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    kinds = {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}
    sizes = [
        (f"double_blocks.{i}.processor.{kind}", (times * width, width))
        for i in range(transformer.config.num_layers)
        for kind, times in kinds.items()
    ]
    return spelt(sizes, str, ".down", ".up")


SPELLINGS: dict[str, tuple[str, Callable[[Any], State]]] = {
    "kohya, Stable Diffusion": (
        "sd",
        lambda p: (
            kohya("lora_unet_", layers(p.unet, *ATTENTION, "proj_in", "ff.net.0.proj"))
            | kohya_clip("lora_te_", p.text_encoder, *CLIP)
        ),
    ),
    "kohya, SDXL": (
        "sdxl",
        lambda p: (
            kohya("lora_unet_", layers(p.unet, *ATTENTION))
            | kohya_clip("lora_te1_", p.text_encoder, *CLIP)
            | kohya_clip("lora_te2_", p.text_encoder_2, *CLIP)
        ),
    ),
    "processors of diffusers": ("sd", lambda p: _processors(p.unet)),
    "layers of diffusers": (
        "sd",
        lambda p: spelt(layers(p.unet, *ATTENTION), lambda n: f"unet.{n}", ".lora.down", ".lora.up"),
    ),
    "a text encoder of diffusers": (
        "sd",
        lambda p: spelt(
            layers(p.text_encoder, "q_proj", "out_proj"),
            lambda n: f"text_encoder.text_model.{n.removeprefix('text_model.')}",
            ".lora_linear_layer.down",
            ".lora_linear_layer.up",
        ),
    ),
    "XLabs, FLUX": ("flux", lambda p: _xlabs(p.transformer)),
    "ComfyUI, Wan": ("wan", lambda p: peft("diffusion_model.", _wan(p.transformer))),
    "kohya, Wan": ("wan", lambda p: kohya("lora_unet_", _wan(p.transformer))),
    "ComfyUI, Qwen-Image": ("qwen_image", lambda p: peft("diffusion_model.", layers(p.transformer, *ATTENTION))),
    "kohya, Qwen-Image": ("qwen_image", lambda p: kohya("lora_unet_", layers(p.transformer, *ATTENTION))),
    "Lightning, Qwen-Image": (
        "qwen_image",
        lambda p: spelt(layers(p.transformer, *ATTENTION), str, ".lora_down", ".lora_up", ALPHA),
    ),
    "ComfyUI, LTX": ("ltx", lambda p: peft("diffusion_model.", layers(p.transformer, *ATTENTION))),
    "peft, SD3": ("sd3", lambda p: peft("transformer.", layers(p.transformer, "to_q", "add_k_proj"))),
}


def written(state: State, folder: Path) -> Path:
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def change_of(file: Path, model: Model, twins: dict[str, Any]) -> Any:
    asked = loras.read([file], model)
    return fuse.fusing(dataclasses.replace(Request(model="any"), loras=asked), model, twins)


def flux(model: Model) -> dict[str, Any]:
    """Return a twin of FLUX's transformer."""
    return parts.twins(model, "bfloat16", ["text_encoder", "text_encoder_2", "vae"])


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_fused_is_what_the_librarys_own_adapter_adds(spelling: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    architecture, make = SPELLINGS[spelling]
    plain, theirs, ours = (pipelines.made(architecture)[0] for _ in range(3))
    file = written(make(plain), tmp_path)
    theirs.load_lora_weights(file, adapter_name="any")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    change = change_of(file, saved.model(architecture), modules(ours))
    for name, module in modules(ours).items():
        change(name, module)
    changed = 0
    for name, module in modules(ours).items():
        wanted, before = (dict(getattr(p, name).named_parameters()) for p in (theirs, plain))
        for path, weight in module.named_parameters():
            assert torch.allclose(weight, wanted[path], atol=1e-6), f"{name}.{path}"
            changed += not torch.equal(weight, before[path])
    halves = sum(key.endswith(".weight") for key in make(plain))
    assert changed >= halves / 2


@pytest.mark.parametrize(
    ("ends", "make", "scale"),
    [
        (("q_proj", "v_proj"), lambda encoder: kohya_clip("lora_te_", encoder, "q_proj", "v_proj"), ALPHA / RANK),
        (("fc1",), lambda encoder: peft("text_encoder.", layers(encoder, "fc1")), 1.0),
    ],
    ids=["kohya", "peft"],
)
def test_a_text_encoder_in_part_is_fused_where_the_library_does_not_know_the_spelling(
    ends: tuple[str, ...], make: Callable[[Any], State], scale: float, tmp_path: Path
) -> None:
    """diffusers 0.42 tells spellings apart by layers that need not be there, and raises or passes the file by."""
    plain, ours = (pipelines.made("sd")[0].text_encoder for _ in range(2))
    state = make(plain)
    change_of(written(state, tmp_path), saved.model("sd"), {"text_encoder": ours})("text_encoder", ours)
    halves = [v for k, v in state.items() if not k.endswith("alpha")]
    acted = [name for name, _ in layers(plain, *ends)]
    for name, down, up in zip(acted, halves[::2], halves[1::2], strict=True):
        before, now = (e.get_submodule(name).weight for e in (plain, ours))
        assert torch.allclose(now, before + scale * (up @ down), atol=1e-6)


FUSED = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
}
"""What FLUX's own code has in one layer, and diffusers in several side by side."""


@pytest.mark.parametrize("spelling", ["kohya", "ComfyUI"])
def test_what_was_trained_of_flux_as_one_is_fused_into_its_parts(spelling: str, tmp_path: Path) -> None:
    """In the widths that FLUX has, which the library's converter goes by; nothing of the model is loaded."""
    width = 3072
    sizes = dict(zip(FUSED, [(3 * width, width), (7 * width, width), (width, 5 * width)], strict=True))
    is_kohya = spelling == "kohya"
    state = kohya("lora_unet_", sizes.items()) if is_kohya else peft("diffusion_model.", sizes.items())
    model = facts.find(FLUX)
    (asked,) = loras.read([written(state, tmp_path)], model)
    found = fuse._read(asked, model, flux(model), "FluxPipeline")["transformer"]
    # What they make of a few random vectors: the products themselves are of the model's size.
    halves = [v for k, v in state.items() if not k.endswith("alpha")]
    for (name, paths), down, up in zip(FUSED.items(), halves[::2], halves[1::2], strict=True):
        of = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(2))
        parted = torch.cat([found[p].scale * (found[p].up @ (found[p].down @ of)) for p in paths])
        assert torch.allclose(parted, (ALPHA / RANK if is_kohya else 1.0) * (up @ (down @ of)), atol=1e-4), name
    assert len(found) == sum(map(len, FUSED.values()))


@pytest.mark.parametrize(
    "names", ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1", "no_such_layer"], ids=lambda n: n
)
def test_layers_that_are_not_the_models_are_refused_in_words(names: str, tmp_path: Path) -> None:
    """The library's own converters end with an AssertionError, or a KeyError."""
    model = facts.find(FLUX)
    file = written(kohya("lora_unet_", [(names, (77, 33))]), tmp_path)
    with pytest.raises(ModelError, match="is not for black-forest-labs/FLUX"):
        change_of(file, model, flux(model))
