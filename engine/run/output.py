"""Outputs on disk: where they will go is checked before the run, and each is there whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import FileError
from engine.facts import video
from engine.plan import Plan
from engine.run import items, media
from engine.run.items import Item
from engine.units import MIB, format_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.run.media import Video

_BYTES_A_PIXEL = {media.PICTURE_SUFFIX: 3.0, media.VIDEO_SUFFIX: 0.5}
"""What an output takes at most: a PNG of noise is about as large as its pixels, a video of noise a sixth of them."""


def suffix(plan: Plan) -> str:
    """Return the ending of what a plan makes: it is known before the run whether that is a picture or a video."""
    return media.VIDEO_SUFFIX if _is_of_videos(plan) else media.PICTURE_SUFFIX


def _is_of_videos(plan: Plan) -> bool:
    return plan.request.frames is not None or video.gives_videos(plan.request.pipeline_class or "")


def record(plan: Plan, item: Item) -> dict[str, str]:
    """Return what goes into an output's metadata: what it was made with, by which `--like` makes it again."""
    # What was rejected, and what would allow more, says nothing of the output, and is long.
    kept = dataclasses.replace(plan.without_identity(), rejected=(), advice=None)
    said = {
        "prompt": item.prompt,
        "negative_prompt": item.negative_prompt,
        "seed": item.seed,
        "image": item.image,
        "model": plan.request.model,
        "plan_digest": plan.digest,
        "item": items.identity(plan.request, item),
        "dg-run": json.dumps(json.loads(kept.to_json()), ensure_ascii=False),
    }
    return {k: str(v) for k, v in said.items() if v is not None}


def check(wanted: Sequence[Path], plan: Plan) -> None:
    """Return when every path can be written. Raises: FileError, saying which cannot and why.

    Called before anything is loaded: a run of minutes must not end at a folder that does not exist.
    """
    ending, what = suffix(plan), "videos" if _is_of_videos(plan) else "pictures"
    for path in wanted:
        if path.suffix.lower() != ending:
            raise FileError(
                f"{path}: {what} are written as {ending[1:].upper()}",
                f"the name ends in {path.suffix or 'nothing'}",
                f"call it {path.stem}{ending}" + ("" if path.suffix else f"; a folder ends in a slash: {path}/"),
            )
        if path.is_dir():
            raise FileError(f"{path} is a directory", do=f"give a file, such as {path / f'picture{ending}'}")
    folder = wanted[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
        for path in wanted:
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(None, "the file is there and may not be written")
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = str(getattr(error, "strerror", None) or error)
        raise FileError(f"{wanted[0]} cannot be written", why, "give another place with --output") from None
    pixels = (plan.request.pixels or 0) * (plan.request.frames or 1)
    need = int(len(wanted) * _BYTES_A_PIXEL[ending] * pixels) + MIB
    if free < need:
        raise FileError(
            f"the disk of {folder} is full",
            f"{format_size(free)} are free, and the {what} may take {format_size(need)}",
            "free some space, or give another place with --output",
        )


def save(output: Image | Video, path: Path, said: Mapping[str, str], *, is_new: bool = False) -> Path:
    """Write an output with what it was made with, whole or not at all; return where it is.

    With `is_new` nothing is written over: where the name was taken meanwhile, it is the next one that is free.

    When the place turns out not to take it (a disk that filled up meanwhile), the output is kept in the temporary
    folder and a FileError says where: a picture that took minutes is not lost.
    """
    try:
        return _write(output, path, said, is_new=is_new)
    except OSError as error:
        why = str(error.strerror or error)
        spare = Path(tempfile.gettempdir()) / f"dg-run-{secrets.token_hex(4)}{path.suffix}"
        try:
            _write(output, spare, said, is_new=True)
        except OSError:
            raise FileError(
                f"{path} cannot be written", why, "free some space and run again with the same seed"
            ) from None
        raise FileError(f"{path} cannot be written", why, f"it was kept: {spare}") from None


def _write(output: Image | Video, path: Path, said: Mapping[str, str], *, is_new: bool) -> Path:
    if not is_new:
        media.write(output, path, said)
        return path
    # A hard link fails where the name is taken, and a rename does not.
    part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        media.write(output, part, said)
        for number in range(1, 10_000):
            try:
                os.link(part, path)
            except FileExistsError:
                path = path.with_stem(f"{path.stem.rpartition('_')[0] or path.stem}_{number}")
                continue
            except (OSError, NotImplementedError):  # a file system without links
                if path.exists():
                    path = path.with_stem(f"{path.stem}_{secrets.token_hex(4)}")
                part.replace(path)
            return path
        raise FileExistsError(None, "ten thousand of its neighbours are there")
    finally:
        part.unlink(missing_ok=True)
