"""What a pipeline gave, as values, and files of it: a picture is a PNG, a video an mp4, both with their record in them.

A file is there whole or not at all: it is written beside its place, brought to the disk, and renamed. The same output
with the same record is the same file, byte for byte.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.errors import FileError, IncompatibleError
from engine.facts import video
from engine.units import MIB, format_size

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIX = ".png"
VIDEO_SUFFIX = ".mp4"
PLAN_KEY = "dg-run"
"""The key of a record that holds the plan; a file without it was not made here."""

_RECORD_LIMIT_BYTES = 16 * MIB
_AGAIN = "copy it again, or make it anew"
_PNG = b"\x89PNG\r\n\x1a\n"

# The rate factor is that of x264 at which a loss is hardly seen. The number of threads is fixed, since the stream
# depends on it, and the encoder's version is left out of the file.
_ENCODER = {"crf": "17", "preset": "medium", "threads": "4"}
_MUXER = {"movflags": "use_metadata_tags", "fflags": "+bitexact"}
_OF_FFMPEG = ("major_brand", "minor_version", "compatible_brands", "encoder")


@dataclass(frozen=True, slots=True)
class Video:
    """Frames to be shown one after another. `info` says what it was made with, as that of a picture does."""

    frames: Sequence[Image]
    fps: float
    left_out: tuple[str, ...] = ()
    """What the pipeline gave with it and is not written, such as "audio"."""
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size

    def __len__(self) -> int:
        return len(self.frames)


def frame_rate(pipe: Any, call: Mapping[str, Any]) -> float:
    """Return the frames a second of the videos that a call of this pipeline gives.

    What the call says counts (`frame_rate` of LTX, `fps` of Cosmos), then the call's own default, then the family.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    for name in ("frame_rate", "fps"):
        asked = call.get(name, takes[name].default if name in takes else None)
        if isinstance(asked, int | float) and math.isfinite(asked) and asked > 0:
            return asked
    name, config = type(pipe).__name__, getattr(pipe, "config", {})
    if name.startswith("Wan") and config.get("expand_timesteps"):
        return 24  # Wan 2.2 TI2V-5B, by its model card; diffusers 0.42 tells it by this, pipeline_wan.py
    if name.startswith("CogVideoX") and getattr(pipe.transformer.config, "patch_size_t", None):
        return 16  # CogVideoX 1.5, by its model card; only its transformer packs frames in time
    return video.frame_rate(name)


def outputs(result: Any, pipe: Any, fps: float | None = None) -> list[Image | Video]:
    """Return what a call gave, one picture or video for each that was asked for, in order.

    `result` is what pipelines of diffusers 0.42 return: `images` (or `image`) or `frames`, as PIL images, as arrays of
    numpy from 0 to 1 with the channels last, or as tensors with the channels first. `fps` is `frame_rate` of the call.

    Raises: IncompatibleError, for a pipeline that gives neither pictures nor videos.
    """
    frames = getattr(result, "frames", None)
    if frames is not None:
        rate = frame_rate(pipe, {}) if fps is None else fps
        left_out = () if getattr(result, "audio", None) is None else ("audio",)
        clips = [_pictures(clip, pipe) for clip in _each(frames)]
        if clips and all(clips):
            return [Video(clip, rate, left_out) for clip in clips]
        raise _foreign(pipe)
    images = getattr(result, "images", None)
    if images is None:
        images = getattr(result, "image", None)  # Kandinsky 5
    return list(_pictures(images, pipe))


def _each(several: Any) -> Iterator[Any]:
    """Yield the items of a list, or of the first axis of an array."""
    if isinstance(several, list | tuple) or (hasattr(several, "shape") and len(several.shape) == 5):
        yield from several


def _pictures(images: Any, pipe: Any) -> list[Image]:
    """Return the pictures of a list or of an array. Raises: IncompatibleError."""
    if isinstance(images, list | tuple) or (hasattr(images, "shape") and len(images.shape) == 4):
        return [_picture(image, pipe) for image in images]
    raise _foreign(pipe)


def _picture(image: Any, pipe: Any) -> Image:
    import numpy as np
    from PIL import Image as pil

    if isinstance(image, pil.Image):
        return image
    if hasattr(image, "detach"):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else None
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise _foreign(pipe)
    if image.dtype != np.uint8:
        # As diffusers 0.42 does it (image_processor.py, numpy_to_pil); what is not a number is black there, too.
        image = (np.nan_to_num(image.astype(np.float32), nan=0).clip(0, 1) * 255).round().astype(np.uint8)
    return pil.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _foreign(pipe: Any) -> IncompatibleError:
    return IncompatibleError(
        f"{type(pipe).__name__} gives neither pictures nor videos",
        "dg-run writes pictures and videos only",
        "use a model that draws, and leave `output_type` out of the call",
    )


def suffix(output: Image | Video) -> str:
    """Return how the name of an output's file ends."""
    return VIDEO_SUFFIX if isinstance(output, Video) else PICTURE_SUFFIX


