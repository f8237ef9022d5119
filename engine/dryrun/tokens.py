"""A tokenizer that knows no words: it gives as many token ids as a pipeline asks for, which is all that counts."""

from __future__ import annotations

import re
from typing import Any

import torch

_WORDS = 12
_TOKEN = re.compile(r"\w+|[^\w\s]")


class StubImageProcessor:
    """Stands in for an image processor: pictures of the size that CLIP takes."""

    def __call__(self, images: Any = None, **_: Any) -> Any:
        from transformers import BatchFeature

        count = len(images) if isinstance(images, list | tuple) else 1
        return BatchFeature({"pixel_values": torch.zeros(count, 3, 224, 224)})


class StubTokenizer:
    """Stands in for any tokenizer. Ids are padded to `max_length`; a prompt has a dozen words."""

    pad_token_id, bos_token_id, eos_token_id, unk_token_id = 0, 2, 1, 3
    pad_token, bos_token, eos_token, unk_token = "<pad>", "<s>", "</s>", "<unk>"
    padding_side = "right"

    def __init__(self, max_length: int) -> None:
        self.model_max_length = max_length
        self.added_tokens_encoder: dict[str, int] = {}
        self.unique_no_split_tokens: list[str] = []

    def __call__(self, text: str | list[str], max_length: int | None = None, padding: Any = None, **_: Any) -> Any:
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
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

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
        made = self(["x"] * rows, max_length=more.get("max_length"), padding=more.get("padding"))
        return made if more.get("return_dict", True) else made["input_ids"]

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return ["" for _ in rows]
