"""Which pipelines begin with a picture, by class: planning does not import diffusers, whose tables these are.

Source: diffusers 0.42, pipelines/auto_pipeline.py (what `AutoPipelineForImage2Image` and `AutoPipelineForImage2Video`
go by), and the signatures of the calls. tests/test_from_picture.py holds the tables against them.
"""

from __future__ import annotations

REDRAWING = {
    "ChromaPipeline": "ChromaImg2ImgPipeline",
    "FluxPipeline": "FluxImg2ImgPipeline",
    "IFPipeline": "IFImg2ImgPipeline",
    "Kandinsky3Pipeline": "Kandinsky3Img2ImgPipeline",
    "KolorsPipeline": "KolorsImg2ImgPipeline",
    "LatentConsistencyModelPipeline": "LatentConsistencyModelImg2ImgPipeline",
    "QwenImagePipeline": "QwenImageImg2ImgPipeline",
    "StableDiffusion3PAGPipeline": "StableDiffusion3PAGImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
    "StableDiffusionPAGPipeline": "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPAGPipeline": "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "ZImagePipeline": "ZImageImg2ImgPipeline",
}
"""A pipeline that draws from words, and the one that redraws a picture with the same components, by a `strength`."""

ANIMATING = {
    "LTX2Pipeline": "LTX2ImageToVideoPipeline",
    "LTXPipeline": "LTXImageToVideoPipeline",
}
"""A pipeline that makes videos from words, and the one that makes them from a picture with the same components."""

_ANIMATES = (
    *("CogVideoXImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    *("Kandinsky5I2VPipeline", "LTXConditionPipeline", "MotifVideoImage2VideoPipeline", "SanaImageToVideoPipeline"),
    *("SkyReelsV2DiffusionForcingImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline"),
    *("StableVideoDiffusionPipeline", "WanImageToVideoPipeline"),
)
# These look at a picture of any size, and draw another one of the request's.
_EDITS = (
    *("Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline", "FluxKontextPipeline", "GlmImagePipeline"),
    *("JoyImageEditPipeline", "Kandinsky5I2IPipeline", "LongCatImageEditPipeline", "QwenImageEditPipeline"),
    *("QwenImageEditPlusPipeline", "StableDiffusionInstructPix2PixPipeline"),
    "StableDiffusionXLInstructPix2PixPipeline",
)
_ALSO_WITHOUT = (
    *("Flux2KleinKVPipeline", "Flux2KleinPipeline", "Flux2Pipeline", "FluxKontextPipeline", "GlmImagePipeline"),
    "LTXConditionPipeline",
)
# These round the steps that they take down, which may leave none; the others leave out what is over a whole number.
_ROUNDS_DOWN = (
    *("IFImg2ImgPipeline", "Kandinsky3Img2ImgPipeline", "KolorsImg2ImgPipeline"),
    *("LatentConsistencyModelImg2ImgPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPAGImg2ImgPipeline"),
    *("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPAGImg2ImgPipeline"),
)


def pipeline_for(pipeline_class: str) -> str | None:
    """Return the class that begins with a picture: the same, or another one of the same components; None for none."""
    if pipeline_class in (*REDRAWING.values(), *ANIMATING.values(), *_ANIMATES, *_EDITS):
        return pipeline_class
    return REDRAWING.get(pipeline_class) or ANIMATING.get(pipeline_class)


def needs_one(pipeline_class: str) -> bool:
    """Whether a pipeline does not draw without a picture, as far as its class is known."""
    return pipeline_for(pipeline_class) == pipeline_class and pipeline_class not in _ALSO_WITHOUT


def is_fitted(pipeline_class: str) -> bool:
    """Whether the picture has to be of the size that is drawn."""
    return pipeline_class in (*REDRAWING.values(), *ANIMATING.values(), *_ANIMATES)


def takes_strength(pipeline_class: str) -> bool:
    """Whether `strength` says how much of the picture is drawn anew, and so how many of the steps are taken."""
    return pipeline_class in REDRAWING.values()


def steps_taken(pipeline_class: str, steps: int, strength: float) -> int:
    """Return how many of the steps that are asked for a pipeline takes, which redraws a picture."""
    if pipeline_class in _ROUNDS_DOWN:
        return int(steps * strength)
    return steps - int(steps - steps * strength)
