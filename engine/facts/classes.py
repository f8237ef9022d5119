"""Which classes a model may name: public ones of diffusers and transformers, and nothing that comes with the model.

A `model_index.json` is somebody else's text. What it names is imported later, so it is held against lists here, before
anything is imported: no dotted path is followed, and no module outside the two libraries is ever touched.
"""

from __future__ import annotations

import re

LIBRARIES = ("diffusers", "transformers")

# Folders of diffusers.pipelines that have components of their own. A model_index.json gives the folder's name as the
# library: ["stable_diffusion", "StableDiffusionSafetyChecker"]. Source: diffusers 0.42.
_PIPELINES = (
    *("ace_step", "audioldm2", "deepfloyd_if", "flux", "ideogram4", "kandinsky", "kolors", "latent_diffusion"),
    *("ltx", "ltx2", "shap_e", "stable_audio", "stable_audio_3", "stable_cascade", "stable_diffusion"),
)
_DEPRECATED_PIPELINES = (
    *("alt_diffusion", "blip_diffusion", "paint_by_example", "spectrogram_diffusion", "stable_diffusion_safe"),
    *("unclip", "unidiffuser", "versatile_diffusion", "vq_diffusion", "wuerstchen"),
)
_PUBLIC_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,99}\Z")


def is_public_class(name: object) -> bool:
    """Return whether `name` can be that of a public class: one word, no dots, a capital first."""
    return isinstance(name, str) and _PUBLIC_CLASS.match(name) is not None


def place(library: str) -> tuple[str, str | None] | None:
    """Return (library, module) where the classes of a component's `library` are; None, when it is not one of ours.

    The module is None at a library's top level.
    """
    if library in LIBRARIES:
        return library, None
    if library in _PIPELINES:
        return "diffusers", f"diffusers.pipelines.{library}"
    if library in _DEPRECATED_PIPELINES:
        return "diffusers", f"diffusers.pipelines.deprecated.{library}"
    return None
