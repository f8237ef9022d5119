"""How much of a prompt a model reads. A tokenizer cuts off what is too long, and the libraries say so in a notice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_TOLD = 3
_ENDLESS = 1_000_000
"""Tokenizers without a limit of their own say a number that is larger than any text."""
_SHOWN = 40


def unread(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each of the first prompts that is cut off by every tokenizer of a pipeline.

    `call` are the further arguments of its call.
    """
    limits = [(t, n) for t, n in _limits(pipe, call) if n is not None]
    if not limits or len(limits) != len(_tokenizers(pipe)):
        return
    told = 0
    for prompt in dict.fromkeys(prompts):
        if len(prompt) <= min(n for _, n in limits):  # a token is a character at least, and two are its marks
            continue
        kept = [_kept(tokenizer, prompt, most) for tokenizer, most in limits]
        if any(k is None for k in kept):
            continue
        told += 1
        if told > _MOST_TOLD:
            yield "further prompts are longer than the model reads"
            return
        most = max(n for _, n in limits)
        longest = max((k for k in kept if k is not None), key=len)
        yield (
            f"the model reads {most} tokens of a prompt, and one is longer: it is cut off after"
            f" “…{longest[-_SHOWN:].strip()}”"
        )


def _tokenizers(pipe: Any) -> dict[str, Any]:
    return {n: c for n, c in pipe.components.items() if n.startswith("tokenizer") and callable(c)}


def _limits(pipe: Any, call: Mapping[str, Any]) -> Iterator[tuple[Any, int | None]]:
    """Yield the tokenizers, each with how many tokens its encoder is given; None where that is not known."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    asked = call.get("max_sequence_length", None if parameter is None else parameter.default)
    asked = asked if isinstance(asked, int) else None
    for tokenizer in _tokenizers(pipe).values():
        own = int(getattr(tokenizer, "model_max_length", _ENDLESS))
        is_clip = type(tokenizer).__name__.startswith("CLIP")
        known = [n for n in (own if own < _ENDLESS else None, None if is_clip else asked) if n is not None]
        yield tokenizer, min(known) if known else None


def _kept(tokenizer: Any, prompt: str, most: int) -> str | None:
    """Return what a tokenizer leaves of a prompt; None where that is all of it."""
    if len(tokenizer(prompt, truncation=False, verbose=False).input_ids) <= most:
        return None
    ids = tokenizer(prompt, truncation=True, max_length=most).input_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))
