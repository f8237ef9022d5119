"""The cells of the matrix that say "yes": each pair, executed on a small pipeline."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from engine import compat, optimizers
from tests.evidence import small
from truth import pipelines

CELLS = [
    (row, column)
    for row in compat.shipped().rows
    for column in compat.shipped().columns
    if column != "xdit" and not optimizers.spec(row).is_placement
]
GROUPS: list[dict[str, Any]] = [
    {},
    {"use_stream": False},
    {"type": "block_level"},
    {"type": "block_level", "use_stream": False},
]
BATCH = {"num_images_per_prompt": 2, "height": 96}  # so that both slices and tiles begin


@cache
def _resident(row: str) -> Any:
    pipe, call = pipelines.made("pixart")
    return small.draw(small.apply(pipe, row, "resident"), call | BATCH)


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_a_pair_that_goes_together_draws_the_same(counted: torch.device, row: str, column: str) -> None:
    """Both take effect (each step verifies itself), and the picture is the one that is drawn without the placement."""
    for params in GROUPS if column == "group_offload" else [{}]:
        pipe, call = pipelines.made("pixart")
        small.apply(pipe, row, (column, params))
        drawn = small.draw(pipe, call | BATCH)
        assert small.alike(drawn, _resident(row)), params
        assert small.alike(small.draw(pipe, call | BATCH), drawn), params  # hooks are set anew between calls


def test_the_cells_are_those_of_the_guide() -> None:
    assert len(CELLS) == 9
    assert len(compat.shipped().rows) * len(compat.shipped().columns) == 24
