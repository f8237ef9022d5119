"""What `auto` can stand for. To open a parameter: `opens=True` in its optimizer's spec, and its values here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

from engine import optimizers
from engine.facts import attention
from engine.facts.casting import is_text_encoder
from engine.optimizers import dtype
from engine.solve.situation import Situation
from engine.values import FrozenDict, Step

AUTO = "auto"
_BLOCKS = (1, 2, 4)
"""Blocks in a group, where no stream copies ahead."""


def values(step: Step, situation: Situation) -> tuple[Step, ...]:
    """Return the steps that an open one can stand for, the usual one first; a step that is not open is the only one."""
    open_ = [n for n, v in step.params.items() if v == AUTO and _opens(step, n)]
    if not open_:
        return (step,)
    choices = {n: tuple(_of(step.name, n, situation)) for n in open_}
    found = [
        dataclasses.replace(step, params=FrozenDict({**step.params, **dict(zip(open_, chosen, strict=True))}))
        for chosen in itertools.product(*choices.values())
    ]
    return tuple(s for s in found if _is_sensible(s, open_))


def _opens(step: Step, name: str) -> bool:
    return step.name == "dtype" or any(p.name == name and p.opens for p in optimizers.spec(step.name).params)


def _of(optimizer: str, name: str, situation: Situation) -> Iterable[object]:
    match optimizer, name:
        case "dtype", _:
            return dtypes(situation)
        case "group_offload", "type":
            return ("leaf_level", "block_level")
        case "group_offload", "use_stream":
            return (True, False)
        case "group_offload", "blocks_per_group":
            return _BLOCKS
        case "vae_tiling", "tile":
            return (None, *situation.model.tiles(situation.request.height, situation.request.width))
        case "layerwise_casting", "components":
            return (_computing(situation.sizes(dtypes(situation)[0])),)
        case _, "components":
            sizes = situation.sizes(dtypes(situation)[0])
            return _smallest(sizes) if optimizer == "resident" else _largest(sizes)
    raise LookupError(f"{optimizer}.{name} is open, and nothing here says what it can be")


def _is_sensible(step: Step, open_: Iterable[str]) -> bool:
    """Whether a choice is one of its own: several blocks in a group are for block level without a stream."""
    if step.name != "group_offload" or "blocks_per_group" not in open_:
        return True
    is_plain = step.params["type"] == "block_level" and not step.params["use_stream"]
    return is_plain or step.params["blocks_per_group"] == 1


def dtypes(situation: Situation) -> tuple[str, ...]:
    """Return what `dtype: auto` can be: what the card computes fast in, and float32 where that is float16.

    A card whose capability is not known leaves it open.
    """
    if situation.gpu is None:
        return ("float32",)
    usual = dtype.resolve_auto(situation.gpu.compute_capability)
    return (usual, "float32") if usual == "float16" else (usual,)


def _computing(sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    """Return what is worth being kept in fewer bits: what denoises, and the text encoders that are large beside others.

    None where sizes are not known: then what denoises.
    """
    largest = max((size for name, size in sizes.items() if is_text_encoder(name)), default=0)
    found = [n for n in sizes if n in attention.DENOISERS or (is_text_encoder(n) and 2 * sizes[n] >= largest)]
    return tuple(sorted(found)) or None


def _smallest(sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield which components could stay on the device: the smallest one, two, ..., and all but the text encoders."""
    names = sorted(sizes, key=lambda n: (sizes[n], n))
    found = {tuple(sorted(names[:count])) for count in range(1, len(names))}
    unread = tuple(sorted(n for n in names if not is_text_encoder(n)))
    if unread and len(unread) < len(names):
        found.add(unread)
    yield from sorted(found, key=lambda several: (sum(sizes[n] for n in several), several))


def _largest(sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield which components could be offloaded: what is left beside each of those that could stay."""
    for kept in _smallest(sizes):
        yield tuple(sorted(n for n in sizes if n not in kept))
