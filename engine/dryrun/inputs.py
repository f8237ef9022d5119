"""What a pipeline is called with: its arguments, from what was asked for and from its call's own signature.

It gives what `engine.run.generate` gives, and beyond that what nobody types on a command line: pictures of the asked
size where the class works on pictures, and tensors of the right shape where it works on what another pipeline made.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from engine.errors import UsageError
from engine.facts.model import Model

_PROMPT = "x"
_SQUARE = 1024
"""Pixels a side of a picture where no size was asked for."""

_FRAMES = ("num_frames", "frames", "video_length")
_COPIES = "num_images_per_prompt"
# Classes that start from pictures, though their signatures say that these may be left out.
_WORKS_ON_PICTURES = re.compile(
    r"Img2Img|Image2Image|ImageToImage|Inpaint|Fill|Edit|Kontext|ImageToVideo|Image2Video|I2V|VideoToVideo|Video2Video"
    r"|Control|Redux|Upscale|Depth|Pix2Pix"
)
_PICTURES = ("image", "control_image", "control_guidance_image", "ref_image")
_MASKS = ("mask_image", "mask", "control_mask")
_VIDEOS = ("video", "control_video")
_LATENT_PIXELS = 42.67
"""Pixels along one side of a latent of Stable Cascade's prior (its pipeline's `resolution_multiple`)."""


def call(
    model: Model,
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the arguments of one call of a pipeline that is on meta.

    Sizes are in pixels; `extra` are arguments of the pipeline's own. None is left to the pipeline. A size, a length or
    a guidance that is only the model's usual one is left out where the pipeline does not take it.

    Raises: UsageError, for an argument that the pipeline does not take, or one it needs that nobody can give.
    """
    taken = inspect.signature(pipe.__call__).parameters
    usual = model.defaults
    given: dict[str, Any] = {}
    size_is_used = bool(set(taken) & {"height", "image_embeddings", *_pictures_of(pipe, taken)})
    for name, value, default, is_used in (
        ("height", height, usual.height, size_is_used),
        ("width", width, usual.width, size_is_used),
        (_named(taken, _FRAMES) or _FRAMES[0], frames, usual.frames, False),
        ("num_inference_steps", steps, usual.steps, False),
        ("guidance_scale", guidance, usual.guidance, False),
    ):
        if value is None:
            continue
        if name in taken:
            given[name] = value
        elif not is_used and value != default:
            raise _not_taken(pipe, name, taken)
    for name in extra:
        if name not in taken or taken[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise _not_taken(pipe, name, taken)
    # As the run does for pictures: one prompt, and as many of it as the batch has. For videos a list of prompts: some
    # pipelines overwrite `num_videos_per_prompt` by 1 (CogVideoX, AnimateDiff), HunyuanVideo 1.5 fails at 2.
    if "prompt" in taken and not {"prompt", "prompt_embeds"} & set(extra):
        given["prompt"] = _PROMPT if _COPIES in taken or batch == 1 else [_PROMPT] * batch
    if batch > 1 and _COPIES in taken:
        given[_COPIES] = batch
    elif batch > 1 and "prompt" not in given:
        raise _not_taken(pipe, _COPIES, taken)
    high, wide = height or usual.height or _SQUARE, width or usual.width or _SQUARE
    given |= _pictures(_pictures_of(pipe, taken), high, wide, frames or usual.frames or 1)
    given |= _results_of_others(pipe, taken, high, wide)
    given |= {k: _picture_of(v) if k in _PICTURES else v for k, v in extra.items()}
    if (output := _output_type(taken, given.get("output_type"))) is not None:
        given["output_type"] = output
    missing = [n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [n for n in missing if n not in given]
    if missing:
        raise UsageError(
            f"{type(pipe).__name__} needs {', '.join(missing)}",
            "its call has no default for it, and it does not follow from the model",
            f"give it with the call: {missing[0]}=…",
        )
    return given


def _named(taken: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((n for n in names if n in taken), None)


def _not_taken(pipe: Any, name: str, taken: Mapping[str, inspect.Parameter]) -> UsageError:
    names = [n for n, p in taken.items() if p.kind is not p.VAR_KEYWORD]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return UsageError(
        f"{type(pipe).__name__} does not take {name}",
        "its call has no such argument",
        f"did you mean {near[0]}?" if near else "leave it out",
    )


def _output_type(taken: Mapping[str, inspect.Parameter], asked: Any) -> Any:
    """Return what leaves the device: pictures do so alike as arrays and as pictures, and the latter are hollow here."""
    if "output_type" not in taken:
        return None
    wanted = taken["output_type"].default if asked is None else asked
    return "pil" if wanted in ("np", "pil") else wanted


def _pictures_of(pipe: Any, taken: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the arguments that are pictures, masks or videos, where the pipeline does not work without."""
    names = [n for n in (*_PICTURES, *_MASKS, *_VIDEOS) if n in taken]
    works_on = _WORKS_ON_PICTURES.search(type(pipe).__name__) is not None
    return [n for n in names if works_on or taken[n].default is inspect.Parameter.empty]


def _pictures(names: list[str], height: int, width: int, frames: int) -> dict[str, Any]:
    from PIL import Image

    made: dict[str, Any] = {}
    for name in names:
        picture = Image.new("L" if name in _MASKS else "RGB", (width, height))
        made[name] = [picture] * frames if name in _VIDEOS else picture
    return made


def _picture_of(given: Any) -> Any:
    """Return a picture where only the size of one is known: what is in it takes no memory."""
    from PIL import Image

    return Image.new("RGB", (given["width"], given["height"])) if isinstance(given, Mapping) else given


def _results_of_others(pipe: Any, taken: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return what another pipeline hands over, for one prompt, in the shape that its configuration gives it."""
    made: dict[str, Any] = {}
    for name in ("image_embeds", "negative_image_embeds"):
        if name in taken and taken[name].default is inspect.Parameter.empty:
            made[name] = _noise(pipe.unet, 1, pipe.unet.config.encoder_hid_dim)
    if "image_embeddings" in taken:
        side = (math.ceil(height / _LATENT_PIXELS), math.ceil(width / _LATENT_PIXELS))
        made["image_embeddings"] = _noise(pipe.decoder, 1, pipe.decoder.config.effnet_in_channels, *side)
    return made


def _noise(user: Any, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=user.dtype, device="meta")
