"""The small pipelines of `truth`, of which a test takes some, and `make slow` the others too."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from truth import pipelines


def architectures(*quick: str, without: Collection[str] = ()) -> list[Any]:
    """Return every architecture as a parameter; all but the quick ones are slow."""
    every = [n for n in pipelines.ALL if n not in without]
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in every]
