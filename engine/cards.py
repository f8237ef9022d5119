"""The hardware of a request: what was probed, what the user caps or imagines, and the card that is meant."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from engine import gpus, probe
from engine.errors import HardwareError, UsageError
from engine.gpus import KnownGpu
from engine.units import GIB, MIB
from engine.values import Gpu, Hardware, Request
from engine.words import listing

# For the display, and for neighbours whose use moves between the probe and the run.
HEADROOM_BYTES = 512 * MIB
# Windows gives a process less than what is free, and past that spills to the host without an error.
WDDM_HEADROOM_BYTES = 1024 * MIB


def snapshot(request: Request, given: Hardware | None) -> Hardware:
    """Return the snapshot to decide on: probed, or the one given, with hypothetical wishes applied."""
    if given is not None:
        seen = given
    elif request.device == "cpu":
        seen = probe.without_cards()
    else:
        seen = probe.snapshot()
    if request.host_ram_bytes is not None:
        seen = dataclasses.replace(seen, host=dataclasses.replace(seen.host, ram_bytes=request.host_ram_bytes))
    if request.device == "cpu":
        return seen
    seen = _with_card(request, seen)
    _refuse_broken(request, seen)
    return seen


def _refuse_broken(request: Request, seen: Hardware) -> None:
    """Refuse to go on beside a broken card, unless one that works was named: nobody wants the CPU unasked."""
    if not seen.faults or any(g.hypothetical for g in seen.gpus):
        return
    if request.gpu is not None and _named(request.gpu, seen.gpus) is not None:
        return
    fault = seen.faults[0]
    here = f"; or name a card that works: --gpu {seen.gpus[0].index}" if seen.gpus else ""
    raise HardwareError(fault.what, fault.why, fault.do + here)


def _with_card(request: Request, seen: Hardware) -> Hardware:
    """Apply `gpu` and `vram`: a cap on the card that is there, or, for a card that is not, one made up openly."""
    name, vram = request.gpu, request.vram_bytes
    present = _named(name, seen.gpus) if name is not None else _most_free(seen.gpus)
    if present is not None:
        if vram is None:
            return seen
        is_more = present.free_bytes is not None and vram > present.free_bytes
        capped = dataclasses.replace(present, free_bytes=vram, hypothetical=is_more)
        return dataclasses.replace(seen, gpus=tuple(capped if g is present else g for g in seen.gpus))
    if name is None and vram is None:
        if request.device == "cuda" and not seen.faults:
            raise HardwareError(
                "--device cuda was asked for, and there is no card",
                seen.no_gpu_because or "",
                "run `dg-run doctor`; `--device cpu` runs without one",
            )
        return seen
    return _imagined(name, vram, seen)


def _imagined(name: str | None, vram: int | None, seen: Hardware) -> Hardware:
    """Return hardware with the one card that is meant, from the table of known cards where it is in it."""
    row = None if name is None else _known(name)
    if row is None and vram is None:
        here = listing([f"{g.index}: {g.name}" for g in seen.gpus])
        close = gpus.suggestions(name or "")
        raise UsageError(
            f"there is no card {name!r}, here or in the table of known cards",
            f"the cards here are {here}" if here else str(seen.no_gpu_because),
            (f"did you mean {listing(close, 'or')}? " if close else "")
            + "To plan for any other card, say its free VRAM: --vram 12GiB",
        )
    notes = seen.notes
    total = None if row is None else _memory_bytes(row, name or "", vram)
    if row is None:
        notes += (f"{name or 'the card'} is not in the table of known cards: only its free VRAM is known",)
    elif vram is None:
        notes += (f"{row.name} is taken to be wholly free; say --vram for what a display or a neighbour leaves",)
    card = Gpu(
        index=0,
        name=row.name if row else name or "hypothetical card",
        uuid=None,
        arch=row.compute_capability if row else None,
        total_bytes=total,
        free_bytes=total if vram is None else vram,
        pcie_generation=row.pcie_generation if row else None,
        pcie_width=row.pcie_lanes if row else None,
        unified_memory=row.unified_memory if row else False,
        hypothetical=True,
    )
    return dataclasses.replace(seen, gpus=(card,), notes=notes, no_gpu_because=None)


def _known(name: str) -> KnownGpu | None:
    """Return the one known card of that name, or None. Raises: UsageError, when it could be several."""
    rows = gpus.named(name)
    if len(rows) > 1:
        raise UsageError(
            f"{name!r} is not one card", f"it could be {listing([r.name for r in rows], 'or')}", "give the whole name"
        )
    return rows[0] if rows else None


def _memory_bytes(row: KnownGpu, name: str, vram: int | None) -> int:
    """Return a known card's memory: of several sizes the one in its name, else the smallest that holds `vram`."""
    for size in row.memory_gib:
        if re.search(rf"\b{size}\s?gi?b\b", name.casefold()):
            return size * GIB
    enough = [size for size in row.memory_gib if vram is None or size * GIB >= vram]
    return min(enough, default=max(row.memory_gib)) * GIB


