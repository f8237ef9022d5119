"""The picture that a run begins with: what may come, and the size that it is drawn at."""

from __future__ import annotations

import dataclasses
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engine
from engine import api, cli, pictures, prompts
from engine.errors import FileError, UsageError
from engine.run import calls, items, media
from engine.values import Request
from tests.conftest import card, machine

pytestmark = pytest.mark.usefixtures("no_estimates")
RED, BLUE = (200, 30, 40), (20, 90, 220)


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    made = Image.new("RGB", size, RED)
    made.paste(BLUE, (size[0] // 2, 0, *size))
    return made


def saved(tmp_path: Path, image: Image.Image, name: str = "in.png", **more: Any) -> Path:
    image.save(tmp_path / name, **more)
    return tmp_path / name


# --- what may come


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a.tiff", "a.ppm", "a.png.jpg"])
def test_a_picture_is_read_and_known_by_its_content(tmp_path: Path, name: str) -> None:
    whole: dict[str, Any] = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
    path = saved(tmp_path, halves(), name, **whole)
    read = pictures.read(path)
    assert (read.size, read.image.mode, read.changes) == ((40, 20), "RGB", ())
    assert np.abs(np.asarray(read.image).astype(int) - np.asarray(halves())).max() <= 3
    other = path.rename(tmp_path / "elsewhere")
    assert pictures.read(str(other)).sha256 == read.sha256
    assert pictures.read(saved(tmp_path, halves((40, 22)))).sha256 != read.sha256


def test_a_picture_without_a_file_is_known_by_its_pixels() -> None:
    assert pictures.read(halves()).sha256 == pictures.read(halves()).sha256
    assert pictures.read(halves()).sha256 != pictures.read(halves((20, 40))).sha256
    assert pictures.read(pictures.read(halves())).size == (40, 20)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    read = pictures.read(saved(tmp_path, halves(), "a.jpg", exif=exif))
    assert read.size == (20, 40)
    assert read.image.getpixel((10, 3))[0] > 150  # type: ignore[index]
    assert "upright" in read.changes[0]


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear = halves().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))
    palette = Image.new("P", (4, 4), 0)
    others: list[tuple[Image.Image, dict[str, Any]]] = [(clear.convert("LA"), {}), (palette, {"transparency": 0})]
    for image, more in [(clear, {}), *others]:
        read = pictures.read(saved(tmp_path, image, **more))
        assert read.image.getpixel((1, 1)) == (255, 255, 255)
        assert read.changes == ("what is transparent in it is made white",)
    assert pictures.read(saved(tmp_path, halves().convert("RGBA"))).changes == ()


