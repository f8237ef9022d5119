"""Processors that know no words and see no pictures: they give tensors of the right shapes, which is what counts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WORDS = 12
_TOKEN = re.compile(r"\w+|[^\w\s]")
_CLIP_SIDE = 224


class StubImageProcessor:
    """Stands in for an image processor: pictures of the size that CLIP takes."""

    def __call__(self, images: Any = None, **_: Any) -> Any:
        from transformers import BatchFeature

        count = len(images) if isinstance(images, list | tuple) else 1
        return BatchFeature({"pixel_values": torch.zeros(count, 3, _CLIP_SIDE, _CLIP_SIDE)})


class StubTokenizer:
    """Stands in for any tokenizer. Ids are padded to `max_length`; a prompt has a dozen words."""

    pad_token_id, bos_token_id, eos_token_id, unk_token_id = 0, 2, 1, 3
    pad_token, bos_token, eos_token, unk_token = "<pad>", "<s>", "</s>", "<unk>"
    padding_side = "right"

    def __init__(self, max_length: int) -> None:
        self.model_max_length = max_length
        self.added_tokens_encoder: dict[str, int] = {}
        self.unique_no_split_tokens: list[str] = []

    def __call__(self, text: str | list[str], max_length: int | None = None, padding: Any = None, **more: Any) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else text
        # A chat template is part of the text, and pipelines cut a known number of its tokens off again.
        words = max(_WORDS, *(len(_TOKEN.findall(t)) for t in texts)) if texts else _WORDS
        length = (max_length or self.model_max_length) if padding == "max_length" else words + 1
        ids = torch.full((len(texts), length), 5, dtype=torch.long)
        mask = torch.zeros((len(texts), length), dtype=torch.long)
        last = min(words, length - 1)
        ids[:, last:] = self.eos_token_id
        mask[:, : last + 1] = 1
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if more.get("return_tensors") is None:
            made = {k: v.tolist() for k, v in made.items()}
            made = {k: v[0] for k, v in made.items()} if isinstance(text, str) else made
        return BatchEncoding(made)

    def __len__(self) -> int:
        return 32_000

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [5] * (_WORDS + 1)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **more: Any) -> Any:
        """Return the text of a conversation, or its ids: as many rows as there are conversations."""
        rows = len(messages) if messages and isinstance(messages[0], list) else 1
        if not tokenize:
            return "x" if rows == 1 else ["x"] * rows
        asked = {k: more.get(k) for k in ("max_length", "padding")}
        made = self(["x"] * rows, return_tensors="pt", **asked)
        return made if more.get("return_dict", True) else made["input_ids"]

    def decode(self, ids: Any, **_: Any) -> str:
        return ""

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return ["" for _ in rows]


@dataclass(frozen=True, slots=True)
class Vision:
    """How a language model sees: patches of pixels, of which a square becomes one token among those of the text.

    The bounds on a picture's pixels are those of Qwen2-VL's image processor.
    """

    image_token_id: int
    start_token_id: int
    patch_size: int
    merge_size: int
    temporal_size: int
    channels: int = 3
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280 * 4 * 4

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Vision | None:
        """Return what a model's configuration says, None for a model that does not see like this."""
        seen = config.get("vision_config")
        sizes = ("patch_size", "spatial_merge_size", "temporal_patch_size")
        if not isinstance(seen, Mapping) or not all(isinstance(seen.get(s), int) and seen[s] > 0 for s in sizes):
            return None
        if not isinstance(config.get("image_token_id"), int):
            return None
        return cls(
            image_token_id=config["image_token_id"],
            start_token_id=config.get("vision_start_token_id", 5),
            patch_size=seen["patch_size"],
            merge_size=seen["spatial_merge_size"],
            temporal_size=seen["temporal_patch_size"],
            channels=seen.get("in_channels") or 3,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches a picture of this size (pixels) is high and wide, after it was resized to fit."""
        factor = self.patch_size * self.merge_size
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            by = math.sqrt(height * width / self.max_pixels)
            high, wide = (max(factor, math.floor(side / by / factor) * factor) for side in (height, width))
        elif high * wide < self.min_pixels:
            by = math.sqrt(self.min_pixels / (height * width))
            high, wide = (math.ceil(side * by / factor) * factor for side in (height, width))
        return high // self.patch_size, wide // self.patch_size


class StubVisionProcessor(StubTokenizer):
    """Stands in for a processor of text and pictures together: each picture of a row is patches, and their tokens."""

    def __init__(self, max_length: int, vision: Vision) -> None:
        super().__init__(max_length)
        self.vision = vision
        self.tokenizer = StubTokenizer(max_length)

    def __call__(
        self,
        text: str | list[str],
        max_length: int | None = None,
        padding: Any = None,
        images: Any = None,
        **more: Any,
    ) -> Any:
        made = super().__call__(text, max_length, padding, **more)
        if images is None:
            return made
        rows = 1 if isinstance(text, str) else len(text)
        pictures = list(images) if isinstance(images, list | tuple) else [images]
        pictures = pictures if len(pictures) % rows == 0 else pictures * rows
        grids = [self.vision.grid(*_size(p)) for p in pictures]
        counts = [high * wide // self.vision.merge_size**2 for high, wide in grids[: len(grids) // rows]]
        tokens: list[int] = []
        for count in counts:
            tokens += [self.vision.start_token_id, *[self.vision.image_token_id] * count]
        seen = torch.tensor([tokens] * rows)
        patch = self.vision.channels * self.vision.temporal_size * self.vision.patch_size**2
        # After a few words of the text, as a chat's picture is.
        ids, mask = made["input_ids"], made["attention_mask"]
        made["input_ids"] = torch.cat([ids[:, :5], seen, ids[:, 5:]], dim=1)
        made["attention_mask"] = torch.cat([torch.ones_like(seen), mask], dim=1)
        made["mm_token_type_ids"] = (made["input_ids"] == self.vision.image_token_id).int()
        made["pixel_values"] = torch.zeros(sum(high * wide for high, wide in grids), patch)
        made["image_grid_thw"] = torch.tensor([[1, high, wide] for high, wide in grids])
        return made


def _size(picture: Any) -> tuple[int, int]:
    """Return the height and width of a picture, whatever it is held in."""
    if isinstance(picture, Tensor):
        return picture.shape[-2], picture.shape[-1]
    if hasattr(picture, "shape"):
        return picture.shape[-3], picture.shape[-2]
    width, height = picture.size
    return height, width
