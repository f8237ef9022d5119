"""What a pipeline gave, as values and as files that say how they were made."""

from __future__ import annotations

import os
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import FileError, IncompatibleError
from engine.facts import video as families
from engine.run import media
from engine.run.media import Video

RECORD = {
    "prompt": "日本 “quoted” = ; # \\\nin two lines",
    "seed": "7",
    "model": "embedded",
    "plan_digest": "sha256:0",
    "dg-run": '{"request": "' + "ü" * 20_000 + '"}',
}
COLOURS = ((200, 30, 40), (20, 90, 220), (240, 240, 30))


def picture(colour: tuple[int, int, int] = COLOURS[0], size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def video(size: tuple[int, int] = (32, 24), fps: float = 16) -> Video:
    return Video([picture(c, size) for c in COLOURS], fps)


class Pipe:
    config: Any = SimpleNamespace(get={}.get)

    def __call__(self, prompt: str) -> None: ...


def pipe_named(name: str, **more: Any) -> Any:
    return type(name, (Pipe,), more)()


# --- values


def test_pictures_come_as_images_arrays_or_tensors() -> None:
    pil = [picture(c) for c in COLOURS]
    array = np.stack([np.asarray(p, dtype=np.float32) / 255 for p in pil])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).to(torch.float64)
    for images in (pil, array, tensor, list(array), list(tensor)):
        for result in (SimpleNamespace(images=images), SimpleNamespace(image=images)):
            made = media.outputs(result, Pipe())
            assert [np.asarray(m).tolist() for m in made] == [np.asarray(p).tolist() for p in pil]


def test_videos_come_as_lists_arrays_or_tensors() -> None:
    clips = [[picture(c) for c in COLOURS], [picture(c) for c in COLOURS[::-1]]]
    array = np.stack([np.stack([np.asarray(f, dtype=np.float32) / 255 for f in c]) for c in clips])
    tensor = torch.from_numpy(array).permute(0, 1, 4, 2, 3)
    for frames in (clips, array, tensor, list(array), list(tensor), [list(c) for c in array]):
        made = media.outputs(SimpleNamespace(frames=frames), pipe_named("WanPipeline"))
        assert [(type(m), len(m), m.size, m.fps) for m in made] == [(Video, 3, (32, 24), 16)] * 2  # type: ignore
        assert [np.asarray(f).tolist() for m in made for f in m.frames] == [  # type: ignore[union-attr]
            np.asarray(f).tolist() for c in clips for f in c
        ]


def test_sound_that_is_not_written_is_named() -> None:
    (made,) = media.outputs(SimpleNamespace(frames=[[picture()]], audio=torch.zeros(1, 2, 9)), Pipe(), fps=24)
    assert isinstance(made, Video)
    assert made.left_out == ("audio",)


@pytest.mark.parametrize(
    "result",
    [
        SimpleNamespace(audios=[1]),
        SimpleNamespace(images=None),
        SimpleNamespace(images=torch.zeros(1, 16, 8, 8)),
        SimpleNamespace(images=torch.zeros(1, 64, 16)),
        SimpleNamespace(images=[["a"]]),
        SimpleNamespace(frames=torch.zeros(1, 16, 3, 8, 8)[0]),
        SimpleNamespace(frames=[[]]),
        SimpleNamespace(frames=[]),
        (1, 2),
    ],
)
def test_what_is_neither_is_refused(result: Any) -> None:
    with pytest.raises(IncompatibleError, match="Pipe gives neither pictures nor videos"):
        media.outputs(result, Pipe())


def test_how_fast_a_video_plays_is_said_by_its_call_its_pipeline_or_its_family() -> None:
    from diffusers import Cosmos2VideoToWorldPipeline, LTXPipeline

    ltx, cosmos = object.__new__(LTXPipeline), object.__new__(Cosmos2VideoToWorldPipeline)
    assert media.frame_rate(ltx, {"frame_rate": 30}) == 30
    assert media.frame_rate(ltx, {}) == 25
    assert media.frame_rate(cosmos, {"fps": 12.5}) == 12.5
    assert media.frame_rate(cosmos, {"fps": float("nan")}) == families.UNKNOWN_FRAME_RATE
    for name, rate in {
        "WanPipeline": 16,
        "WanAnimatePipeline": 30,
        "HunyuanVideo15Pipeline": 24,
        "HunyuanVideoFramepackPipeline": 30,
        "MochiPipeline": 30,
        "AnimateDiffSDXLPipeline": 8,
        "OtherPipeline": families.UNKNOWN_FRAME_RATE,
    }.items():
        assert media.frame_rate(pipe_named(name), {}) == rate, name
    packed = SimpleNamespace(get={"expand_timesteps": True}.get)
    assert media.frame_rate(pipe_named("WanPipeline", config=packed), {}) == 24
    for patch, rate in ((None, 8), (2, 16)):
        transformer = SimpleNamespace(config=SimpleNamespace(patch_size_t=patch))
        assert media.frame_rate(pipe_named("CogVideoXPipeline", transformer=transformer), {}) == rate


def test_every_family_of_the_table_is_one_of_diffusers() -> None:
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Pipeline")]
    assert [f for f in families._FRAME_RATES if not any(n.startswith(f) for n in names)] == []
    assert set(families._PICTURES) < set(names)
    assert {"WanPipeline", "LTXPipeline", "Kandinsky5T2VPipeline"} <= {n for n in names if families.gives_videos(n)}
    pictures = {"FluxPipeline", "SanaPipeline", "Kandinsky5T2IPipeline", "StableDiffusionPipeline"}
    assert pictures <= {n for n in names if not families.gives_videos(n)}


