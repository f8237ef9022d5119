"""Known cards: what they compute and copy, as data. To add a card: a line in `table.json`, with its source.

Rates are dense, and tensor rates are with float32 accumulation, as the libraries compute. A card that is not in the
table is described from its compute capability, cores and clocks, and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from engine.units import GIB
from engine.values import Gpu
from engine.words import nearest

_TABLE = Path(__file__).parent / "table.json"
_TERA, _GIGA = 10**12, 10**9

# Bytes a second of one PCIe lane in one direction, after encoding, by generation (PCI-SIG base specifications).
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}

# For cards outside the table: dense tensor rates as a multiple of the float32 rate, by compute capability. Where cards
# of one architecture differ it is GeForce's, the lower one. Source: ratios within the table.
_TENSOR_RATIO = {
    "6.0": {"fp16": 2.0},
    "6.1": {"fp16": 1 / 64},
    "7.0": {"fp16": 8.0},
    "7.5": {"fp16": 2.0},
    "8.0": {"fp16": 16.0, "bf16": 16.0, "tf32": 8.0},
    "8.6": {"fp16": 2.0, "bf16": 2.0, "tf32": 1.0},
    "8.7": {"fp16": 8.0, "bf16": 8.0, "tf32": 4.0},
    "8.9": {"fp16": 2.0, "bf16": 2.0, "tf32": 1.0, "fp8": 4.0},
    "9.0": {"fp16": 14.7, "bf16": 14.7, "tf32": 7.4, "fp8": 29.5},
    "12.0": {"fp16": 2.0, "bf16": 2.0, "tf32": 1.0, "fp8": 4.0},
}


# float32 cores in a multiprocessor: 64 up to Turing (and in A100), 128 in consumer Pascal and since GA10x.
_HALF_SIZE_MULTIPROCESSORS = ("6.0", "7.0", "7.5", "8.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownGpu:
    """A row of the table."""

    name: str
    nvml_name: str
    aliases: tuple[str, ...]
    architecture: str
    compute_capability: str
    memory_gib: tuple[int, ...]
    """As marketed; several where one name is sold in sizes that differ in nothing else."""
    fp32_tflops: float
    tf32_tflops: float | None
    fp16_tflops: float
    bf16_tflops: float | None
    fp8_tflops: float | None
    bandwidth_gb_per_s: float
    pcie_generation: int | None
    pcie_lanes: int | None
    unified_memory: bool
    multiprocessors: int
    boost_mhz: int
    confidence: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a card does in a second, at best. None is not known, or not there (no such format on this card)."""

    fp32_flop_per_s: float | None
    tf32_flop_per_s: float | None
    fp16_flop_per_s: float | None
    bf16_flop_per_s: float | None
    fp8_flop_per_s: float | None
    memory_bytes_per_s: float | None
    link_bytes_per_s: float | None
    """Between host and card, one direction."""
    basis: str
    """Where the figures are from: a row of the table, or the card's clocks."""


@cache
def table() -> tuple[KnownGpu, ...]:
    """Return all rows."""
    content = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(_row(entry, content["sources"]) for entry in content["gpus"])


def _row(entry: dict[str, Any], sources: dict[str, str]) -> KnownGpu:
    fields = {k: v for k, v in entry.items() if k != "note"}
    fields["source"] = sources.get(entry["source"], entry["source"])
    fields["nvml_name"] = entry.get("nvml_name", entry["name"])
    for name in ("aliases", "memory_gib"):
        fields[name] = tuple(entry[name])
    return KnownGpu(**fields)


@cache
def folded(name: str) -> str:
    """Return a name without what people write differently: case, spaces, hyphens, the maker, the family."""
    words = re.sub(r"\b(nvidia|geforce|tesla|quadro|graphics|gpu)\b", " ", name.casefold())
    return re.sub(r"[^a-z0-9]", "", words)


@cache
def _by_name() -> dict[str, tuple[KnownGpu, ...]]:
    """Return the rows by every folded way of writing them."""
    found: dict[str, list[KnownGpu]] = {}
    for row in table():
        for way in {folded(w) for w in (row.name, row.nvml_name, *row.aliases)}:
            found.setdefault(way, []).append(row)
    return {way: tuple(rows) for way, rows in found.items()}


@lru_cache(maxsize=64)
def named(name: str) -> tuple[KnownGpu, ...]:
    """Return the cards that somebody may mean by `name`: one, several, or none.

    >>> [row.name for row in named("rtx-4090")]
    ['GeForce RTX 4090']
    """
    wanted = folded(name)
    # A row whose own name this is goes before rows that merely share NVML's name for it.
    own = tuple(r for r in table() if wanted in (folded(r.name), *map(folded, r.aliases)))
    return own or _by_name().get(wanted, ())


