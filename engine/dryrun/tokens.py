"""A tokenizer that knows no words: it gives as many token ids as a pipeline asks for, which is all that counts."""

from __future__ import annotations

from typing import Any

import torch

_WORDS = 12


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

        rows = 1 if isinstance(text, str) else len(text)
        # Without padding a pipeline asks only how long the text is.
        length = (max_length or self.model_max_length) if padding == "max_length" else _WORDS + 1
        ids = torch.full((rows, length), 5, dtype=torch.long)
        mask = torch.zeros((rows, length), dtype=torch.long)
        last = min(_WORDS, length - 1)
        ids[:, last:] = self.eos_token_id
        mask[:, : last + 1] = 1
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def __len__(self) -> int:
        return 32_000

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [5] * (_WORDS + 1)

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return ["" for _ in rows]
