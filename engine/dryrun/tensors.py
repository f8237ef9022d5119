"""Find the tensors among what an operator is given or gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def tensors_in(items: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments, those in lists included."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += tensors_in(item)
    return found
