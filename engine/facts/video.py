"""Which pipelines give videos, by class, and how fast those of a family of models are played."""

from __future__ import annotations

UNKNOWN_FRAME_RATE = 24
"""Frames a second of a video whose family is not in the table: those of film."""

# Frames a second that a family is trained on, by how the pipeline's class is called: the longest beginning counts. None
# where the call says it itself (`frame_rate`, `fps`). Sources: the models' own pages and papers (Wan 2.1, CogVideoX,
# HunyuanVideo, Mochi 1, SkyReels V2), else the example in the pipeline's file of diffusers 0.42.
_FRAME_RATES: dict[str, int | None] = {
    "AllegroPipeline": 15,
    "AnimateDiff": 8,
    "AnyFlow": 16,
    "ChronoEdit": 16,
    "CogVideoX": 8,
    "ConsisID": 8,
    "Cosmos": None,
    "Cosmos2_5": 16,
    "EasyAnimate": 8,
    "Helios": 24,
    "HunyuanSkyreels": 24,
    "HunyuanVideo": 24,
    "HunyuanVideoFramepack": 30,
    "Kandinsky5": 24,
    "LTX": None,
    "Latte": 8,
    "Lucy": 24,
    "MochiPipeline": 30,
    "MotifVideo": 24,
    "SanaImageToVideo": 16,
    "SanaVideo": 16,
    "SkyReelsV2": 24,
    "StableVideoDiffusion": None,
    "Wan": 16,
    "WanAnimate": 30,
}
# They are called as their families are, and draw pictures.
_PICTURES = ("Cosmos2TextToImagePipeline", "Kandinsky5I2IPipeline", "Kandinsky5T2IPipeline")


def gives_videos(pipeline_class: str) -> bool:
    """Whether a pipeline gives videos, as far as its class is known."""
    return pipeline_class not in _PICTURES and _family(pipeline_class) is not None


def frame_rate(pipeline_class: str) -> int:
    """Return the frames a second of a family of models."""
    family = _family(pipeline_class)
    return (None if family is None else _FRAME_RATES[family]) or UNKNOWN_FRAME_RATE


def _family(pipeline_class: str) -> str | None:
    return max((f for f in _FRAME_RATES if pipeline_class.startswith(f)), key=len, default=None)