def _named(name: str, present: Sequence[Gpu]) -> Gpu | None:
    """Return the card meant by an index, a UUID (or its beginning), or a name (or a part of it that only one has)."""
    by_index = [g for g in present if name == str(g.index)]
    by_uuid = [g for g in present if g.uuid and name.startswith(("GPU-", "MIG-")) and g.uuid.startswith(name)]
    rows = gpus.named(name)
    ways = {gpus.folded(w) for w in (name, *(r.name for r in rows), *(r.nvml_name for r in rows))}
    by_name = [g for g in present if gpus.folded(g.name) in ways]
    if not by_name and not rows:  # "4070" is a card of its own, and not a 4070 Ti that is here
        by_name = [g for g in present if name.casefold() in g.name.casefold()]
    found = by_index or by_uuid or by_name
    if len(found) > 1:
        raise UsageError(
            f"{name!r} is not one card",
            f"it could be {listing([f'{g.index}: {g.name}' for g in found], 'or')}",
            "give the index or UUID",
        )
    return found[0] if found else None


def _most_free(present: Sequence[Gpu]) -> Gpu | None:
    """Return the card with the most free memory; the first of equals."""
    return max(present, key=lambda g: (-1 if g.free_bytes is None else g.free_bytes, -g.index), default=None)


def chosen(request: Request, seen: Hardware) -> Gpu | None:
    """Return the card to plan for."""
    if request.device == "cpu" or not seen.gpus:
        return None
    return (_named(request.gpu, seen.gpus) if request.gpu is not None else None) or _most_free(seen.gpus)


def candidates(request: Request, seen: Hardware) -> tuple[Gpu | None, ...]:
    """Return the cards to plan for, the one with the most room first; (None,) where it is to run without one.

    Of several cards the one with the best plan is taken. A card whose memory was capped, or that was named, is the one.
    """
    meant = chosen(request, seen)
    if meant is None or request.gpu is not None or request.vram_bytes is not None:
        return (meant,)
    found = {_kind(meant): meant}
    for gpu in sorted(seen.gpus, key=lambda g: (-(g.free_bytes or 0), g.index)):
        if gpu.free_bytes is not None:
            found.setdefault(_kind(gpu), gpu)  # of equal cards the one with the most room has the best plan
    return tuple(found.values())


def _kind(gpu: Gpu) -> tuple[object, ...]:
    return gpu.name, gpu.arch, gpu.total_bytes, gpu.mig, gpu.pcie_generation, gpu.pcie_width, gpu.driver_model


def headroom_bytes(request: Request, card: Gpu) -> int:
    """Return what is left alone of a card's free memory: what was asked for, else the default for its driver model."""
    if request.headroom_bytes is not None:
        return request.headroom_bytes
    return WDDM_HEADROOM_BYTES if card.driver_model == "WDDM" else HEADROOM_BYTES
