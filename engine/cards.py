"""The hardware of a request: what was probed, what the user caps or imagines, and the card that is meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine import probe
from engine.errors import HardwareError, UsageError
from engine.probe import host
from engine.values import Gpu, Hardware, Request
from engine.words import listing


def snapshot(request: Request, given: Hardware | None) -> Hardware:
    """Return the snapshot to decide on: probed, or the one given, with hypothetical wishes applied."""
    if given is not None:
        seen = given
    elif request.device == "cpu":
        seen = Hardware(gpus=(), host=host.snapshot(), no_gpu_because="--device cpu leaves the cards alone")
    else:
        seen = probe.snapshot()
    if request.host_ram_bytes is not None:
        seen = dataclasses.replace(seen, host=dataclasses.replace(seen.host, ram_bytes=request.host_ram_bytes))
    return seen if request.device == "cpu" else _with_card(request, seen)


def _with_card(request: Request, seen: Hardware) -> Hardware:
    """Apply `vram`: it caps the card that is there, and with no card (or an unknown name) it makes one up, openly."""
    name, vram = request.gpu, request.vram_bytes
    present = _named(name, seen.gpus) if name is not None else _most_free(seen.gpus)
    if present is not None:
        if vram is None:
            return seen
        is_more = present.free_bytes is not None and vram > present.free_bytes
        capped = dataclasses.replace(present, free_bytes=vram, hypothetical=is_more)
        return dataclasses.replace(seen, gpus=tuple(capped if g is present else g for g in seen.gpus))
    if vram is None:
        if name is not None:
            here = listing([f"{g.index}: {g.name}" for g in seen.gpus])
            raise UsageError(
                f"there is no card {name!r} here",
                f"the cards are {here}" if here else str(seen.no_gpu_because),
                "give the index, UUID or name of one that is; to plan for another, say its free VRAM too: --vram 12GiB",
            )
        if request.device == "cuda":
            raise HardwareError(
                "--device cuda was asked for, and there is no card",
                seen.no_gpu_because or "",
                "run `dg-run doctor`; `--device cpu` runs without one",
            )
        return seen
    imagined = Gpu(
        index=0,
        name=name or "hypothetical card",
        uuid=None,
        arch=None,
        total_bytes=None,
        free_bytes=vram,
        hypothetical=True,
    )
    return dataclasses.replace(seen, gpus=(imagined,), no_gpu_because=None)


def _named(name: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """Return the card meant by an index, a UUID (or its beginning), or a name (or a part of it that only one has)."""
    by_index = [g for g in gpus if name == str(g.index)]
    by_uuid = [g for g in gpus if g.uuid and name.startswith(("GPU-", "MIG-")) and g.uuid.startswith(name)]
    by_name = [g for g in gpus if name.casefold() in g.name.casefold()]
    found = by_index or by_uuid or by_name
    if len(found) > 1:
        raise UsageError(
            f"{name!r} is not one card",
            f"it could be {listing([f'{g.index}: {g.name}' for g in found], 'or')}",
            "give the index or UUID",
        )
    return found[0] if found else None


def _most_free(gpus: Sequence[Gpu]) -> Gpu | None:
    """Return the card with the most free memory; the first of equals."""
    return max(gpus, key=lambda g: (g.free_bytes or -1, -g.index), default=None)


def chosen(request: Request, seen: Hardware) -> Gpu | None:
    """Return the card to plan for."""
    if request.device == "cpu" or not seen.gpus:
        return None
    return (_named(request.gpu, seen.gpus) if request.gpu is not None else None) or _most_free(seen.gpus)
