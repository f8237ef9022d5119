"""Which weights the files of a component lacked: diffusers leaves them on meta, transformers draws them at random.

transformers only says so in its log, and returns it to who asks with `output_loading_info` (transformers 5.23,
`PreTrainedModel.from_pretrained`). diffusers does not ask, so it is asked here, while a pipeline is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


class Told:
    """What transformers said of the models that it loaded."""

    def __init__(self) -> None:
        self._of: list[tuple[Any, frozenset[str]]] = []

    def add(self, module: Any, names: Iterable[str]) -> None:
        self._of.append((module, frozenset(names)))

    def of(self, module: Any) -> list[str]:
        """Return the weights of a component that no file held, in order.

        Those of a model's head are not counted: they turn hidden states into words, a text encoder's are never asked
        for, and models are published without them.
        """
        empty = {n for n, p in module.named_parameters() if p.is_meta}
        random = {n for m, names in self._of if m is module for n in names}
        return sorted(empty | (random - _head(module)))


def _head(module: Any) -> set[str]:
    found = getattr(module, "get_output_embeddings", lambda: None)()
    own = set() if found is None else {id(p) for p in found.parameters()}
    return {name for name, p in module.named_parameters() if id(p) in own}


@contextlib.contextmanager
def told() -> Iterator[Told]:
    """Hear what transformers says of each model that is loaded meanwhile. One thread at a time."""
    from transformers import PreTrainedModel

    heard = Told()
    real = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, /, *args: Any, output_loading_info: bool = False, **given: Any) -> Any:
        module, info = real.__func__(cls, *args, output_loading_info=True, **given)
        heard.add(module, info["missing_keys"])
        return (module, info) if output_loading_info else module

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield heard
    finally:
        PreTrainedModel.from_pretrained = real
