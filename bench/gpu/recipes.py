"""What others do to run a pipeline on a small card, each as its own documentation says: nothing of dg-run is in it.

Each takes a pipeline on the host and the size of the card. One whose package is absent says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine import versions
from engine.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way. `quality` is that of dg-run's own scale: what it does to the pictures."""

    about: str
    apply: Callable[[Any, str, int], None]
    package: str | None = None
    quality: str = "exact"

    @property
    def missing(self) -> str | None:
        """Return what has to be installed first, or None."""
        if self.package is None or versions.installed(self.package) is not None:
            return None
        return f"not installed: pip install {self.package}"


def _resident(pipe: Any, device: str, card_bytes: int) -> None:
    pipe.to(device)


def _model(pipe: Any, device: str, card_bytes: int) -> None:
    pipe.enable_model_cpu_offload(device=device)


def _sequential(pipe: Any, device: str, card_bytes: int) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _group(pipe: Any, device: str, card_bytes: int) -> None:
    import torch

    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)


def _group_block(pipe: Any, device: str, card_bytes: int) -> None:
    import torch

    vaes = [n for n in pipe.components if n in ("vae", "vqvae", "audio_vae")]  # they do not run at block level
    pipe.enable_group_offload(
        onload_device=torch.device(device),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        exclude_modules=vaes,
    )


def _mmgp(pipe: Any, device: str, card_bytes: int) -> None:
    """The profile that its README names for this much VRAM. It makes the transformer int8, as it does by itself."""
    import psutil
    from mmgp import offload, profile_type

    roomy = psutil.virtual_memory().total >= 48 * GIB
    if card_bytes >= 24 * GIB:
        profile = profile_type.HighRAM_HighVRAM if roomy else profile_type.LowRAM_HighVRAM
    elif card_bytes >= 12 * GIB:
        profile = profile_type.HighRAM_LowVRAM if roomy else profile_type.LowRAM_LowVRAM
    else:
        profile = profile_type.VerylowRAM_LowVRAM
    offload.profile(pipe, profile)


def _cache_dit(pipe: Any, device: str, card_bytes: int) -> None:
    """Its layerwise offload of everything that has weights, copied ahead. Its cache is left off.

    What a cache passes over depends on what is computed, and random weights compute nothing that would tell.
    """
    import cache_dit

    cache_dit.layerwise_cpu_offload(
        pipe, onload_device=device, async_transfer=device == "cuda", transfer_buckets=2, prefetch_limit=True
    )


RECIPES = {
    "resident": Recipe(about="everything on the card", apply=_resident),
    "model": Recipe(about="diffusers: enable_model_cpu_offload", apply=_model),
    "sequential": Recipe(about="diffusers: enable_sequential_cpu_offload", apply=_sequential),
    "group": Recipe(about="diffusers: enable_group_offload, leaf level, streamed", apply=_group),
    "group-block": Recipe(about="diffusers: enable_group_offload, block level, streamed", apply=_group_block),
    "mmgp": Recipe(
        about="mmgp: offload.profile, by the table of its README",
        apply=_mmgp,
        package="mmgp",
        quality="near",
    ),
    "cache-dit": Recipe(about="cache-dit: layerwise_cpu_offload", apply=_cache_dit, package="cache-dit"),
}
