"""What a VAE's tiles come to, by its class and its configuration: known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
