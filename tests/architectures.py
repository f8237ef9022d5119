"""The small pipelines of `truth`, of which a test takes some, and `make slow` the others too."""

from __future__ import annotations

from typing import Any

import pytest

from truth import pipelines


def architectures(*quick: str) -> list[Any]:
    """Return every architecture as a parameter; all but these are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in pipelines.ALL]
