"""Which way through the VAE a list of steps takes: a trace has them beside the plain one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.values import Step

QUADRATIC = "attention and products of decode"
"""Beside the seconds by phase: what of decoding could be saved by other tiles."""


def way(steps: Sequence[Step]) -> str:
    """Return which way through the VAE these steps take: "", or the name of a trace's alternatives."""
    names = {s.name for s in steps}
    return "+".join(w for w, name in (("sliced", "vae_slicing"), ("tiled", "vae_tiling")) if name in names)