def test_sixteen_bits_are_made_eight_without_clipping(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16))
    read = pictures.read(saved(tmp_path, ramp))
    assert read.image.mode == "RGB"
    assert np.abs(np.asarray(read.image)[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    assert read.changes == ("its 16 bits are made 8",)


def test_of_a_film_the_first_frame_is_taken(tmp_path: Path) -> None:
    path = saved(tmp_path, halves(), "a.gif", save_all=True, append_images=[halves().rotate(180), halves()])
    read = pictures.read(path)
    assert read.image.getpixel((1, 1))[0] > 150  # type: ignore[index]
    assert read.changes == ("the first of its 3 frames is taken",)


def test_other_colours_are_made_rgb(tmp_path: Path) -> None:
    for mode, name in (("CMYK", "a.jpg"), ("L", "a.png"), ("1", "a.png"), ("P", "a.png")):
        assert pictures.read(saved(tmp_path, halves().convert(mode), name)).image.mode == "RGB"


def _png(width: int, height: int) -> bytes:
    """A PNG of one colour, whatever its size: what is in it is a few bytes long."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _whole(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, kind)
    return file.getvalue()


def _float() -> bytes:
    file = io.BytesIO()
    Image.new("F", (8, 8), 0.5).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (lambda: b"", "the file is empty"),
        (lambda: b"no picture at all" * 99, "is not a picture"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (lambda: _whole()[:20], "is a damaged picture"),
        (lambda: _whole()[:200], "is a damaged picture"),
        (lambda: _whole("JPEG")[:400], "is a damaged picture"),
        (lambda: _whole("GIF")[:900], "is a damaged picture"),
        (lambda: _png(0, 8), "x"),
        (lambda: _png(30_000, 30_000), "has too many pixels"),
        (lambda: _png(12_000, 12_000), "has 12000 × 12000 pixels"),
        (_float, "no screen shows"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: Callable[[], bytes], part: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content())
    with pytest.raises(FileError, match=part) as caught:
        pictures.read(path)
    assert caught.value.exit_code == 8


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "queue")
    for name, part in {
        ".": "is a directory",
        "missing": "No such file",
        "queue": "is not a file",
        "a\0": "null",
    }.items():
        with pytest.raises(FileError, match=part):
            pictures.read(f"{tmp_path}/{name}")
    with pytest.raises(UsageError, match="a bytes is no picture"):
        pictures.read(b"x")


# --- the size that it is drawn at


@pytest.mark.parametrize(
    ("asked", "size", "drawn"),
    [
        ({}, (128, 128), (128, 128)),
        ({}, (64, 96), (64, 96)),
        ({}, (70, 90), (64, 96)),
        ({}, (1280, 640), (176, 96)),  # no more than the model draws as a rule
        ({}, (3, 3), (16, 16)),
        ({"height": 64}, (200, 100), (128, 64)),
        ({"width": 64}, (200, 100), (64, 32)),
        ({"height": 128, "width": 64}, (200, 100), (64, 128)),
        ({"call": {"height": 64}}, (200, 100), (128, 64)),
    ],
)
def test_the_size_is_the_pictures_or_what_is_asked_for(
    asked: dict[str, Any], size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    call = {**asked.pop("call", {}), "image": halves(size)}
    plan = engine.resolve(hardware=machine(card()), call=call, **asked)
    assert (plan.request.width, plan.request.height) == drawn
    assert plan.request.call["image"] == {"width": drawn[0], "height": drawn[1]}
    assert plan.request.pipeline_class == "FluxImg2ImgPipeline"
    (note,) = (n.because for n in plan.notes if n.kind == "image")
    assert ("it is taken as it is" in note) == (size == drawn)
    assert note in plan.explain()


def test_a_picture_is_scaled_and_what_is_over_is_cut_off_on_both_sides() -> None:
    fitted = pictures.read(halves((400, 100))).fitted({"width": 64, "height": 64})
    assert fitted.size == (64, 64)
    assert [fitted.getpixel((x, 30)) for x in (2, 61)] == [RED, BLUE]
    whole = pictures.read(halves())
    assert whole.fitted({"width": 40, "height": 20}) is whole.image


def test_a_plan_keeps_the_size_of_a_picture_and_not_the_picture(tmp_path: Path) -> None:
    by_file = engine.resolve(hardware=machine(card()), call={"image": saved(tmp_path, halves()), "strength": 0.7})
    by_size = engine.resolve(hardware=machine(card()), call={"image": {"width": 40, "height": 20}, "strength": 0.7})
    without = engine.resolve(hardware=machine(card()))
    assert by_file.digest == by_size.digest != without.digest
    assert engine.Plan.from_json(by_file.to_json()) == by_file
    assert str(tmp_path) not in by_file.without_identity().to_json()
    lock = by_file.lock(tmp_path / "lock.yaml")
    assert lock.request.call["image"] == {"width": 32, "height": 16}
    assert engine.read_lock(tmp_path / "lock.yaml").plan(hardware=machine(card())).digest == by_file.digest


def test_a_model_that_edits_gets_the_picture_as_it_is() -> None:
    plan = engine.resolve(
        "black-forest-labs/FLUX.1-Kontext-dev", hardware=machine(card()), call={"image": halves((300, 200))}
    )
    assert plan.request.pipeline_class == "FluxKontextPipeline"
    assert plan.request.call["image"] == {"width": 300, "height": 200}
    assert (plan.request.width, plan.request.height) == (1024, 1024)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ({"image": {"width": 64}}, "more or less than a size"),
        ({"image": {"width": 64, "height": 0}}, "the image's height is 0"),
        ({"image": {"width": None, "height": 64}}, "the image has no size"),
        ({"image": 7}, "a int is no picture"),
        ({"image": {"width": 64, "height": 64}, "strength": 0}, "the strength is 0"),
        ({"image": {"width": 64, "height": 64}, "strength": 1.5}, "the strength is 1.5"),
        ({"image": {"width": 64, "height": 64}, "strength": "much"}, "the strength is 'much'"),
        ({"strength": 0.5}, "there is a strength, and no image"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        engine.resolve(hardware=machine(card()), call=call)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    asked: dict[str, Any] = {
        "hardware": machine(card()),
        "call": {"image": {"width": 512, "height": 512}, "strength": 0.1},
    }
    with pytest.raises(UsageError, match=r"leaves none of 9 steps[^$]*at least 0.112") as caught:
        engine.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5", steps=9, **asked)
    assert caught.value.exit_code == 2
    plan = engine.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5", steps=10, **asked)
    assert plan.request.pipeline_class == "StableDiffusionImg2ImgPipeline"


def test_a_model_that_draws_from_words_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="PixArtSigmaPipeline does not begin with a picture"):
        engine.resolve("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", hardware=machine(card()), call={"image": halves()})


def test_another_size_of_the_request_is_another_size_of_the_picture() -> None:
    made = engine.resolve(hardware=machine(card()), call={"image": halves((128, 128))})
    smaller = api.again(made, dataclasses.replace(made.request, height=64, width=96), made.hardware)
    assert smaller.request.call["image"] == {"width": 96, "height": 64}


# --- runs


def test_a_run_is_refused_without_its_picture_and_with_one_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, halves((64, 64)))
    plan = engine.resolve(device="cpu", call={"image": path})
    with pytest.raises(UsageError, match="begins with a picture, and there is none"):
        plan.run("a red circle")
    with pytest.raises(UsageError, match="the plan begins with none"):
        engine.resolve(device="cpu").run("a red circle", image=path)
    plan.lock(tmp_path / "lock.yaml")
    locked = ["--plan", str(tmp_path / "lock.yaml"), "--prompt", "a red circle"]
    assert cli.main(locked) == 2
    assert "--image FILE" in capsys.readouterr().err
    assert cli.main([*locked, "--image", str(tmp_path / "missing.png")]) == 8


def test_a_picture_is_redrawn_and_its_record_tells_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = saved(tmp_path, Image.new("RGB", (64, 64), RED))
    out = tmp_path / "out.png"
    words = "a white circle on a blue background"
    run = ["--auto", "--device", "cpu", "--num_inference_steps", "3", "--seed", "1", "--prompt", words]
    assert cli.main([*run, "--image", str(start), "--strength", "1", "--output", str(out)]) == 0
    said = media.read_record(out)
    assert said["image"] == pictures.read(start).sha256
    assert str(tmp_path) not in "".join(said.values())
    before, drawn = (np.asarray(pictures.read(p).image).reshape(-1, 3).astype(float) for p in (start, out))
    assert before[:, 2].mean() < 60 < 120 < drawn[:, 2].mean()
    capsys.readouterr()
    again = tmp_path / "again.png"
    assert cli.main(["--like", str(out), "--image", str(start), "--output", str(again)]) == 0
    err = capsys.readouterr().err
    assert "another picture" not in err and "note: the picture is 64 × 64" in err
    assert pictures.read(pictures.read(again).image).sha256 == pictures.read(pictures.read(out).image).sha256


class TakesNoSize:
    """Calls as that of StableDiffusionImg2ImgPipeline is: the size is the picture's."""

    def __call__(self, prompt: str, image: Any, strength: float = 0.8, generator: Any = None) -> None: ...


def test_a_pipeline_that_takes_no_size_goes_by_the_picture() -> None:
    picture = pictures.read(halves((300, 200)))
    asked = Request(model="x", height=128, width=192, call={"image": {"width": 192, "height": 128}, "strength": 0.5})
    (call,) = items.calls(prompts.of("a boat"), 1, 1, None, picture)
    given = calls.arguments(asked, TakesNoSize(), call)
    assert {k: v for k, v in given.items() if k not in ("image", "generator")} == {"prompt": "a boat", "strength": 0.5}
    assert given["image"].size == (192, 128)
    assert items.identity(asked, call.items[0]) != items.identity(asked, dataclasses.replace(call.items[0], image=None))


def test_encoding_in_stages_gives_the_same_redrawn_picture(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"device": "cpu", "steps": 1, "call": {"image": halves((64, 64)), "strength": 1.0}}
    at_once, staged = (
        next(
            engine.resolve(**asked, prompts_known=True, optimizers=steps).run("a boat", seed=1, image=halves((64, 64)))
        )
        for steps in (["resident"], ["staged_encoding", "resident"])
    )
    assert np.array_equal(np.asarray(at_once), np.asarray(staged))
