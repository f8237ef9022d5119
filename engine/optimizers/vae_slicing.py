"""`vae_slicing`: decode a batch one picture at a time."""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="vae_slicing",
    summary="decode a batch one picture at a time",
    slot=50,
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    # The pipelines' own shortcuts are gone from diffusers 0.42; the VAE has always had the method.
    try:
        pipe.vae.enable_slicing()
    except (AttributeError, NotImplementedError) as error:
        raise IncompatibleError(
            f"vae_slicing cannot act on {type(pipe).__name__}: its VAE has no slicing",
            str(error),
            "leave vae_slicing out for this model",
        ) from None


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    pipe.vae.disable_slicing()


def seen(pipe: Pipeline, context: Context) -> str | None:
    vae = getattr(pipe, "vae", None)
    return f"{type(vae).__name__} decodes one picture at a time" if getattr(vae, "use_slicing", False) else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    if not pipe.vae.use_slicing:
        raise NotApplied("vae_slicing", f"{type(pipe.vae).__name__}.use_slicing is false")
    return f"{type(pipe.vae).__name__} decodes one picture at a time"
