"""A run in two stages: text encoders alone encode the prompts, and the rest of the pipeline is given what they made.

No library does this by a switch. Every pipeline of diffusers that takes a prompt has `encode_prompt`, and its call asks
it once it has checked its arguments. With the text encoders alone the call is left there; without them the answer
is handed in. What is encoded is kept on the host, so that a hundred prompts take no room on the card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import IncompatibleError


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode_prompt` gave for one call, its tensors on the host."""

    answer: Any


class _Left(BaseException):
    """Ends a call where its prompts are encoded. Nothing between may take it for an error of its own."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


def encode(pipe: Any, call: Mapping[str, Any], device: str) -> Encoded:
    """Return what a call's prompts are encoded to; nothing after that happens.

    The text encoders of `pipe` are on `device`; its other components may lack their weights (be on meta), not their
    configurations.

    Raises: IncompatibleError, for a pipeline that does not encode apart; what the pipeline raises.
    """
    import torch

    real = _encoder(pipe)

    def leave(*args: Any, **given: Any) -> Any:
        raise _Left(real(*args, **given))

    try:
        with _answering(pipe, leave), _computing_on(pipe, torch.device(device)), torch.no_grad():
            pipe(**call)
    except _Left as left:
        return Encoded(_moved(left.answer, torch.device("cpu")))
    raise IncompatibleError(f"{type(pipe).__name__} does not encode its prompts apart", do="leave staged_encoding out")


@contextlib.contextmanager
def given(pipe: Any, encoded: Encoded, device: str) -> Iterator[None]:
    """Let a call of `pipe`, which has no text encoders, have what was encoded, on `device`."""
    import torch

    with _answering(pipe, lambda *args, **given: _moved(encoded.answer, torch.device(device))):
        yield


def _encoder(pipe: Any) -> Any:
    found = getattr(pipe, "encode_prompt", None)
    if not callable(found):
        raise IncompatibleError(
            f"{type(pipe).__name__} does not encode its prompts apart",
            "it has no `encode_prompt`",
            "leave staged_encoding out",
        )
    return found


@contextlib.contextmanager
def _answering(pipe: Any, answer: Any) -> Iterator[None]:
    """Let `encode_prompt` of this pipeline, and of no other, be answered so."""
    vars(pipe)["encode_prompt"] = answer
    try:
        yield
    finally:
        del vars(pipe)["encode_prompt"]


@contextlib.contextmanager
def _computing_on(pipe: Any, device: Any) -> Iterator[None]:
    """Let a pipeline compute on `device`: it would go by its first component, which may have no weights."""
    plain = type(pipe)
    pipe.__class__ = type(plain.__name__, (plain,), {"_execution_device": property(lambda self: device)})
    try:
        yield
    finally:
        pipe.__class__ = plain


def _moved(item: Any, device: Any) -> Any:
    """Return an answer with its tensors on another device; whatever else is in it stays as it is."""
    import torch

    if isinstance(item, torch.Tensor):
        return item.to(device)
    if isinstance(item, tuple | list):
        return type(item)(_moved(part, device) for part in item)
    if isinstance(item, dict):
        return {key: _moved(part, device) for key, part in item.items()}
    return item
