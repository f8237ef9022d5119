"""Pictures on disk: checked before, whole or not at all, and never lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import engine
from engine.errors import FileError
from engine.plan import Plan
from engine.run import output, places
from engine.run.items import Item
from tests.conftest import card, machine

ITEM = Item(number=0, prompt="日本 “quoted”", negative_prompt=None, seed=7)


def picture() -> Image.Image:
    return Image.new("RGB", (16, 16), "red")


@pytest.fixture
def plan() -> Plan:
    return engine.resolve(hardware=machine(card()))


def test_a_picture_says_what_it_was_made_with_and_names_no_card(tmp_path: Path, plan: Plan) -> None:
    path = output.save(picture(), tmp_path / "p.png", output.record(plan, ITEM))
    with Image.open(path) as opened:
        text: dict[str, Any] = opened.text  # type: ignore[attr-defined]
    assert (text["prompt"], text["seed"], text["model"]) == ("日本 “quoted”", "7", "embedded")
    assert json.loads(text["dg-run"])["digest"] == plan.digest
    assert "GPU-" not in text["dg-run"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_write_that_fails_leaves_what_was_there_and_keeps_the_picture(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, spare = tmp_path / "there", tmp_path / "spare"
    place.mkdir()
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    (place / "p.png").write_bytes(b"an older picture")
    real = os.fsync

    def full(fd: int) -> None:
        if str(place) in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left on device") as caught:
        output.save(picture(), place / "p.png", output.record(plan, ITEM))
    assert [p.name for p in place.iterdir()] == ["p.png"]
    assert (place / "p.png").read_bytes() == b"an older picture"
    (kept,) = spare.iterdir()
    assert str(kept) in caught.value.do
    assert Image.open(kept).size == (16, 16)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        output.save(picture(), tmp_path / "p.png", output.record(plan, ITEM))
    assert list(tmp_path.iterdir()) == []


def names(asked: Path | None, count: int) -> list[str]:
    return [p.as_posix() for p in places.Files(asked, count, 7, ".png").paths]


def test_names_are_new_unless_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names(None, 1) == ["outputs/7.png"]
    Path("outputs").mkdir()
    Path("outputs/7.png").touch()
    assert names(None, 1) == ["outputs/7_1.png"]
    assert names(None, 2) == ["outputs/7-1.png", "outputs/7-2.png"]
    Path("outputs/7-2.png").touch()
    assert names(None, 2) == ["outputs/7_1-1.png", "outputs/7_1-2.png"]
    assert names(Path("a/b.png"), 1) == ["a/b.png"]
    assert names(Path("a/b.png"), 2) == ["a/b-1.png", "a/b-2.png"]


def test_a_new_name_that_was_taken_meanwhile_is_written_over_by_nobody(tmp_path: Path, plan: Plan) -> None:
    said = output.record(plan, ITEM)
    made = [output.save(picture(), tmp_path / "7.png", said, is_new=True) for _ in range(3)]
    assert [p.name for p in made] == ["7.png", "7_1.png", "7_2.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7.png", "7_1.png", "7_2.png"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("p.jpg", "pictures are written as PNG"),
        ("p", "the name ends in nothing"),
        ("folder.png", "is a directory"),
        ("file/p.png", "cannot be written"),
    ],
)
def test_a_place_that_cannot_take_a_picture_is_refused_before_the_run(
    tmp_path: Path, plan: Plan, name: str, part: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=part) as caught:
        output.check([tmp_path / name], plan)
    assert caught.value.exit_code == 8


def test_a_full_disk_is_refused_before_the_run(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FileError, match="is full"):
        output.check([tmp_path / "p.png"], plan)


def test_the_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path, plan: Plan) -> None:
    output.check([tmp_path / "new" / "deep" / "p.png"], plan)
    assert list((tmp_path / "new" / "deep").iterdir()) == []
