"""The value that holds what is known of a model, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.facts import attention, convolutions, tiling, widening
from engine.values import FrozenDict

WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "ImageProcessorPil")
"""How classes end whose components have no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a pipeline: its class, and its configuration where that is known."""

    library: str
    cls: str
    module: str | None = None
    """Where the class is, when it is not at its library's top level."""
    config_class: str | None = None
    """transformers' configuration class, where the configuration itself does not name it (`model_type`)."""
    config: Mapping[str, Any] = field(default_factory=FrozenDict)
    stored_dtype: str | None = None
    """The one precision of the weights as they are stored, as "bfloat16"; None where it is not known, or mixed."""
    variants: tuple[str, ...] = ()
    """Other sets of weights in its folder, such as "fp16"; () where the weights are not on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """How the model is meant to be called; None is left to the pipeline."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=FrozenDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model known from configuration files. `path` is its folder, when its weights may be on this machine."""

    id: str
    source: str
    pipeline_class: str
    components: Mapping[str, Component]
    revision: str | None = None
    path: Path | None = None
    defaults: Defaults = Defaults()
    vocabulary: frozenset[str] | None = None
    """The only words the model has ever seen, for the embedded one; None is any."""

    def _config(self, *names: str) -> Mapping[str, Any]:
        return next((self.components[n].config for n in names if n in self.components), {})

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that have weights, by name, as far as their classes' names tell."""
        return tuple(n for n, c in self.components.items() if not c.cls.endswith(WITHOUT_WEIGHTS))

    @property
    def vae_scale(self) -> int | None:
        """Pixels along one side of a latent, for the VAE families whose configuration says so."""
        vae = self.components.get("vae")
        if vae is None:
            return None
        if isinstance(scale := vae.config.get("scale_factor_spatial"), int) and scale > 0:
            return scale
        channels = vae.config.get("block_out_channels")
        if vae.cls in ("AutoencoderKL", "AutoencoderKLFlux2") and isinstance(channels, list | tuple) and channels:
            return int(2 ** (len(channels) - 1))
        return None

    @property
    def size_multiple(self) -> int | None:
        """What height and width must be divisible by: the VAE's scale times what the denoiser packs together.

        FLUX-like pipelines pack 2 x 2 latents into one token, seen by a token of four times the latent channels;
        other transformers say `patch_size`. None where the configuration does not tell.
        """
        scale = self.vae_scale
        if scale is None:
            return None
        denoiser, vae = self._config("transformer"), self._config("vae")
        if not denoiser:
            return scale if "unet" in self.components else None
        # What comes out counts: an inpainting model takes the mask and the masked picture in as well.
        latent, tokens = vae.get("latent_channels"), denoiser.get("out_channels") or denoiser.get("in_channels")
        if isinstance(latent, int) and tokens == 4 * latent:
            return 2 * scale
        patch = denoiser.get("patch_size")
        if isinstance(patch, list | tuple) and patch:
            patch = patch[-1]
        return scale * patch if isinstance(patch, int) and patch > 0 else None

    @property
    def ignores_guidance(self) -> bool:
        """Whether `guidance_scale` does nothing: FLUX models without guidance embeddings take it and do not use it."""
        return self.pipeline_class.startswith("Flux") and self._config("transformer").get("guidance_embeds") is False

    @property
    def _denoisers(self) -> tuple[Component, ...]:
        return tuple(self.components[n] for n in attention.DENOISERS if n in self.components)

    def class_of(self, denoiser: Component) -> str:
        """Return a denoiser's class as the pipeline computes with it: AnimateDiff makes a UNet a UNet with motion."""
        return "UNetMotionModel" if "motion_adapter" in self.components else denoiser.cls

    @property
    def convolves_in_2d(self) -> bool | None:
        """Whether what denoises, or the VAE, has two-dimensional convolutions; None where it is not known."""
        parts = [self.components[n] for n in (*attention.DENOISERS, *convolutions.VAES) if n in self.components]
        found = [convolutions.has_flat(c.cls) if c.library == "diffusers" else None for c in parts]
        return True if True in found else None if None in found else False

    @property
    def can_slice_attention(self) -> bool | None:
        """Whether a denoiser can compute its attention in slices; None where it is not known."""
        if any(c.library != "diffusers" for c in self._denoisers):
            return None
        return any(attention.slices(self.class_of(c)) for c in self._denoisers)

    @property
    def can_fuse_qkv(self) -> bool | None:
        """Whether a denoiser can project queries, keys and values at once; None where it is not known."""
        found = [
            attention.fuses_qkv(self.class_of(c), c.config) if c.library == "diffusers" else None
            for c in self._denoisers
        ]
        return True if True in found else None if None in found else False

    @property
    def widens_vae_in(self) -> tuple[str, ...] | None:
        """The precisions in which the pipeline widens its VAE to float32 while it runs; None where it is not known."""
        vae = next((self.components[n] for n in widening.VAES if n in self.components), None)
        if vae is None:
            return ()
        return widening.precisions(self.pipeline_class, vae.cls, vae.config) if vae.library == "diffusers" else None

    @property
    def tile_px(self) -> int | None:
        """The side of the VAE's own tile in pixels, the smaller one where they differ; None where it is not known."""
        vae = self._vae
        found = None if vae is None else tiling.own(vae.cls, vae.config)
        return None if found is None else min(found)

    def tiling_starts(self, height: int | None, width: int | None, tile: int | None = None) -> bool | None:
        """Whether the VAE would decode this size in tiles, once tiling is on; None where it is not known.

        `tile` is the side of a tile in pixels; None is the VAE's own.
        """
        vae = self._vae
        return None if vae is None else tiling.starts(vae.cls, vae.config, height, width, tile)

    def whole_tile_px(self, height: int | None, width: int | None) -> int | None:
        """Return the side of the smallest tile that this size is not cut into; None: not known, or none is."""
        vae = self._vae
        return None if vae is None else tiling.whole(vae.cls, vae.config, height, width)

    def tiles(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the tiles in pixels that are worth a try for a picture of this size, beside the VAE's own."""
        vae = self._vae
        return () if vae is None else tiling.candidates(vae.cls, vae.config, height, width)

    @property
    def _vae(self) -> Component | None:
        vae = self.components.get("vae")
        return vae if vae is not None and vae.library == "diffusers" else None


def nearest_sizes(size: int, multiple: int) -> tuple[int, ...]:
    """Return the good sizes around `size`, the lower and the upper."""
    low, high = size // multiple * multiple, math.ceil(size / multiple) * multiple
    return tuple(s for s in dict.fromkeys((low, high)) if s > 0)
