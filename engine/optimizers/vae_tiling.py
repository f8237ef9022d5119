"""`vae_tiling`: decode a large picture in overlapping tiles.

Where a tile ends the VAE no longer sees what lies beyond, so that the result is near, not equal.
"""

from __future__ import annotations

from engine.errors import IncompatibleError, UsageError
from engine.optimizers import tiles
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="vae_tiling",
    summary="decode a large picture in overlapping tiles",
    slot=51,
    quality="near",
    changes_computing_with="tile",
    params=(
        Param(
            name="tile",
            kind="pixels",
            default=None,
            about="the side of a tile in pixels, a multiple that depends on the VAE; left out: the library's own tile",
            opens=True,
        ),
    ),
)
load_arguments = nothing_to_load


def tile_px(step: Step) -> int | None:
    """Return the side of a tile in pixels; None is the library's own. Raises: UsageError, while it is open."""
    tile = step.params.get("tile")
    if tile == "auto":
        raise UsageError(
            "vae_tiling: the tile is open",
            "auto is for profiles, where the solver decides",
            "give its side in pixels, or leave it out for the library's own",
        )
    return None if tile is None else int(tile)


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    tile = tile_px(step)
    # The pipelines' own shortcuts are gone from diffusers 0.42; the VAE has always had the method.
    try:
        pipe.vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise IncompatibleError(
            f"vae_tiling cannot act on {type(pipe).__name__}: its VAE has no tiling",
            str(error),
            "leave vae_tiling out for this model",
        ) from None
    tiles.set_sizes(pipe.vae, tile)


def apply_dry(pipe: Pipeline, step: Step, context: Context) -> None:
    """Set the tile and leave tiling off: a dry run switches it on itself, and records the plain way too."""
    if not hasattr(getattr(pipe, "vae", None), "use_tiling"):
        raise IncompatibleError(
            f"vae_tiling cannot act on {type(pipe).__name__}: its VAE has no tiling",
            do="leave vae_tiling out for this model",
        )
    tiles.set_sizes(pipe.vae, tile_px(step))


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Switch tiling to what it is by itself, which for most classes is off, with the library's own tile."""
    tiles.set_sizes(pipe.vae, None)
    pipe.vae.use_tiling = tiles.own(pipe.vae)["use_tiling"]


def seen(pipe: Pipeline, context: Context) -> str | None:
    vae = getattr(pipe, "vae", None)
    if not getattr(vae, "use_tiling", False) or not (changed := tiles.changed(vae)):
        return None
    return ", ".join(f"{type(vae).__name__}.{name} is {value}" for name, value in changed.items())


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    name, tile = type(pipe.vae).__name__, tile_px(step)
    if not pipe.vae.use_tiling:
        raise NotApplied("vae_tiling", f"{name}.use_tiling is false")
    if tile is None:
        if wrong := {k: v for k, v in tiles.changed(pipe.vae).items() if k != "use_tiling"}:
            raise NotApplied("vae_tiling", ", ".join(f"{name}.{k} is {v}" for k, v in wrong.items()))
        return f"{name} decodes in tiles where the picture is larger than one"
    if wrong := tiles.wrong(pipe.vae, tile):
        raise NotApplied("vae_tiling", ", ".join(f"{name}.{k} is {v}" for k, v in wrong.items()))
    return f"{name} decodes in tiles of {tile} pixels where the picture is larger than one"
