"""Which cards a CUDA program would see: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, as CUDA reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from engine.gpus import fastest_first
from engine.values import Gpu

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
_NUMBER = re.compile(r"[+-]?[0-9]+")


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Return the cards (and MIG instances) that are left, in the variable's order, and what to say of it.

    As CUDA does: the first entry decides whether the list is of indices, GPU UUIDs or MIG UUIDs; a number is read as
    far as it goes; the list ends before the first entry that names nothing; an entry that occurs twice empties it.
    """
    variable = environment.get(VISIBLE)
    if variable is None:
        return tuple(gpus), ()
    entries = [entry.strip() for entry in variable.split(",")]
    if entries[0].startswith(("GPU-", "MIG-")):
        chosen, told = _by_uuid(gpus, entries, entries[0][:4])
    else:
        chosen, told = _by_index(gpus, entries, environment.get(ORDER, ""))
    if not chosen:
        told = (f"{VISIBLE} is {variable!r}, which leaves no card", *told)
    elif len(chosen) < len([e for e in entries if e]):
        told = (f"{VISIBLE} is {variable!r}; only its first {len(chosen)} name a card", *told)
    return chosen, told


def _by_uuid(gpus: Sequence[Gpu], entries: Sequence[str], kind: str) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    chosen: list[Gpu] = []
    for entry in entries:
        if not entry.startswith(kind):
            break
        found = [g for g in gpus if g.uuid is not None and g.uuid.casefold().startswith(entry.casefold())]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return (), (f"{VISIBLE} names one card twice",)
        chosen += found
    return tuple(chosen), ()


def _by_index(gpus: Sequence[Gpu], entries: Sequence[str], order: str) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    # Of a card that is cut into MIG instances CUDA takes the first, when the card is named by its index.
    cards = [next(g for g in gpus if g.index == i) for i in sorted({g.index for g in gpus})]
    told: tuple[str, ...] = ()
    if order != "PCI_BUS_ID" and _unlike(gpus):
        cards = list(fastest_first(cards))
        read_as = ", ".join(f"{n}: {g.name}" for n, g in enumerate(cards))
        told = (
            f"the cards are unlike and {ORDER} is not PCI_BUS_ID: CUDA numbers the fastest first, so that {VISIBLE}"
            f" was read as {read_as}; name cards by UUID to be certain",
        )
    chosen: list[int] = []
    for entry in entries:
        number = _NUMBER.match(entry)
        # More digits than any count of cards has is no index, and no number to be made of.
        if number is None or len(number[0]) > 4 or not 0 <= int(number[0]) < len(cards):
            break
        if int(number[0]) in chosen:
            return (), (f"{VISIBLE} names one card twice", *told)
        chosen.append(int(number[0]))
    return tuple(cards[i] for i in chosen), told


def _unlike(gpus: Sequence[Gpu]) -> bool:
    return len({(g.name, g.arch, g.total_bytes) for g in gpus if not g.mig}) > 1
