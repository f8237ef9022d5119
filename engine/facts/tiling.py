"""In which tiles a VAE decodes, by its class and its configuration: known without torch.

Source: diffusers 0.42, `models/autoencoders`. A VAE has a tile in pixels, and from it follow the tile in latents, by
how much the next tile is further on, and to what each is cut. Some classes keep these numbers apart, and then a tile
that is changed alone gives a picture of another size: `sizes` gives all of them for a tile, so that they fit each
other. What a class does where its configuration is silent is its constructor's default. A class that is not here is not
known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

CANDIDATES_PX = (1024, 512, 256)
"""Tiles that may stand for `auto`, where they are smaller than the picture and not the VAE's own."""
MOST_PX = 4096

Kind = Literal["square", "latent", "factors", "strided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a class keeps its tiles.

    kind      attributes, each prefixed by `tile_`
    square    sample_min_size, latent_min_size; the overlap is a share (overlap_factor) of both
    latent    sample_min_height and _width, latent_min_height and _width; the same overlap
    factors   the same, with an overlap for each side (overlap_factor_height, _width)
    strided   sample_min_height and _width, sample_stride_height and _width; latents are worked out from them
    """

    kind: Kind
    own_px: int | None = None
    """The library's own tile; None: the configuration says it."""
    overlap: Fraction = Fraction(1, 4)
    """The share of a tile that the next one covers too."""
    is_always: bool = False
    """Whether pictures are decoded in tiles that are no larger than one."""
    defaults: Mapping[str, Any]
    """What the constructor takes where the configuration says nothing; of what is used here."""


_FOUR = (1, 1, 1, 1)
_EIGHTH = Fraction(1, 8)
FAMILIES: dict[str, Family] = {
    "AutoencoderDC": Family(
        kind="strided", own_px=512, overlap=_EIGHTH, defaults={"encoder_block_out_channels": (1, 1, 1, 1, 1, 1)}
    ),
    "AutoencoderKL": Family(kind="square", defaults={"sample_size": 32, "block_out_channels": (1,)}),
    "AutoencoderKLCogVideoX": Family(
        kind="factors", defaults={"sample_height": 480, "sample_width": 720, "block_out_channels": _FOUR}
    ),
    "AutoencoderKLFlux2": Family(kind="square", defaults={"sample_size": 1024, "block_out_channels": _FOUR}),
    "AutoencoderKLHunyuanImage": Family(kind="square", defaults={}),
    "AutoencoderKLHunyuanVideo": Family(kind="strided", own_px=256, defaults={"spatial_compression_ratio": 8}),
    "AutoencoderKLHunyuanVideo15": Family(kind="latent", own_px=256, defaults={"spatial_compression_ratio": 16}),
    "AutoencoderKLKVAE": Family(kind="square", defaults={"sample_size": 1024, "ch_mult": (1, 2, 4, 8)}),
    "AutoencoderKLLTX2Video": Family(
        kind="strided",
        own_px=512,
        overlap=_EIGHTH,
        defaults={
            "patch_size": 4,
            "spatio_temporal_scaling": (True, True, True, True),
            "spatial_compression_ratio": None,
        },
    ),
    "AutoencoderKLLTXVideo": Family(
        kind="strided",
        own_px=512,
        overlap=_EIGHTH,
        defaults={
            "patch_size": 4,
            "spatio_temporal_scaling": (True, True, True, False),
            "spatial_compression_ratio": None,
        },
    ),
    "AutoencoderKLMagvit": Family(kind="strided", own_px=512, overlap=_EIGHTH, defaults={"block_out_channels": _FOUR}),
    "AutoencoderKLMochi": Family(kind="strided", own_px=256, defaults={"spatial_expansions": (2, 2, 2)}),
    "AutoencoderKLQwenImage": Family(kind="strided", own_px=256, defaults={"temperal_downsample": (False, True, True)}),
    "AutoencoderKLQwenImage21": Family(kind="strided", own_px=256, defaults={"scale_factor_spatial": 16}),
    "AutoencoderKLWan": Family(kind="strided", own_px=256, defaults={"scale_factor_spatial": 8}),
    "AutoencoderTiny": Family(
        kind="square", own_px=512, overlap=_EIGHTH, is_always=True, defaults={"encoder_block_out_channels": _FOUR}
    ),
}

NEVER = frozenset(("AutoencoderKLCosmos", "AutoencoderKLKVAEVideo"))
"""Classes that can be told to decode in tiles, and do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The numbers that belong to one tile, height and width each; in pixels, and in latents."""

    sample: tuple[int, int]
    latent: tuple[int, int]
    stride: tuple[int, int]
    """From one tile to the next, in pixels: what of each tile is kept."""
    overlap: Fraction
    """The share of a tile that the next one covers too."""


def scale(cls: str, config: Mapping[str, Any]) -> int | None:
    """Return the pixels along one side of a latent; None where it is not known."""
    family = FAMILIES.get(cls)
    if family is None:
        return None
    try:
        found = _scale(cls, {**family.defaults, **{k: v for k, v in config.items() if v is not None}})
    except (KeyError, TypeError, ValueError, OverflowError):  # somebody else's configuration
        return None
    return found if isinstance(found, int) and 1 <= found <= MOST_PX else None


def _scale(cls: str, config: Mapping[str, Any]) -> Any:
    match cls:
        case "AutoencoderKLLTXVideo" | "AutoencoderKLLTX2Video":
            told = config["spatial_compression_ratio"]
            return (
                config["patch_size"] * 2 ** sum(map(bool, config["spatio_temporal_scaling"])) if told is None else told
            )
        case "AutoencoderDC" | "AutoencoderTiny":
            return 2 ** (len(config["encoder_block_out_channels"]) - 1)
        case "AutoencoderKLKVAE":
            return 2 ** (len(config["ch_mult"]) - 1)
        case "AutoencoderKLMochi":
            return math.prod(config["spatial_expansions"])
        case "AutoencoderKLQwenImage":
            return 2 ** len(config["temperal_downsample"])
        case "AutoencoderKLQwenImage21" | "AutoencoderKLWan":
            return config["scale_factor_spatial"]
        case "AutoencoderKLHunyuanImage" | "AutoencoderKLHunyuanVideo" | "AutoencoderKLHunyuanVideo15":
            return config["spatial_compression_ratio"]
    return 2 ** (len(config["block_out_channels"]) - 1)


def own(cls: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the library's own tile, height and width in pixels; None where it is not known."""
    family = FAMILIES.get(cls)
    if family is None:
        return None
    if family.own_px is not None:
        return family.own_px, family.own_px
    told = {**family.defaults, **config}
    if cls == "AutoencoderKLCogVideoX":
        height, width = _side(told.get("sample_height")), _side(told.get("sample_width"))
        return None if height is None or width is None else (height // 2, width // 2)
    sample = told.get("sample_size")
    side = _side(sample[0] if isinstance(sample, list | tuple) and sample else sample)
    return None if side is None else (side, side)


def _side(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def multiple(cls: str, config: Mapping[str, Any]) -> int | None:
    """Return what a tile's side must be divisible by; None where it is not known.

    So its overlap is a whole number of latents. A strided tile can be cut at any latent, but is two of them at least.
    """
    size = scale(cls, config)
    if size is None:
        return None
    family = FAMILIES[cls]
    return 2 * size if family.kind == "strided" else size * family.overlap.denominator


def sizes(cls: str, config: Mapping[str, Any], tile_px: int) -> Sizes | None:
    """Return the numbers of a square tile of so many pixels; None where they are not known, or would not fit."""
    step, size = multiple(cls, config), scale(cls, config)
    if step is None or size is None or tile_px % step or not 0 < tile_px <= MOST_PX:
        return None
    family = FAMILIES[cls]
    latents = tile_px // size
    kept = latents - max(1, math.ceil(latents * family.overlap))
    return Sizes(
        sample=(tile_px, tile_px),
        latent=(latents, latents),
        stride=(kept * size, kept * size),
        overlap=family.overlap,
    )


def starts(
    cls: str, config: Mapping[str, Any], height: int | None, width: int | None, tile_px: int | None = None
) -> bool | None:
    """Whether a VAE decodes this size in tiles, once tiling is on; None where it is not known.

    A picture is cut where a side of its latents is larger than the tile's (strictly). `tile_px` None: the library's.
    """
    if cls in NEVER:
        return False
    size, tile = scale(cls, config), (tile_px, tile_px) if tile_px is not None else own(cls, config)
    if size is None or tile is None:
        return None
    if FAMILIES[cls].is_always:
        return True
    if height is None or width is None:
        return None
    return height // size > tile[0] // size or width // size > tile[1] // size


def whole(cls: str, config: Mapping[str, Any], height: int | None, width: int | None) -> int | None:
    """Return the side in pixels of the smallest tile that a picture is not cut into; None: not known, or none is."""
    size = scale(cls, config)
    if size is None or height is None or width is None or FAMILIES[cls].is_always:
        return None
    return max(1, max(height, width) // size * size)


def candidates(cls: str, config: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, ...]:
    """Return tiles that are worth a try for a picture of this size, the largest first: not the library's own."""
    step, standard = multiple(cls, config), own(cls, config)
    if step is None or height is None or width is None:
        return ()
    return tuple(
        px for px in CANDIDATES_PX if px % step == 0 and (px, px) != standard and starts(cls, config, height, width, px)
    )


def are_of_another_size(cls: str, config: Mapping[str, Any]) -> bool | None:
    """Whether a VAE's tiles add up to another size than the picture's; None where it is not known.

    Source: `AutoencoderKLCogVideoX.tiled_decode` of diffusers 0.42. A tile is half of the sample; it steps by a part of
    its latent side and is cut to a part of its side in pixels, each rounded down by itself: the two must agree.
    """
    if cls != "AutoencoderKLCogVideoX":
        return False
    blocks, height, width = (config.get(k) for k in ("block_out_channels", "sample_height", "sample_width"))
    if not (isinstance(blocks, list | tuple) and isinstance(height, int) and isinstance(width, int)):
        return None
    scale = 2 ** (len(blocks) - 1)
    return any(
        int(int(side // 2 / scale) * (1 - overlap)) * scale != side // 2 - int(side // 2 * overlap)
        for side, overlap in ((height, 1 / 6), (width, 1 / 5))
    )
