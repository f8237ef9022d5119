"""`vae_tiling`: decode a large picture in overlapping tiles.

Where a tile ends the VAE no longer sees what lies beyond, so that the result is near, not equal.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="vae_tiling",
    summary="decode a large picture in overlapping tiles",
    slot=51,
    quality="near",
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    # The pipelines' own shortcuts are gone from diffusers 0.42; the VAE has always had the method.
    try:
        pipe.vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise IncompatibleError(
            f"vae_tiling cannot act on {type(pipe).__name__}: its VAE has no tiling",
            str(error),
            "leave vae_tiling out for this model",
        ) from None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    if not pipe.vae.use_tiling:
        raise NotApplied("vae_tiling", f"{type(pipe.vae).__name__}.use_tiling is false")
    return f"{type(pipe.vae).__name__} decodes in tiles where the picture is larger than one"
