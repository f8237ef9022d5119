"""Pictures on disk: where they will go is checked before the run, and each is there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import FileError
from engine.plan import Plan
from engine.units import MIB, format_size

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path("outputs")
SUFFIX = ".png"


def paths(output: Path | None, count: int, seed: int) -> list[Path]:
    """Return `count` paths: the one asked for (numbered when there are several), or new names in `outputs/`."""
    base = _unused(FOLDER / f"{seed}{SUFFIX}", count) if output is None else output
    return [base] if count == 1 else [base.with_stem(f"{base.stem}-{k}") for k in range(1, count + 1)]


def _unused(base: Path, count: int) -> Path:
    """Return `base`, or the first of its numbered neighbours whose files do not exist: nothing is written over."""
    tried, n = base, 1
    while any(tried.parent.glob(f"{tried.stem}-*{SUFFIX}" if count > 1 else tried.name)):
        tried, n = base.with_stem(f"{base.stem}_{n}"), n + 1
    return tried


def check(wanted: list[Path], pixels: int | None) -> None:
    """Return when every path can be written. Raises: FileError, saying which cannot and why.

    Called before anything is loaded: a run of minutes must not end at a folder that does not exist.
    """
    for path in wanted:
        if path.suffix.lower() != SUFFIX:
            raise FileError(
                f"{path}: pictures are written as PNG",
                f"the name ends in {path.suffix or 'nothing'}",
                f"call it {path.stem}.png",
            )
        if path.is_dir():
            raise FileError(f"{path} is a directory", do=f"give a file, such as {path / 'picture.png'}")
    folder = wanted[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
        for path in wanted:
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(None, "the file is there and may not be written")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise FileError(
            f"{wanted[0]} cannot be written", str(error.strerror or error), "give another place with --output"
        ) from None
    # A PNG of noise is about as large as its pixels.
    need = len(wanted) * 3 * (pixels or 0) + MIB
    if free < need:
        raise FileError(
            f"the disk of {folder} is full",
            f"{format_size(free)} are free, and the pictures may take {format_size(need)}",
            "free some space, or give another place with --output",
        )


def save(image: Image, path: Path, plan: Plan) -> Path:
    """Write a picture with what it was made with, whole or not at all; return where it is.

    When the place turns out not to take it (a disk that filled up meanwhile), the picture is kept in the temporary
    folder and a FileError says where: a picture that took minutes is not lost.
    """
    try:
        _write(image, path, plan)
    except OSError as error:
        why = str(error.strerror or error)
        spare = Path(tempfile.gettempdir()) / f"dg-run-{secrets.token_hex(4)}{SUFFIX}"
        try:
            _write(image, spare, plan)
        except OSError:
            raise FileError(
                f"{path} cannot be written", why, "free some space and run again with the same seed"
            ) from None
        raise FileError(f"{path} cannot be written", why, f"the picture was kept: {spare}") from None
    return path


def _write(image: Image, path: Path, plan: Plan) -> None:
    from PIL.PngImagePlugin import PngInfo

    record = PngInfo()
    for key in ("prompt", "seed", "model", "plan_digest"):
        record.add_itxt(key, str(image.info[key]))
    record.add_itxt("dg-run", json.dumps(json.loads(plan.without_identity().to_json()), ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            image.save(file, format="PNG", pnginfo=record)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
