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
from engine.run import output
from tests.conftest import card, machine


def picture() -> Image.Image:
    made = Image.new("RGB", (16, 16), "red")
    made.info |= {"prompt": "日本 “quoted”", "seed": 7, "model": "embedded", "plan_digest": "sha256:0"}
    return made


@pytest.fixture
def plan() -> Plan:
    return engine.resolve(hardware=machine(card()))


def test_a_picture_says_what_it_was_made_with_and_names_no_card(tmp_path: Path, plan: Plan) -> None:
    path = output.save(picture(), tmp_path / "p.png", plan)
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
        output.save(picture(), place / "p.png", plan)
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
        output.save(picture(), tmp_path / "p.png", plan)
    assert list(tmp_path.iterdir()) == []


def test_names_are_new_unless_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output.paths(None, 1, 7) == [Path("outputs/7.png")]
    Path("outputs").mkdir()
    Path("outputs/7.png").touch()
    assert output.paths(None, 1, 7) == [Path("outputs/7_1.png")]
    assert output.paths(None, 2, 7) == [Path("outputs/7-1.png"), Path("outputs/7-2.png")]
    Path("outputs/7-2.png").touch()
    assert output.paths(None, 2, 7) == [Path("outputs/7_1-1.png"), Path("outputs/7_1-2.png")]
    assert output.paths(Path("a/b.png"), 1, 7) == [Path("a/b.png")]
    assert output.paths(Path("a/b.png"), 2, 7) == [Path("a/b-1.png"), Path("a/b-2.png")]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("p.jpg", "pictures are written as PNG"),
        ("p", "the name ends in nothing"),
        ("folder.png", "is a directory"),
        ("file/p.png", "cannot be written"),
    ],
)
def test_a_place_that_cannot_take_a_picture_is_refused_before_the_run(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=part) as caught:
        output.check([tmp_path / name], 128 * 128)
    assert caught.value.exit_code == 8


def test_a_full_disk_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FileError, match="is full"):
        output.check([tmp_path / "p.png"], 128 * 128)


def test_the_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    output.check([tmp_path / "new" / "deep" / "p.png"], None)
    assert list((tmp_path / "new" / "deep").iterdir()) == []