def suggestions(name: str) -> list[str]:
    """Return names of known cards that resemble `name`."""
    wanted = folded(name)
    close = nearest(wanted, _by_name(), count=3) if wanted else []
    return list(dict.fromkeys(_by_name()[c][0].name for c in close))


def row_of(gpu: Gpu) -> KnownGpu | None:
    """Return the row of a card that is there: by NVML's name, and of several by memory and cores."""
    name = re.sub(r"\s+MIG\b.*", "", gpu.name)
    rows = _by_name().get(folded(name), ())
    return min(rows, key=lambda row: _unlikeness(row, gpu), default=None)


def multiprocessors(gpu: Gpu) -> int | None:
    """Return how many multiprocessors a card has: from its row, else from its cores; None where neither is known.

    A MIG instance has a share of them, which is not told.
    """
    if gpu.mig:
        return None
    row = row_of(gpu)
    if row is not None:
        return row.multiprocessors
    return None if gpu.cores is None else gpu.cores // (64 if gpu.arch in _HALF_SIZE_MULTIPROCESSORS else 128)


def _unlikeness(row: KnownGpu, gpu: Gpu) -> tuple[float, float]:
    memory = 0.0 if gpu.total_bytes is None else min(abs(size * GIB - gpu.total_bytes) for size in row.memory_gib)
    per_multiprocessor = 64 if row.compute_capability in _HALF_SIZE_MULTIPROCESSORS else 128
    cores = 0.0 if gpu.cores is None else abs(row.multiprocessors * per_multiprocessor - gpu.cores)
    return round(memory / GIB), cores


def rates(gpu: Gpu) -> Rates | None:
    """Return what a card does in a second: from its row, else from its clocks; None where neither is known."""
    if gpu.mig:
        # A slice has a share of its card's units and bandwidth, which NVML does not tell the same way everywhere.
        return None
    row = row_of(gpu)
    link = link_bytes_per_s(gpu.pcie_generation, gpu.pcie_width)
    if row is None:
        return _derived(gpu, link)
    return Rates(
        fp32_flop_per_s=row.fp32_tflops * _TERA,
        tf32_flop_per_s=_scaled(row.tf32_tflops, _TERA),
        fp16_flop_per_s=row.fp16_tflops * _TERA,
        bf16_flop_per_s=_scaled(row.bf16_tflops, _TERA),
        fp8_flop_per_s=_scaled(row.fp8_tflops, _TERA),
        memory_bytes_per_s=row.bandwidth_gb_per_s * _GIGA,
        link_bytes_per_s=link or link_bytes_per_s(row.pcie_generation, row.pcie_lanes),
        basis=f"table: {row.source}",
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def link_bytes_per_s(generation: int | None, lanes: int | None) -> float | None:
    """Return what a PCIe link carries in one direction; None where generation or width is not known."""
    if generation not in _LANE_BYTES_PER_S or not lanes:
        return None
    return _LANE_BYTES_PER_S[generation] * lanes


def _derived(gpu: Gpu, link: float | None) -> Rates | None:
    """Return rates from clocks: two operations a core and cycle; two transfers a memory clock, the bus wide."""
    fp32 = None if not gpu.cores or not gpu.sm_clock_mhz else gpu.cores * gpu.sm_clock_mhz * 1e6 * 2
    memory = None
    if gpu.memory_clock_mhz and gpu.memory_bus_bits:
        memory = gpu.memory_clock_mhz * 1e6 * 2 * gpu.memory_bus_bits / 8
    if fp32 is None and memory is None:
        return None
    ratio = _TENSOR_RATIO.get(gpu.arch or "", {})

    def tensor(kind: str) -> float | None:
        return None if fp32 is None or kind not in ratio else fp32 * ratio[kind]

    return Rates(
        fp32_flop_per_s=fp32,
        tf32_flop_per_s=tensor("tf32"),
        fp16_flop_per_s=tensor("fp16"),
        bf16_flop_per_s=tensor("bf16"),
        fp8_flop_per_s=tensor("fp8"),
        memory_bytes_per_s=memory,
        link_bytes_per_s=link,
        basis="derived: this card is not in the table; from its compute capability, cores and clocks",
    )


def fastest_first(gpus: Iterable[Gpu]) -> Sequence[Gpu]:
    """Return cards in CUDA's usual order: the fastest first, equal ones by bus."""
    return sorted(gpus, key=lambda g: (-((r.fp32_flop_per_s or 0) if (r := rates(g)) else 0), g.index))
