"""What is run on the phantom device: pipelines, placements, precisions. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "resident": ("resident", {}),
    "model": ("model_offload", {}),
    "sequential": ("sequential_offload", {}),
    "leaf": ("group_offload", {"use_stream": False}),
    "leaf streamed": ("group_offload", {}),
    "block": ("group_offload", {"type": "block_level", "use_stream": False, "blocks_per_group": 2}),
    "block streamed": ("group_offload", {"type": "block_level"}),
}
MORE = ("vae_tiling", "vae_slicing", "layerwise_casting", "fuse_qkv")
"""What can be added to a placement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: a small pipeline by name, or a model of the catalogue at its usual size."""

    kind: str
    name: str
    placement: str
    dtype: str
    more: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Case:
        return cls(**content | {"more": tuple(content["more"])})


def cases(
    kind: str, names: Sequence[str], placements: Sequence[str], dtypes: Sequence[str], more: Sequence[str] = ()
) -> Iterator[Case]:
    """Yield every combination."""
    for name, placement, dtype in itertools.product(names, placements, dtypes):
        yield Case(kind=kind, name=name, placement=placement, dtype=dtype, more=tuple(more))
