"""Draw scenes with a built pipeline, called as `engine/embedded/facts.json` says it is meant to be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.facts import embedded
from tools.tiny_flux.scenes import Scene, prompt


def generate(pipeline: Any, scenes: Sequence[Scene], seed: int, batch: int = 17) -> list[NDArray[np.uint8]]:
    """Return a picture a scene, 8-bit RGB [height, width, 3]; the noise depends on `seed` and the scene's place."""
    meant = embedded.model().defaults
    pictures: list[NDArray[np.uint8]] = []
    for begin in range(0, len(scenes), batch):
        part = scenes[begin : begin + batch]
        result = pipeline(
            [prompt(s) for s in part],
            height=meant.height,
            width=meant.width,
            num_inference_steps=meant.steps,
            generator=[torch.Generator().manual_seed(seed * 100_003 + begin + i) for i in range(len(part))],
            **meant.call,
        )
        pictures += [np.asarray(image) for image in result.images]
    return pictures
