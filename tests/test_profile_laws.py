"""Laws of every profile: what is written is read, a child without edits is its parent, edits do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import optimizers, profiles
from engine.profiles import changes
from engine.values import Profile, Slot, Step
from tests.conftest import write

NAMES = [s.name for s in optimizers.specs() if not s.is_placement and s.name not in ("xdit", "fuse_qkv")]
PLACEMENTS = [s.name for s in optimizers.specs() if s.is_placement]
SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def lists(draw: st.DrawFn) -> list[Any]:
    """Lists in the order of slots, which no rule that needs no model speaks against."""
    chosen = draw(st.sets(st.sampled_from(NAMES), max_size=4))
    found: list[Any] = []
    for name in (n for n in NAMES if n in chosen):
        step = {"dtype": draw(st.sampled_from(["auto", "float16"]))} if name == "dtype" else name
        found.append(draw(st.sampled_from([step, {"one_of": ["none", step]}, {"one_of": [step, "none"]}])))
    several = draw(st.lists(st.sampled_from(PLACEMENTS), min_size=1, max_size=4, unique=True))
    group = {"group_offload": {"type": "block_level", "blocks_per_group": draw(st.integers(1, 9)), "use_stream": False}}
    placed = [group if p == "group_offload" else p for p in several]
    return [*found, placed[0] if len(placed) == 1 else {"one_of": placed}]


def load(folder: Path, name: str, **keys: Any) -> Profile:
    """Return a profile by way of its file."""
    value = {"schema": "dg-run/profile@1", "name": name, "version": "1.0.0", "summary": "x"} | keys
    return profiles.load(write(folder, f"{name}.yaml", json.dumps(value)), name)


def steps(slot: Slot) -> list[Step]:
    return [s for a in slot.alternatives for s in a]


def all_steps(profile: Profile) -> list[Step]:
    return [s for slot in profile.slots for s in steps(slot)]


@SETTINGS
@given(lists())
def test_what_is_written_is_read(tmp_path: Path, listed: list[Any]) -> None:
    profile = load(tmp_path, "a", optimizers=listed)
    assert len(profile.slots) == len(listed)
    for slot, entry in zip(profile.slots, listed, strict=True):
        written = entry["one_of"] if isinstance(entry, dict) and "one_of" in entry else [entry]
        names = [() if w == "none" else (w if isinstance(w, str) else next(iter(w)),) for w in written]
        assert [tuple(s.name for s in a) for a in slot.alternatives] == names
    assert changes.between(profile, profile) == ()


@SETTINGS
@given(lists())
def test_a_child_that_says_nothing_is_its_parent(tmp_path: Path, listed: list[Any]) -> None:
    parent = load(tmp_path, "parent", optimizers=listed, prefer="vram", match={"pixels": {"below": 5}})
    child = load(tmp_path, "child", extends="parent")
    assert (child.slots, child.match, child.prefer, child.overridden) == (parent.slots, parent.match, "vram", ())
    assert changes.between(parent, child) == ("name: parent → child", "extends: none → parent")


@SETTINGS
@given(lists(), st.data())
def test_what_is_dropped_is_gone_and_the_rest_is_as_it_was(
    tmp_path: Path, listed: list[Any], data: st.DataObject
) -> None:
    parent = load(tmp_path, "parent", optimizers=listed)
    names = sorted({s.name for s in all_steps(parent)})
    dropped = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=max(1, len(names) - 1)))
    if dropped == set(names):
        return
    child = load(tmp_path, "child", extends="parent", drop=sorted(dropped))
    assert all_steps(child) == [s for s in all_steps(parent) if s.name not in dropped]
    assert all(steps(slot) for slot in child.slots)
    assert len(child.overridden) == len(dropped)


@SETTINGS
@given(lists(), st.sampled_from(["float16", "float32"]))
def test_what_is_set_is_set_everywhere_and_nothing_else_changes(tmp_path: Path, listed: list[Any], value: str) -> None:
    parent = load(tmp_path, "parent", optimizers=listed)
    edits: dict[str, Any] = {}
    names = {s.name for s in all_steps(parent)}
    if "dtype" in names:
        edits["dtype"] = value
    if "group_offload" in names:
        edits["group_offload"] = {"blocks_per_group": 17}
    if not edits:
        return
    child = load(tmp_path, "child", extends="parent", set=edits)
    for was, now in zip(all_steps(parent), all_steps(child), strict=True):
        given = {"value": edits["dtype"]} if was.name == "dtype" and "dtype" in edits else edits.get(was.name, {})
        assert now.name == was.name
        assert now.params == {**was.params, **given}
