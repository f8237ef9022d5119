"""What optimizers draw and hold on the counted device, beside the plain pipeline; and the table of the docs."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest

from engine import optimizers
from tools import optimizer_table
from truth import effects, many, outputs, pipelines
from truth.effects import APPLIED, NOTHING
from truth.executed import executed

JOBS = os.cpu_count() or 1

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


def test_each_way_of_each_optimizer_draws_the_plain_picture_twice_and_holds_what_was_predicted() -> None:
    """On one architecture each, every architecture being among them."""
    few = outputs.few()
    assert {c.architecture for c in few} == set(pipelines.ALL)
    assert {s.name for c in few for s in c.steps} == set(optimizers.NAMES) - set(outputs.LEFT_OUT)
    found = [outputs.compared(case) for case in few]
    assert [(d.id, d.wrong) for d in found if d.wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", pipelines.ALL)
def test_each_way_and_each_permitted_pair_draws_the_plain_picture_twice(architecture: str) -> None:
    cases = [*outputs.singles(architecture), *outputs.pairs(architecture)]
    found = list(many.each(outputs.compared, cases, JOBS))
    assert len(found) > 90
    assert [(d.id, d.wrong) for d in found if d.wrong] == []


@pytest.mark.rule("tiling-by-a-tile-that-holds-the-picture")
@pytest.mark.parametrize("architecture", ["pixart", "hunyuan_video"])
def test_a_tile_that_holds_the_picture_changes_nothing(architecture: str) -> None:
    """And one that does not is no matter of the rule."""
    whole = effects.cell(architecture, "vae_tiling, a tile as large as the picture")
    assert (whole.told, whole.rules, whole.seen) == (NOTHING, ("tiling-by-a-tile-that-holds-the-picture",), NOTHING)
    cut = effects.cell(architecture, "vae_tiling")
    assert (cut.told, cut.seen) == (APPLIED, APPLIED)


@pytest.mark.rule("casting-bfloat16-to-itself", "casting-float16-to-itself")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_to_the_precision_that_is_there_changes_nothing(dtype: str) -> None:
    """Not a weight, not an allocation, not a bit of the picture."""
    cell = effects.cell("qwen_image", f"layerwise_casting, {dtype} to {dtype}")
    assert (cell.told, cell.rules, cell.seen) == (NOTHING, (f"casting-{dtype}-to-itself",), NOTHING)


@pytest.mark.rule("casting-from-bfloat16-to-float16", "casting-from-float16-to-bfloat16")
@pytest.mark.parametrize(("dtype", "storage"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_a_cast_to_as_many_bytes_saves_none(dtype: str, storage: str) -> None:
    case = effects.case_of("qwen_image", f"layerwise_casting, {dtype} to {storage}")
    assert f"casting-from-{dtype}-to-{storage}" in {f.rule.id for f in outputs.findings(case)}
    assert executed(case).peak_bytes >= executed(dataclasses.replace(case, steps=())).peak_bytes
    assert effects.cell("qwen_image", f"layerwise_casting, {dtype} to {storage}").seen == APPLIED


def test_the_table_of_the_docs_is_what_was_executed_and_was_foretold() -> None:
    """Of every optimizer that there is, on every architecture, and no run that the rules had not foretold."""
    cells = optimizer_table.stored()
    assert list(optimizer_table.problems(cells)) == []
    assert optimizer_table.PAGE.read_text(encoding="utf-8") == optimizer_table.page(cells), "stale: --write"


@pytest.mark.parametrize(
    ("way", "architecture"),
    [
        ("fuse_qkv", "ltx"),
        ("attention_slicing", "pixart"),
        ("vae_slicing, one picture", "ltx"),
        ("group_offload, block", "sd3"),
        ("model_offload", "qwen_image"),
    ],
)
def test_a_cell_of_the_table_comes_out_again(way: str, architecture: str) -> None:
    stored = {(c.way, c.architecture): c for c in optimizer_table.stored()}
    assert effects.cell(architecture, way) == stored[way, architecture]


def test_a_run_that_was_not_foretold_shows() -> None:
    cells = [dataclasses.replace(c, told=NOTHING, seen=APPLIED) for c in optimizer_table.stored()[:1]]
    assert any("the rules say 'no effect', and it is 'applied'" in p for p in optimizer_table.problems(cells))
    assert any("runs were not made" in p for p in optimizer_table.problems(cells))