def write(output: Image | Video, path: Path, record: Mapping[str, str]) -> None:
    """Write a picture as PNG or a video as mp4, with its record in it, whole or not at all. Raises: OSError.

    A picture carries its record as iTXt chunks. A video is H.264 in yuv420p, and carries it as metadata of the file;
    this form of H.264 has even sides only, so that the last row and column of a video of odd size are there twice.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(output, Video):
                _write_video(output, file, record)
            else:
                _write_picture(output, file, record)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_picture(image: Image, file: IO[bytes], record: Mapping[str, str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, text in record.items():
        chunks.add_itxt(key, text)
    image.save(file, format="PNG", pnginfo=chunks)


def _write_video(output: Video, file: IO[bytes], record: Mapping[str, str]) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    width, height = (side + side % 2 for side in output.size)
    with _as_oserror(), av.open(file, "w", format="mp4", options=_MUXER) as container:
        container.metadata.update(record)
        stream = container.add_stream("libx264", rate=Fraction(output.fps).limit_denominator(1001), options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.bit_rate = 0
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = 1  # of BT.709, as the colours are computed below
        for picture in output.frames:
            frame = av.VideoFrame.from_image(_even(picture, width, height))
            stream_frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(stream_frame))
        container.mux(stream.encode(None))


def _even(picture: Image, width: int, height: int) -> Image:
    """Return a frame of this size, at most a pixel larger than it was: its last row and column are there twice."""
    picture = picture.convert("RGB")
    if picture.size == (width, height):
        return picture
    import numpy as np
    from PIL import Image as pil

    pixels = np.asarray(picture)
    more = ((0, height - picture.height), (0, width - picture.width), (0, 0))
    return pil.fromarray(np.pad(pixels, more, mode="edge"))


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    import av.error

    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"the video could not be encoded: {error.strerror}") from error


def read_record(path: Path) -> dict[str, str]:
    """Return what a picture or a video says of how it was made: the record that it was written with.

    Nothing of the picture itself is decoded. Raises: FileError, for a file that cannot be read, is neither PNG nor mp4,
    is cut off or damaged, or was not made here.
    """
    try:
        if path.is_dir():
            raise FileError(f"{path} is a directory", "one file is shown at a time", "name a picture or a video in it")
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a file", "a queue or a device has no end", "name a picture or a video")
        with path.open("rb") as file:
            record = _record_of(path, file)
    except OSError as error:
        raise FileError(f"{path} cannot be read", str(error.strerror or error), "check the path") from None
    if PLAN_KEY not in record:
        raise FileError(
            f"{path} does not say how it was made",
            "dg-run did not write it, or another program has written it since without its record",
            "name the file as dg-run wrote it",
        )
    return record


def _record_of(path: Path, file: IO[bytes]) -> dict[str, str]:
    head = file.read(12)
    file.seek(0)
    if head.startswith(_PNG):
        return _record_of_png(path, file)
    if head[4:8] == b"ftyp":
        return _record_of_mp4(path, file)
    raise FileError(
        f"{path} is neither a PNG nor an mp4",
        "its first bytes are those of something else" if head else "the file is empty",
        "name a picture or a video that dg-run made",
    )


def _record_of_png(path: Path, file: IO[bytes]) -> dict[str, str]:
    """Return the texts of a PNG, by its chunks: length, name, content, checksum. Raises: FileError, OSError."""
    record: dict[str, str] = {}
    file.seek(len(_PNG))
    left = _RECORD_LIMIT_BYTES
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise _cut_off(path)
        length, name = int.from_bytes(head[:4]), head[4:]
        if name not in (b"iTXt", b"tEXt"):
            file.seek(length, os.SEEK_CUR)
            if len(file.read(4)) < 4:
                raise _cut_off(path)
            if name == b"IEND":
                return record
            continue
        if length > left:
            raise _too_long(path)
        content, checksum = file.read(length), file.read(4)
        if len(content) < length or len(checksum) < 4:
            raise _cut_off(path)
        if zlib.crc32(name + content) != int.from_bytes(checksum):
            raise FileError(f"{path} is damaged", "a part of its record has another checksum than was written", _AGAIN)
        key, text = _international(path, content, left) if name == b"iTXt" else _latin(content)
        left -= length + len(text)
        record[key] = text


def _latin(content: bytes) -> tuple[str, str]:
    key, _, text = content.partition(b"\0")
    return key.decode("latin-1"), text.decode("latin-1")


def _international(path: Path, content: bytes, limit: int) -> tuple[str, str]:
    """Return key and text of an iTXt chunk, in which other programs may have packed the text."""
    try:
        key, rest = content.split(b"\0", 1)
        _, _, text = rest[2:].split(b"\0", 2)  # whether and how it is packed; its language; the key in that language
        if rest[0]:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(text, limit)
            if unpacker.unconsumed_tail:
                raise _too_long(path)
        return key.decode("latin-1"), text.decode("utf-8")
    except (zlib.error, ValueError) as error:
        raise FileError(f"{path} is damaged", f"a part of its record cannot be read: {error}", _AGAIN) from None


def _record_of_mp4(path: Path, file: IO[bytes]) -> dict[str, str]:
    import av
    import av.error

    try:
        with av.open(file, format="mp4") as container:
            record = {k: v for k, v in container.metadata.items() if k not in _OF_FFMPEG}
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path} is cut off or damaged", f"it cannot be read as an mp4: {why}", _AGAIN) from None
    if sum(map(len, record.values())) > _RECORD_LIMIT_BYTES:
        raise _too_long(path)
    return record


def _cut_off(path: Path) -> FileError:
    return FileError(f"{path} is cut off", "it ends before a PNG does", _AGAIN)


def _too_long(path: Path) -> FileError:
    return FileError(
        f"{path} has a record of more than {format_size(_RECORD_LIMIT_BYTES)}",
        "dg-run writes none so long",
        "name a picture or a video that dg-run made",
    )
