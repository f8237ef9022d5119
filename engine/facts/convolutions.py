"""Which denoisers and VAEs have two-dimensional convolutions, by their class: known without torch.

Source: diffusers 0.42, counted on the models of the catalogue, built on `meta`. A class in neither table is not known.
"""

from __future__ import annotations

VAES = ("vae", "vqvae", "audio_vae")
"""Components that are autoencoders."""

FLAT = frozenset(
    (
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLCogVideoX",
        "AutoencoderKLFlux2",
        "AutoencoderKLLTX2Audio",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
        "CogVideoXTransformer3DModel",
        "HunyuanDiT2DModel",
        "Kandinsky3UNet",
        "MochiTransformer3DModel",
        "OmniGenTransformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "UNet2DConditionModel",
    )
)
"""They have some; video VAEs mostly where they change the size of a frame."""

NONE = frozenset(
    (
        "AuraFlowTransformer2DModel",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLLTX2Video",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLMochi",
        "ChromaTransformer2DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "CosmosTransformer3DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel",
        "ZImageTransformer2DModel",
    )
)
"""They have none: transformers over patches, and VAEs whose convolutions are three-dimensional throughout."""


def has_flat(cls: str) -> bool | None:
    """Whether a class has two-dimensional convolutions; None where it is not known."""
    return True if cls in FLAT else False if cls in NONE else None
