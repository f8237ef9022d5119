"""What is being drawn is shown while it is, and nothing of the output changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import cli, paths
from engine.run import media, preview
from truth import pipelines

CALL = {"prompt": "a red circle", "height": 64, "width": 96, "num_inference_steps": 3, "max_sequence_length": 32}


class Heard:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, what: str) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def bars(self) -> bool:
        return False


@pytest.fixture(scope="module")
def embedded() -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(paths.embedded_model_dir())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Image.Image]]:
    """Every preview, however long one takes."""
    kept: list[Image.Image] = []
    real = media.write

    def write(output: Any, path: Path, record: Any) -> None:
        if path.name.endswith(".preview.png"):
            kept.append(output)
        real(output, path, record)

    monkeypatch.setattr(media, "write", write)
    monkeypatch.setattr(preview, "_REST", 0)
    return iter([kept])


def drawn(pipe: Any, **more: Any) -> Any:
    call = CALL | {"generator": torch.Generator().manual_seed(7)} | more
    return np.asarray(pipe(**call).images[0])


def test_previews_come_near_to_the_picture_and_leave_it_as_it_is(
    embedded: Any, tmp_path: Path, written: Iterator[list[Image.Image]]
) -> None:
    (kept,) = written
    heard = Heard()
    before = torch.get_rng_state()
    seen = preview.view(embedded, heard)
    assert seen is not None
    assert torch.equal(torch.get_rng_state(), before)
    plain = drawn(embedded)
    with preview.shown(embedded, seen, tmp_path / "x.preview.png", (96, 64), heard):
        shown = drawn(embedded)
    assert np.array_equal(plain, shown)
    assert heard.lines == []
    assert [k.size for k in kept] == [(96, 64)] * 3
    far = [np.abs(np.asarray(k).astype(int) - plain).mean() for k in kept]
    assert far[-1] < 6
    assert far[-1] < far[0]
    assert list(tmp_path.iterdir()) == []
    assert "step" not in vars(embedded.scheduler)


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_latents_of_other_kinds_are_shown(name: str, tmp_path: Path, written: Iterator[list[Image.Image]]) -> None:
    (kept,) = written
    pipe, call = pipelines.made(name)
    heard = Heard()
    seen = preview.view(pipe, heard)
    assert seen is not None
    with preview.shown(pipe, seen, tmp_path / "x.preview.png", (64, 64), heard):
        pipe(**call | {"num_inference_steps": 1})
    assert (heard.lines, [k.size for k in kept]) == ([], [(64, 64)])


def test_latents_of_which_nobody_knows_how_they_are_packed_are_a_note(tmp_path: Path) -> None:
    pipe, call = pipelines.made("ltx")
    heard = Heard()
    seen = preview.view(pipe, heard)
    assert seen is not None
    with preview.shown(pipe, seen, tmp_path / "x.preview.png", (64, 64), heard):
        pipe(**call)
    assert heard.lines == ["note: there is no preview: how LTXPipeline packs its latents is not known"]


def test_a_pipeline_without_what_it_takes_is_a_note(embedded: Any) -> None:
    heard = Heard()

    class Bare:
        scheduler = embedded.scheduler

    assert preview.view(Bare(), heard) is None
    pipe, _ = pipelines.made("sd")
    pipe.vae.to("meta")
    assert preview.view(pipe, heard) is None
    assert [line.startswith("note: there is no preview: ") for line in heard.lines] == [True, True]


def test_a_place_that_takes_no_preview_is_a_note_and_the_run_goes_on(embedded: Any, tmp_path: Path) -> None:
    heard = Heard()
    seen = preview.view(embedded, heard)
    assert seen is not None
    with preview.shown(embedded, seen, tmp_path / "missing" / "x.preview.png", (96, 64), heard):
        assert drawn(embedded).shape == (64, 96, 3)
    assert len(heard.lines) == 1
    assert "No such file" in heard.lines[0]


def test_a_preview_is_gone_when_a_run_is_interrupted(embedded: Any, tmp_path: Path) -> None:
    seen = preview.view(embedded, Heard())
    assert seen is not None

    def interrupt(*_: Any) -> Any:
        assert (tmp_path / "x.preview.png").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with preview.shown(embedded, seen, tmp_path / "x.preview.png", (96, 64), Heard()):
            drawn(embedded, callback_on_step_end=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_preview_takes_a_tenth_of_the_time(
    embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Iterator[list[Image.Image]]
) -> None:
    (kept,) = written
    monkeypatch.undo()
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seen = preview.view(embedded, Heard())
    assert seen is not None
    show = preview._Shown(embedded, seen, tmp_path / "x.preview.png", (16, 16), Heard())
    real = media.write
    made: list[float] = []

    def write(*given: Any) -> None:
        made.append(now[0])
        now[0] += 2.0
        real(*given)

    monkeypatch.setattr(media, "write", write)
    for _ in range(50):
        show.step((torch.zeros(1, 1, 32),), torch.zeros(1, 1, 32))
        now[0] += 1.0
    assert kept == []
    assert made[0] == 0
    assert all(b - a >= 20 for a, b in itertools.pairwise(made))
    assert len(made) > 1


def test_the_command_line_shows_previews_beside_the_output(
    tmp_path: Path, written: Iterator[list[Image.Image]]
) -> None:
    (kept,) = written
    run = ["--auto", "--device", "cpu", "--prompt", "a red circle", "--seed", "1", "--height", "32", "--width", "32"]
    run += ["--num_inference_steps", "2"]
    assert cli.main([*run, "--output", str(tmp_path / "plain.png")]) == 0
    assert kept == []
    assert cli.main([*run, "--preview", "--output", str(tmp_path / "seen.png")]) == 0
    assert len(kept) == 2
    one, other = (np.asarray(Image.open(tmp_path / n)) for n in ("plain.png", "seen.png"))
    assert np.array_equal(one, other)
    assert not list(tmp_path.glob("*.preview.png"))
