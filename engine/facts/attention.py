"""What a denoiser's attention lets be done to it, by its class and its configuration: known without torch.

Source: diffusers 0.42. Every class that it gives `fuse_qkv_projections` takes the call; but some have no attention that
is fused by it, some fuse and compute as before (the fused weights are there for nothing), and some raise. Seen on the
models of the catalogue, built on `meta`, one class after another. A class in neither table is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DENOISERS = ("transformer", "transformer_2", "unet")
"""The components that denoise: one, or two where a model switches between experts."""

SLICES = frozenset(
    ("AudioLDM2UNet2DConditionModel", "DreamLiteUNetModel", "UNet2DConditionModel", "UNet3DConditionModel")
)
"""The denoisers that have `set_attention_slice`; no other class of diffusers 0.42 does, but ControlNets."""

FUSES = frozenset(
    (
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanDiT2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "UNet2DConditionModel",
        "UNetMotionModel",
        "WanTransformer3DModel",
    )
)
"""The denoisers whose attention computes with the fused weights."""

FUSES_NOT = frozenset(
    (
        # no such method
        *("CogView4Transformer2DModel", "CosmosTransformer3DModel", "HiDreamImageTransformer2DModel"),
        *("Lumina2Transformer2DModel", "MochiTransformer3DModel", "OmniGenTransformer2DModel"),
        "ZImageTransformer2DModel",
        # the method, and nothing that it fuses
        *("CogView3PlusTransformer2DModel", "HunyuanVideo15Transformer3DModel", "HunyuanVideoTransformer3DModel"),
        *("Kandinsky3UNet", "QwenImageTransformer2DModel", "SanaTransformer2DModel"),
        # it fuses, and computes with the old weights
        "LTXVideoTransformer3DModel",
        # the method raises
        *("Kandinsky5Transformer3DModel", "LTX2VideoTransformer3DModel"),
    )
)


def slices(cls: str) -> bool:
    """Whether a denoiser of diffusers can compute its attention in slices."""
    return cls in SLICES


def fuses_qkv(cls: str, config: Mapping[str, Any]) -> bool | None:
    """Whether a denoiser can project queries, keys and values at once, and computes so; None where it is not known."""
    if cls == "SD3Transformer2DModel" and config.get("dual_attention_layers"):
        # The fused processor takes a text, and the second attention of these layers has none: the forward raises.
        return False
    if cls == "UNet2DConditionModel" and _adds_keys_and_values(config):
        return False
    return True if cls in FUSES else False if cls in FUSES_NOT else None


def _adds_keys_and_values(config: Mapping[str, Any]) -> bool:
    """Whether a UNet's attention projects the text beside the picture (Kandinsky 2, DeepFloyd): fusing it raises."""
    blocks = [config.get("mid_block_type"), *config.get("down_block_types", ()), *config.get("up_block_types", ())]
    return any("SimpleCrossAttn" in str(b) for b in blocks)
