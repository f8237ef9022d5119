"""Which pipelines widen their VAE to float32 while they run, and in which precisions: known without torch.

Source: diffusers 0.42. A VAE whose configuration says `force_upcast` overflows in float16. The pipelines of the first
table widen it where it is in float16; those of the second, which take a picture or a video, widen it before they encode
that, in any precision. A pipeline in neither table runs its VAE as it was loaded, whatever the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VAES = ("vae", "vqvae")
"""The components that are widened."""

IN_FLOAT16 = frozenset(
    (
        *("AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline"),
        *("AnimateDiffSDXLPipeline", "AuraFlowPipeline"),
        *("KolorsPAGPipeline", "KolorsPipeline"),
        "LEditsPPPipelineStableDiffusionXL",
        "StableDiffusionUpscalePipeline",
        *("StableDiffusionXLAdapterPipeline", "StableDiffusionXLControlNetPAGPipeline"),
        *("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetUnionPipeline"),
        *("StableDiffusionXLControlNetXSPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
        *("StableDiffusionXLPAGPipeline", "StableDiffusionXLPipeline"),
        *("StableVideoDiffusionPipeline", "TextToVideoZeroSDXLPipeline"),
    )
)
"""The pipelines that widen a VAE in float16 alone."""

IN_ANY_PRECISION = frozenset(
    (
        *("AnimateDiffVideoToVideoControlNetPipeline", "AnimateDiffVideoToVideoPipeline"),
        "KolorsImg2ImgPipeline",
        *("StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        *("StableDiffusionXLControlNetUnionImg2ImgPipeline", "StableDiffusionXLControlNetUnionInpaintPipeline"),
        *("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        *("StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
    )
)
"""The pipelines that widen a VAE to encode what they are given, in bfloat16 too."""

_UNLESS_TOLD = {"AutoencoderKL": True, "AutoencoderKLTemporalDecoder": True, "VQModel": False}
"""What `force_upcast` is where a configuration does not say it, by the VAE's class."""

_NEVER = frozenset(("AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE"))
"""The VAEs that set it to false themselves, whatever their configuration says."""


def precisions(pipeline: str, vae: str, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the precisions in which a pipeline widens a VAE of diffusers; None where it is not known."""
    asked = ("bfloat16", "float16") if pipeline in IN_ANY_PRECISION else ("float16",) if pipeline in IN_FLOAT16 else ()
    if not asked or vae in _NEVER:
        return ()
    if not config or (vae not in _UNLESS_TOLD and "force_upcast" not in config):
        return None
    return asked if config.get("force_upcast", _UNLESS_TOLD.get(vae)) else ()
