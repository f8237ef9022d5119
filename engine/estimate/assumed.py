"""What was measured of a card beside what is assumed of one that nobody measured, for reading. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from engine.calibration import Calibration
from engine.estimate import clock, workspaces
from engine.estimate.clock import Speeds
from engine.estimate.trace import Work
from engine.optimizers.dtype import resolve_auto
from engine.units import format_size
from engine.values import Gpu
from engine.words import listing

N = TypeVar("N", int, float)

_TOKENS, _WIDE_TOKENS = 4608, 16384


@dataclass(frozen=True, slots=True)
class Row:
    """One figure for reading; `ratio` is measured / assumed, where both are known."""

    name: str
    measured: str
    assumed: str
    ratio: float | None = None


def rows(gpu: Gpu, found: Calibration) -> tuple[Row, ...]:
    """Return every figure of a calibration, those that were not measured too."""
    usual = clock.speeds(gpu)
    measured = clock.speeds(gpu, calibration=found)
    return (*_bytes(gpu, found), *_copies(found, usual), *_computing(gpu, found, usual, measured), *_host(found, usual))


def _bytes(gpu: Gpu, found: Calibration) -> Iterator[Row]:
    capability = gpu.compute_capability
    usual = None if capability is None else workspaces.context_bytes(capability)
    yield _row("CUDA's context", found.context_bytes, usual, format_size)
    for kind in ("half", "float32"):
        seen = workspaces.seen_converted(found.convolutions, kind)
        assumed = None if capability is None else workspaces.converts(kind, capability)
        name = f"cuDNN converts, {kind}"
        yield Row(name, _tensors(seen), _tensors(assumed))


def _tensors(names: tuple[str, ...] | None) -> str:
    return "not known" if names is None else listing(names) or "nothing"


def _copies(found: Calibration, usual: Speeds | None) -> Iterator[Row]:
    for name, measured, assumed in (
        ("pinned to card", found.pinned_to_device_bytes_per_s, _of(usual, lambda s: s.pinned_bytes_per_s)),
        ("card to pinned", found.pinned_to_host_bytes_per_s, _of(usual, lambda s: s.pinned_bytes_per_s)),
        ("pageable to card", found.pageable_to_device_bytes_per_s, _of(usual, lambda s: s.to_device_bytes_per_s)),
        ("card to pageable", found.pageable_to_host_bytes_per_s, _of(usual, lambda s: s.to_host_bytes_per_s)),
        ("card's memory", found.memory_bytes_per_s, _of(usual, lambda s: s.memory_bytes_per_s)),
    ):
        yield _row(name, measured, assumed, _gigabytes)


def _computing(gpu: Gpu, found: Calibration, usual: Speeds | None, measured: Speeds | None) -> Iterator[Row]:
    assumed: float | None
    for dtype in ("float16", "bfloat16", "float32"):
        rate = measured.flop_per_s[dtype] if measured and dtype in found.products else None
        assumed = None if usual is None else usual.flop_per_s[dtype]
        yield _row(f"products, {dtype}", rate, assumed, _teraflops)
    half = resolve_auto(gpu.compute_capability or (0, 0))
    for width in (64, 128, 512):
        tokens = _WIDE_TOKENS if width == 512 else _TOKENS
        work = Work("attention", half, (1, 1, tokens, tokens, width, 1), 0)
        assumed = None if usual is None else 4 * tokens**2 * width / clock.work_seconds(work, usual)
        yield _row(f"attention, width {width}", found.attention_flop_per_s.get(str(width)), assumed, _teraflops)
    for dtype in (half, "float32"):
        rate = measured.convolution_flop_per_s.get(dtype) if measured else None
        assumed = None if usual is None else clock.convolution_rate(dtype, usual)
        yield _row(f"convolutions, {dtype}", rate, assumed, _teraflops)


def _of(speed: Speeds | None, ask: Callable[[Speeds], float]) -> float | None:
    return None if speed is None else ask(speed)


def _host(found: Calibration, usual: Speeds | None) -> Iterator[Row]:
    yield _row("starting an operator", found.launch_seconds, _of(usual, lambda s: s.launch_s), _moment)
    yield _row("fetching a tensor", found.fetch_seconds, _of(usual, lambda s: s.tensor_fetch_s), _moment)


def _row(name: str, measured: N | None, assumed: N | None, shown: Callable[[N], str]) -> Row:
    ratio = measured / assumed if measured and assumed else None
    return Row(
        name,
        "not measured" if measured is None else shown(measured),
        "not known" if assumed is None else shown(assumed),
        ratio,
    )


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _teraflops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOPS"


def _moment(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
