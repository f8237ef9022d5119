"""What two versions of a profile differ in."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import profiles
from engine.profiles import changes
from tests.conftest import write

OLD = """\
schema: dg-run/profile@1
name: team
version: 1.0.0
summary: ours
match: {free_vram: {at_least: 8GiB}}
optimizers:
  - dtype: auto
  - vae_slicing
  - one_of: [none, vae_tiling]
  - one_of: [resident, model_offload, [layerwise_casting, group_offload]]
"""


def differences(folder: Path, *edits: tuple[str, str]) -> list[str]:
    text = OLD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    before, after = (profiles.load(write(folder, n, t), n) for n, t in (("a.yaml", OLD), ("b.yaml", text)))
    return list(changes.between(before, after))


def test_how_it_is_written_does_not_count(tmp_path: Path) -> None:
    assert differences(tmp_path, ("8GiB", "8192MiB"), ("  - vae_slicing\n", "  # a comment\n  - vae_slicing\n")) == []


LIST = "optimizers: "
CASES = [
    ("1.0.0", "1.1.0", "version: 1.0.0 → 1.1.0"),
    ("summary: ours", "summary: ours\nfallback: low", "fallback: none → low"),
    ("8GiB", "9GiB", "match: from 8.00 GiB of free VRAM → from 9.00 GiB of free VRAM"),
    ("8GiB}", "8GiB, below: 9GiB}", "match: from 8.00 GiB of free VRAM → from 8.00 GiB to below 9.00 GiB of free VRAM"),
    ("  - vae_slicing\n", "", LIST + "vae_slicing is gone"),
    ("  - vae_slicing\n", "  - vae_slicing\n  - fuse_qkv\n", LIST + "fuse_qkv is added"),
    ("dtype: auto", "dtype: float16", LIST + "dtype: auto → float16"),
    (
        "[none, vae_tiling]",
        "[vae_tiling, none]",
        LIST + "the alternatives stand in another order: vae_tiling | none",
    ),
    ("one_of: [none, vae_tiling]\n", "vae_tiling\n", LIST + "one of (none | vae_tiling) → vae_tiling"),
    ("resident, model_offload", "model_offload", LIST + "the alternative resident is gone"),
    ("group_offload]", "{group_offload: {use_stream: false}}]", LIST + "group_offload.use_stream: true → false"),
    ("- dtype: auto\n  - vae_slicing", "- vae_slicing\n  - dtype: auto", LIST + "vae_slicing stands in another place"),
]


@pytest.mark.parametrize(("old", "new", "line"), CASES)
def test_a_difference_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    (found,) = differences(tmp_path, (old, new))
    assert found.startswith(line)


def test_within_a_choice_the_alternatives_are_told_that_came_and_went(tmp_path: Path) -> None:
    found = differences(
        tmp_path,
        ("model_offload, [layerwise_casting, group_offload]", "[layerwise_casting, model_offload], group_offload"),
    )
    assert found == [
        "optimizers: the alternative model_offload is gone",
        "optimizers: the alternative layerwise_casting + group_offload is gone",
        "optimizers: the alternative layerwise_casting + model_offload is added",
        "optimizers: the alternative group_offload is added",
    ]
