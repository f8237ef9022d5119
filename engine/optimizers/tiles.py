"""The sizes of a live VAE's tiles: set all together, and read back.

Which numbers a class has, and how they hang together, is `engine/facts/tiling.py`'s.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from engine.errors import IncompatibleError, UsageError
from engine.facts import tiling
from engine.words import listing

_OWN = "_dg_run_own_tiles"
_BY_ITSELF: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_PIXELS_PER_LATENT = ("spatial_compression_ratio", "spatial_scale_factor")
"""What classes that keep it call it."""


def set_sizes(vae: Any, tile_px: int | None) -> None:
    """Let a VAE work in square tiles of so many pixels; None: in those that it came with.

    Nothing is switched on. Raises: IncompatibleError, for a VAE whose tiles are not known; UsageError, for a tile that
    it cannot have.
    """
    own = getattr(vae, _OWN, None)
    if tile_px is None:
        for name, value in (own or {}).items():
            setattr(vae, name, value)
        return
    wanted = _attributes(vae, tile_px)
    if own is None:
        setattr(vae, _OWN, {name: getattr(vae, name) for name in wanted})
    for name, value in wanted.items():
        setattr(vae, name, value)


def wrong(vae: Any, tile_px: int) -> dict[str, Any]:
    """Return what of a VAE's tiles is not as a tile of so many pixels wants it, as the VAE has it."""
    wanted = _attributes(vae, tile_px)
    return {name: getattr(vae, name) for name, value in wanted.items() if getattr(vae, name) != value}


def own(vae: Any) -> dict[str, Any]:
    """Return the switch and the numbers that a VAE of this class and configuration has by itself.

    They are read from another one that is made of the same configuration on meta: some classes compute them, and what
    this one has may have been changed.
    """
    import torch

    if vae not in _BY_ITSELF:
        with torch.device("meta"):
            _BY_ITSELF[vae] = _numbers(type(vae).from_config(vae.config))
    return _BY_ITSELF[vae]


def take_for_own(vae: Any) -> None:
    """Take the switch and the numbers of a VAE, as they are, for those that it has by itself."""
    _BY_ITSELF[vae] = _numbers(vae)


def _numbers(vae: Any) -> dict[str, Any]:
    return {n: v for n, v in vars(vae).items() if n == "use_tiling" or n.startswith("tile_")}


def changed(vae: Any) -> dict[str, Any]:
    """Return what of a VAE's switch and tiles is not as it is by itself, as the VAE has it."""
    return {name: getattr(vae, name) for name, value in own(vae).items() if getattr(vae, name) != value}


def _attributes(vae: Any, tile_px: int) -> dict[str, Any]:
    """Return the attributes of a tile, by the names that the VAE's class gives them. Raises: as `set_sizes`."""
    cls = type(vae).__name__
    step, scale = tiling.multiple(cls, vae.config), tiling.scale(cls, vae.config)
    live = next((found for n in _PIXELS_PER_LATENT if (found := getattr(vae, n, None)) is not None), scale)
    if step is None or live != scale:
        raise IncompatibleError(
            f"the size of the tiles of {cls} cannot be set",
            "which of its numbers belong to a tile is not known, and a tile that is changed alone gives a picture of"
            " another size",
            "leave the tile out: vae_tiling then takes the library's own",
        )
    sizes = tiling.sizes(cls, vae.config, tile_px)
    if sizes is None:
        good = [px for px in dict.fromkeys((tile_px // step * step, -(-tile_px // step) * step)) if px > 0]
        raise UsageError(
            f"{cls} cannot work in tiles of {tile_px} pixels",
            f"they must be a multiple of {step}, and at most {tiling.MOST_PX}",
            f"give {listing(map(str, good), 'or')}" if tile_px < tiling.MOST_PX else f"give {tiling.MOST_PX}",
        )
    overlap = float(sizes.overlap)
    match tiling.FAMILIES[cls].kind:
        case "square":
            wanted: dict[str, Any] = {
                "sample_min_size": sizes.sample[0],
                "latent_min_size": sizes.latent[0],
                "overlap_factor": overlap,
            }
        case "latent":
            wanted = {**_sides("sample_min", sizes.sample), **_sides("latent_min", sizes.latent)}
            wanted["overlap_factor"] = overlap
        case "factors":
            # The library's own (a sixth and a fifth) are rounded twice, in latents and in pixels, and the two agree for
            # its own tile only: a quarter is a whole number of both.
            wanted = {**_sides("sample_min", sizes.sample), **_sides("latent_min", sizes.latent)}
            wanted |= _sides("overlap_factor", (overlap, overlap))
        case "strided":
            wanted = {**_sides("sample_min", sizes.sample), **_sides("sample_stride", sizes.stride)}
            if hasattr(vae, "tile_latent_min_height"):
                wanted |= _sides("latent_min", sizes.latent)
    return {f"tile_{name}": value for name, value in wanted.items()}


def _sides(name: str, values: tuple[Any, Any]) -> dict[str, Any]:
    return {f"{name}_height": values[0], f"{name}_width": values[1]}
