"""From words to a video: small models with random weights, from a folder to an mp4 that says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import engine
from engine import cli, paths
from engine.run import media
from truth import pipelines

SIZE = ["--height", "64", "--width", "96", "--num_frames", "9", "--num_inference_steps", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small video models, which read with the tokenizer of the embedded one."""
    from transformers import AutoTokenizer

    reads = AutoTokenizer.from_pretrained(paths.embedded_model_dir() / "tokenizer_2")
    made = {}
    for name in ("wan", "ltx"):
        pipe, _ = pipelines.made(name)
        pipe.register_modules(tokenizer=reads)
        made[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(made[name])
    return made


def frames(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def rate(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0)


@pytest.mark.parametrize(("name", "fps"), [("wan", 16), ("ltx", 25)])
def test_a_video_is_drawn_from_words(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fps: float
) -> None:
    out = tmp_path / "clip.mp4"
    run = ["--auto", "--model", str(models[name]), *SIZE, "--prompt", "a red circle", "--seed", "3"]
    assert cli.main([*run, "--call", "max_sequence_length=32", "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    seen = frames(out)
    assert (len(seen), seen[0].shape) == (9, (64, 96, 3))
    assert rate(out) == fps
    said = media.read_record(out)
    assert (said["prompt"], said["seed"]) == ("a red circle", "3")
    plan = json.loads(said["dg-run"])
    assert plan["request"]["frames"] == 9
    again = tmp_path / "again.mp4"
    assert cli.main(["--like", str(out), "--output", str(again)]) == 0
    assert all(np.array_equal(a, b) for a, b in zip(seen, frames(again), strict=True))


def test_what_is_in_the_file_is_what_the_pipeline_gave(models: dict[str, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"height": 64, "width": 64, "frames": 9, "steps": 1, "device": "cpu"}
    plan = engine.resolve(models["ltx"], **asked, call={"max_sequence_length": 32, "frame_rate": 12})
    (made,) = plan.run("a red circle", seed=1)
    assert isinstance(made, media.Video)
    assert (len(made), made.size, made.fps, made.info["seed"]) == (9, (64, 64), 12, 1)
    pipe = plan.load()
    call = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
    more = {"max_sequence_length": 32, "frame_rate": 12, "generator": torch.Generator().manual_seed(1)}
    plain = pipe(**call, **more).frames[0]
    assert [np.asarray(f).tolist() for f in made.frames] == [np.asarray(f).tolist() for f in plain]


def test_frames_that_the_pipeline_does_not_make_are_told(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--auto", "--model", str(models["ltx"]), *SIZE, "--num_frames", "14", "--prompt", "a red circle"]
    more = ["--call", "max_sequence_length=32", "--output", str(tmp_path / "clip.mp4")]
    assert cli.main([*run, *more]) == 0
    assert "note: the pipeline made 9 frames of the 14 that were asked for" in capsys.readouterr().err


def test_a_batch_of_videos_is_one_file_each(models: dict[str, Path], tmp_path: Path) -> None:
    run = ["--auto", "--model", str(models["wan"]), *SIZE, "--prompt", "a red circle", "--seed", "3"]
    more = ["--batch_size", "2", "--call", "max_sequence_length=32", "--output", f"{tmp_path}/out/"]
    assert cli.main([*run, *more]) == 0
    first, second = sorted((tmp_path / "out").glob("*.mp4"))
    assert [media.read_record(p)["seed"] for p in (first, second)] == ["3", "4"]
    assert not np.array_equal(frames(first)[0], frames(second)[0])


def test_a_video_goes_into_no_png(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--auto", "--model", str(models["wan"]), "--prompt", "a red circle"]
    assert cli.main([*run, "--output", str(tmp_path / "clip.png")]) == 8
    assert "videos are written as MP4" in capsys.readouterr().err
