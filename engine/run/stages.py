"""One call in two stages: text encoders alone encode its prompts, and the rest of the pipeline is given what they made.

No library does this by a switch. Every pipeline of diffusers that takes a prompt has `encode_prompt`, and its call asks
it once it has checked its arguments: once, or once more for what is not to be drawn. With the text encoders alone the
call is left where it goes on to anything else; without them the answers are handed in, in the same order. What is
encoded is kept on the host, so that a hundred prompts take no room on the card.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import IncompatibleError
from engine.facts.casting import is_text_encoder
from engine.optimizers.spec import modules

_DO = "leave staged_encoding out"


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `encode_prompt` gave for one call, each time that it was asked, its tensors on the host."""

    answers: tuple[Any, ...]

    @property
    def size_bytes(self) -> int:
        """How much of the host it takes."""
        return sum(_bytes(answer) for answer in self.answers)


class _Left(BaseException):
    """Ends a call once its prompts are encoded. Nothing between may take it for an error of its own."""


class _Encoding:
    """Collects what one call's `encode_prompt` gives, and leaves the call where it goes on to anything else."""

    def __init__(self, pipe: Any) -> None:
        self.name = type(pipe).__name__
        self.real = _encoder(pipe)
        self.answers: list[Any] = []
        self.is_within = False

    def encode(self, *args: Any, **given: Any) -> Any:
        if self.is_within:  # some ask themselves again for a part
            return self.real(*args, **given)
        self.is_within = True
        try:
            answer = self.real(*args, **given)
        finally:
            self.is_within = False
        self.answers.append(answer)
        return answer

    def go_on(self, to: str) -> None:
        """Leave the call if it has encoded. What is used before that is left alone."""
        if self.is_within:
            raise IncompatibleError(
                f"{self.name} encodes its prompts with more than its text encoders",
                f"it uses {to} for it, which is not there in the first stage",
                _DO,
            )
        if self.answers:
            raise _Left


def encode(pipe: Any, call: Mapping[str, Any], device: str) -> Encoded:
    """Return what a call's prompts are encoded to; nothing after that happens.

    The text encoders of `pipe` are on `device`; its other components may lack their weights (be on meta), not their
    configurations.

    Raises: IncompatibleError, for a pipeline that does not encode apart; what the pipeline raises.
    """
    import torch

    watch = _Encoding(pipe)
    with _answering(pipe, watch.encode), _left_behind(pipe, watch), _computing_on(pipe, torch.device(device)):
        with torch.no_grad(), contextlib.suppress(_Left):
            pipe(**call)
    if not watch.answers:
        raise IncompatibleError(f"{watch.name} does not encode its prompts apart", do=_DO)
    return Encoded(tuple(_moved(answer, torch.device("cpu")) for answer in watch.answers))


@contextlib.contextmanager
def given(pipe: Any, encoded: Encoded, device: str) -> Iterator[None]:
    """Let a call of `pipe`, which has no text encoders, have what was encoded, on `device`.

    Raises: IncompatibleError, when the call wants more of its text encoders than that.
    """
    import torch

    name, left = type(pipe).__name__, iter(encoded.answers)

    def answer(*args: Any, **given: Any) -> Any:
        for found in left:
            return _moved(found, torch.device(device))
        raise IncompatibleError(
            f"{name} encodes more than its prompts", "its text encoders are gone when it asks again", _DO
        )

    with _answering(pipe, answer):
        try:
            yield
        except (AttributeError, TypeError) as error:
            if "NoneType" not in str(error):
                raise
            raise IncompatibleError(
                f"{name} cannot be called without its text encoders", " ".join(str(error).split())[:200], _DO
            ) from error


def _encoder(pipe: Any) -> Any:
    found = getattr(pipe, "encode_prompt", None)
    if not callable(found):
        raise IncompatibleError(
            f"{type(pipe).__name__} does not encode its prompts apart", "it has no `encode_prompt`", _DO
        )
    return found


@contextlib.contextmanager
def _answering(pipe: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Let `encode_prompt` of this pipeline, and of no other, be answered so."""
    with replaced(pipe, "encode_prompt", answer):
        yield


@contextlib.contextmanager
def _left_behind(pipe: Any, watch: _Encoding) -> Iterator[None]:
    """Let a call be left where it prepares what it denoises, sets its scheduler, or uses another component.

    The first two come before any component does, and hold latents that would be made in vain.
    """
    from engine.dryrun import phases

    others = {n: m for n, m in modules(pipe).items() if not is_text_encoder(n)}
    with contextlib.ExitStack() as stack:
        for name in dir(type(pipe)):
            if name.startswith("prepare_") and callable(real := getattr(pipe, name)):
                stack.enter_context(replaced(pipe, name, _leaving(watch, name, real)))
        for name, part in pipe.components.items():
            if callable(real := getattr(part, "set_timesteps", None)):
                stack.enter_context(replaced(part, "set_timesteps", _leaving(watch, name, real)))
        for name, module in others.items():
            stack.enter_context(phases.told({name: module}, functools.partial(_using, watch, name)))
        yield


def _using(watch: _Encoding, name: str, _: str) -> None:
    watch.go_on(name)


def _leaving(watch: _Encoding, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)  # pipelines read the signature of `set_timesteps`
    def leave(*args: Any, **given: Any) -> Any:
        if not watch.is_within:
            watch.go_on(name)
        return real(*args, **given)

    return leave


@contextlib.contextmanager
def replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Let one object have another method of this name for a while."""
    own = vars(owner)
    before = own.get(name)
    own[name] = by
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before


@contextlib.contextmanager
def _computing_on(pipe: Any, device: Any) -> Iterator[None]:
    """Let a pipeline compute on `device`: it would go by its first component, which may have no weights."""
    plain = type(pipe)
    there = property(lambda self: device)
    pipe.__class__ = type(plain.__name__, (plain,), {"_execution_device": there, "device": there})
    try:
        yield
    finally:
        pipe.__class__ = plain


def _bytes(item: Any) -> int:
    import torch

    if isinstance(item, torch.Tensor):
        return item.nbytes
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, tuple | list) else ()
    return sum(map(_bytes, parts))


def _moved(answer: Any, device: Any) -> Any:
    """Return an answer with its tensors on another device, one that is in it twice once; the rest stays as it is."""
    return _move(answer, device, {})


def _move(item: Any, device: Any, there: dict[int, Any]) -> Any:
    # A function of its own: one that is within another and calls itself would keep what it moved until Python looks.
    import torch

    if isinstance(item, torch.Tensor):
        if id(item) not in there:
            there[id(item)] = item.to(device)
        return there[id(item)]
    if isinstance(item, tuple | list):
        parts = [_move(part, device, there) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if isinstance(item, dict):
        return {key: _move(part, device, there) for key, part in item.items()}
    return item