# --- files


@pytest.mark.parametrize("output", [picture(), video()], ids=["picture", "video"])
def test_a_file_says_how_it_was_made(tmp_path: Path, output: Any) -> None:
    path = tmp_path / f"x{media.suffix(output)}"
    media.write(output, path, RECORD)
    assert media.read_record(path) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("output", [picture(), video()], ids=["picture", "video"])
def test_the_same_output_is_the_same_file(tmp_path: Path, output: Any) -> None:
    for name in ("a", "b"):
        media.write(output, tmp_path / name, RECORD)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("size", [(32, 24), (33, 24), (32, 25), (33, 25), (1, 1)])
@pytest.mark.parametrize("fps", [8, 16.5, 23.976])
def test_a_video_is_h264_that_every_player_takes(tmp_path: Path, size: tuple[int, int], fps: float) -> None:
    path = tmp_path / "x.mp4"
    media.write(video(size, fps), path, RECORD)
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        assert float(stream.average_rate) == pytest.approx(fps, abs=1e-3)
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert len(shown) == len(COLOURS)
    for frame, colour in zip(shown, COLOURS, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 6


def test_pictures_of_other_modes_are_written_as_they_are(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "I;16"):
        media.write(Image.new(mode, (8, 8)), tmp_path / "x.png", RECORD)
        with Image.open(tmp_path / "x.png") as opened:
            assert opened.mode == mode


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("output", [picture(), video()], ids=["picture", "video"])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"an older one")
    monkeypatch.setattr(os, "fsync", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        media.write(output, path, RECORD)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"an older one"]


@pytest.mark.parametrize("output", [picture(), video()], ids=["picture", "video"])
def test_a_file_that_the_disk_does_not_take_leaves_what_was_there(tmp_path: Path, output: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"an older one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            media.write(output, path, RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"an older one"]


# --- what is read


def _chunk(name: bytes, content: bytes, *, sound: bool = True) -> bytes:
    checksum = zlib.crc32(name + content) ^ (not sound)
    return len(content).to_bytes(4) + name + content + checksum.to_bytes(4)


def _with_chunk(chunk: bytes) -> Callable[[bytes], bytes]:
    def change(png: bytes) -> bytes:
        return png[:33] + chunk + png[33:]  # behind the header

    return change


def _bomb() -> bytes:
    return _chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(bytes(64 * 2**20), 9))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda png: b"", "the file is empty"),
        (lambda png: b"GIF89a" + png, "those of something else"),
        (lambda png: png[:20], "is cut off"),
        (lambda png: png[:200], "is cut off"),
        (lambda png: png[:-4], "is cut off"),
        (lambda png: png[:-20], "is cut off"),
        (lambda png: png.replace(b"embedded", b"embeddod"), "is damaged"),
        (lambda png: png.replace(b"dg-run\0", b"dg-ran\0"), "is damaged"),
        (_with_chunk(_chunk(b"iTXt", b"prompt\0\0\0\0\0\xff")), "is damaged"),
        (_with_chunk(_chunk(b"iTXt", b"prompt")), "is damaged"),
        (_with_chunk(_chunk(b"iTXt", b"prompt\0\1\0\0\0no")), "is damaged"),
        (_with_chunk(_chunk(b"tEXt", b"prompt\0no", sound=False)), "is damaged"),
        (_with_chunk(_chunk(b"iTXt", b"prompt\0\0\0\0\0" + bytes(17 * 2**20))), "more than 16.0 MiB"),
        (_with_chunk(_bomb()), "more than 16.0 MiB"),
        (_with_chunk(b"\x7f\xff\xff\xffiTXt"), "more than 16.0 MiB"),
        (_with_chunk(b"\x7f\xff\xff\xffzTXt"), "is cut off"),
    ],
)
def test_a_picture_that_says_nothing_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], part: str) -> None:
    path = tmp_path / "x.png"
    media.write(picture(), path, RECORD)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FileError) as caught:
        media.read_record(path)
    assert part in str(caught.value)
    assert caught.value.exit_code == 8


def test_a_record_that_another_program_has_packed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    media.write(picture(), path, {"dg-run": "{}"})
    more = _chunk(b"iTXt", b"prompt\0\1\0de\0x\0" + zlib.compress("ü".encode())) + _chunk(b"tEXt", b"a\0\xe9")
    path.write_bytes(_with_chunk(more)(path.read_bytes()))
    assert media.read_record(path) == {"dg-run": "{}", "prompt": "ü", "a": "é"}


@pytest.mark.parametrize("keep", [12, 100, 0.5, 0.99])
def test_a_video_that_is_cut_off_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "x.mp4"
    media.write(video(), path, RECORD)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(FileError, match=r"is cut off|how it was made"):
        media.read_record(path)


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    media.write(video(), tmp_path / "plain.mp4", {"prompt": "x"})
    (tmp_path / "text.mp4").write_text("not a video")
    os.mkfifo(tmp_path / "queue.png")
    for name, part in {
        "plain.png": "does not say how it was made",
        "plain.mp4": "does not say how it was made",
        "text.mp4": "is neither a PNG nor an mp4",
        "missing.png": "No such file",
        ".": "is a directory",
        "queue.png": "is not a file",
    }.items():
        with pytest.raises(FileError, match=part):
            media.read_record(tmp_path / name)
