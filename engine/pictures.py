"""The picture that a run begins with: opened once, held against what may come, and made the size that is drawn.

What comes out is upright, of three colours of 8 bits. PIL is imported where a picture is opened, and not before.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.errors import FileError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

# Others that PIL opens run programs (EPS), or are no pictures that anybody draws from.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**27
"""More than any camera gives, and 400 MB of memory."""
SIZE = ("width", "height")

_USUAL_MULTIPLE = 32
"""What sizes are rounded to where the model does not tell: every pipeline of diffusers 0.42 takes multiples of it."""
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to begin with. `sha256` is of its file's content, or of its pixels where it came without a file."""

    image: Image
    sha256: str
    name: str
    changes: tuple[str, ...] = ()
    """What of the file is not in it, in words."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    def fitted(self, size: Mapping[str, int]) -> Image:
        """Return it at this `width` and `height`: scaled until it covers them, what is over cut off on both sides."""
        wanted = size["width"], size["height"]
        if self.size == wanted:
            return self.image
        from PIL import Image, ImageOps

        return ImageOps.fit(self.image, wanted, Image.Resampling.LANCZOS)


def read(source: Any) -> Picture:
    """Return the picture of a file, or of a PIL image.

    Raises: FileError, for a file that cannot be read or holds no picture that can be drawn from; UsageError, for what
        is neither a path nor an image.
    """
    if isinstance(source, Picture):
        return source
    if hasattr(source, "getbands") and hasattr(source, "tobytes"):
        told = f"the {type(source).__name__}"
        image, changes = _plain(told, source)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        return Picture(image, digest, told, changes)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"a {type(source).__name__} is no picture", do="give the path of a file, or an image of PIL")
    path = Path(source)
    try:
        if path.is_dir():
            raise FileError(f"{path} is a directory", do="name a picture in it")
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a file", "a queue or a device has no end", "name a picture")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            image, changes = _opened(str(path), file)
    except ValueError as error:  # a NUL in the name
        raise FileError(f"{str(path)!r} cannot be read", str(error)) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read", str(error.strerror or error), "check the path") from None
    return Picture(image, digest, str(path), changes)


def _opened(name: str, file: IO[bytes]) -> tuple[Image, tuple[str, ...]]:
    from PIL import Image, UnidentifiedImageError

    # PIL's own limit would be a warning, and an error at twice as much.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                return _plain(name, image)
        except UnidentifiedImageError:
            empty = file.seek(0, os.SEEK_END) == 0
            why = "the file is empty" if empty else f"it is none of {', '.join(FORMATS)}, or damaged from its beginning"
            raise FileError(f"{name} is not a picture", why, "give another file") from None
        except Image.DecompressionBombError:
            raise _too_large(name, None) from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, ArithmeticError, TypeError, KeyError) as error:
            # What PIL raises on a damaged file is not one class.
            raise FileError(
                f"{name} is a damaged picture", " ".join(str(error).split())[:200], "copy it again, or give another one"
            ) from None


def _plain(name: str, image: Image) -> tuple[Image, tuple[str, ...]]:
    """Return the first frame of a picture, upright, in RGB, and what was done to it. Raises: FileError."""
    from PIL import ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.size)
    if 0 in image.size:
        raise FileError(
            f"{name} is {image.width} × {image.height} pixels", "there is nothing in it", "give another one"
        )
    changes = [f"the first of its {n} frames is taken"] if (n := getattr(image, "n_frames", 1)) > 1 else []
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        changes.append("it is turned upright, as its EXIF data says")
    upright = ImageOps.exif_transpose(image)
    made, *more = _coloured(name, upright)
    return made, (*changes, *more)


def _coloured(name: str, image: Image) -> Iterator[Any]:
    """Yield a picture in RGB, and then what was done to it in words."""
    from PIL import Image as pil

    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
            raise FileError(
                f"{name} has numbers for colours that no screen shows", f"its mode is {image.mode}", "save it as 8 bit"
            )
        yield pil.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
        yield "its 16 bits are made 8"
        return
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        if clear.getchannel("A").getextrema() != (255, 255):
            yield pil.alpha_composite(pil.new("RGBA", clear.size, "white"), clear).convert("RGB")
            yield "what is transparent in it is made white"
            return
    yield image if image.mode == "RGB" and type(image) is pil.Image else image.convert("RGB")


def _too_large(name: str, size: tuple[int, int] | None) -> FileError:
    told = "too many pixels" if size is None else f"{size[0]} × {size[1]} pixels"
    return FileError(f"{name} has {told}", f"at most {MAX_PIXELS:,} are opened", "make it smaller")


def size_to_draw(
    size: tuple[int, int], height: int | None, width: int | None, multiple: int | None, most_pixels: int | None
) -> tuple[int, int]:
    """Return the height and width at which a picture of this `size` (width, height) is drawn anew.

    What is asked for stands, and the other side keeps the picture's shape. Else both are the picture's, smaller where
    it has more than `most_pixels` (what the model draws as a rule), and rounded to a `multiple`.
    """
    step = multiple or _USUAL_MULTIPLE
    wide, high = size
    if height is None and width is None:
        scale = 1.0 if most_pixels is None else min(1.0, math.sqrt(most_pixels / (wide * high)))
    else:
        scale = height / high if height is not None else (width or 0) / wide
    return height or _rounded(high * scale, step), width or _rounded(wide * scale, step)


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def told(picture: Picture, size: Mapping[str, int]) -> str:
    """Return in one line what is done to a picture that is drawn at this `width` and `height`.

    It names no file: plans travel within what is made by them.
    """
    (wide, high), (to_wide, to_high) = picture.size, (size["width"], size["height"])
    done = list(picture.changes)
    if (wide, high) != (to_wide, to_high):
        scale = max(to_wide / wide, to_high / high)
        over = max(wide * scale - to_wide, high * scale - to_high)
        done.append(f"it is scaled to {to_wide} × {to_high}" + (", and its sides are cut off" if over >= 1 else ""))
    return f"the picture is {wide} × {high}: {'; '.join(done) or 'it is taken as it is'}"
