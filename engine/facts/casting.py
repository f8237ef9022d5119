"""Which layers of a text encoder can be kept in fewer bits: known by their paths, without torch.

diffusers says of its own models which layers layerwise casting leaves alone, and nothing of transformers' encoders.
Source: diffusers 0.42, transformers 5.23. Beside diffusers' usual patterns these are left alone:

embed, shared  the first weights of a text encoder say what its `dtype` is, and pipelines cast what it gives to that
lm_head        it shares its weights with the embedding, in most of them
wo             T5's feed-forward casts its input to the dtype of this layer's weights before any hook widens them
"""

from __future__ import annotations

import re
from functools import cache

USUAL = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""`DEFAULT_SKIP_MODULES_PATTERN` of diffusers 0.42."""
LEFT_ALONE = (*USUAL, "embed", "shared", "lm_head", r"(^|\.)wo$")


def is_text_encoder(component: str) -> bool:
    """Whether a component is a text encoder, by its name."""
    return component.startswith("text_encoder")


@cache
def is_cast(path: str) -> bool:
    """Whether a layer at this path within a text encoder is cast: no part of the way to it is left alone."""
    return not is_left_alone(path, LEFT_ALONE)


def is_left_alone(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether some part of the way to a layer fits one of these patterns."""
    names = path.split(".")
    ways = [".".join(names[: i + 1]) for i in range(len(names))]
    return any(re.search(p, way) for way in ways for p in patterns)
