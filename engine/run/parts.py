"""Load a pipeline in parts: some of its components with their weights, weightless twins on meta in the others' places.

A pipeline is made of all its components at once, and reads the configurations of each. So one of them is loaded alone
beside twins of the others, which are built of their configurations in no time and take no room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine import collector
from engine.facts.model import Model
from engine.run.progress import Progress
from engine.units import format_seconds, format_size

Made = Callable[[Mapping[str, Any]], Any]
"""Makes the pipeline: with these components as they are given, the others loaded."""

Change = Callable[[str, Any], str | None]
"""Changes the weights of one component, by name, and says what it did."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How a pipeline is loaded in parts; `twins` are of all its components with weights, by name."""

    make: Made
    twins: Mapping[str, Any]
    change: Change | None = None
    """What is made of each component's weights before anything else is done with them: LoRAs are fused so."""

    def loaded(self, names: Iterable[str], given: Mapping[str, Any], told: Progress) -> Any:
        """Return the pipeline with these components loaded; of the others those that are given, and twins."""
        wanted = set(names)
        pipe = self._made(wanted, given)
        for name in sorted(wanted):
            self._changed(name, getattr(pipe, name), told)
        return pipe

    def _made(self, wanted: Collection[str], given: Mapping[str, Any]) -> Any:
        return self.make({n: t for n, t in self.twins.items() if n not in wanted} | dict(given))

    def _changed(self, name: str, module: Any, told: Progress) -> None:
        if self.change is not None and (said := self.change(name, module)):
            told.say(f"  {said}")

    def one_by_one(
        self, names: Iterable[str], given: Mapping[str, Any], settle: Callable[[str, Any], None], told: Progress
    ) -> dict[str, Any]:
        """Return these components, each loaded and settled (put where it will be) before the next one comes.

        What has no weights is loaded with the first of them, and among what is returned. Each is told with its bytes,
        as it is loaded, and its seconds.
        """
        found = dict(given)
        for name in sorted(names):
            start = time.perf_counter()
            pipe = self._made([name], without_weights(found))
            found |= without_weights(pipe.components)
            found[name] = getattr(pipe, name)
            del pipe
            size = weights_bytes(found[name])
            self._changed(name, found[name], told)
            settle(name, found[name])
            told.say(f"  {name}: {format_size(size)} in {format_seconds(time.perf_counter() - start)}")
        return found


def weights_bytes(module: Any) -> int:
    """Return the bytes of a component's parameters and buffers, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}.values())


def without_weights(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return the components that have no weights: tokenizers, schedulers and their like."""
    import torch

    return {n: c for n, c in components.items() if c is not None and not isinstance(c, torch.nn.Module)}


def twins(model: Model, dtype: str, absent: Iterable[str] = ()) -> dict[str, Any]:
    """Return twins of a model's components that have weights. Raises: ModelError, where one cannot be built."""
    import torch

    from engine.dryrun import build

    left_out = set(absent)
    with collector.off():  # their classes are imported
        made = {n: build.component(model, n, getattr(torch, dtype)) for n in model.parts if n not in left_out}
    return {n: c for n, c in made.items() if isinstance(c, torch.nn.Module)}
