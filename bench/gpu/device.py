"""What the harness asks of a device, in one place: CUDA's, or in dry mode the one that counts bytes on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import HardwareError

CUDA, COUNTED = "cuda", "counted"


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most bytes since the last reset: in live tensors, and held by the allocator."""

    allocated_bytes: int
    reserved_bytes: int


class Device:
    """One device. `kind` is torch's name for it."""

    def __init__(self, kind: str, module: Any) -> None:
        self.kind = kind
        self._module = module

    @property
    def is_card(self) -> bool:
        return self.kind == CUDA

    @property
    def block_bytes(self) -> int:
        """What the allocator rounds a tensor up to."""
        return 512 if self.is_card else 1

    def synchronize(self) -> None:
        self._module.synchronize()

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def allocated_bytes(self) -> int:
        return int(self._module.memory_allocated())

    def reserved_bytes(self) -> int:
        return int(self._module.memory_reserved())

    def peaks(self) -> Peaks:
        return Peaks(int(self._module.max_memory_allocated()), int(self._module.max_memory_reserved()))

    def reset_peaks(self) -> None:
        self._module.reset_peak_memory_stats()

    def free_and_total_bytes(self) -> tuple[int, int]:
        free, total = self._module.mem_get_info()
        return int(free), int(total)

    def pinned_bytes(self) -> int | None:
        """Return the most host memory that was pinned, as the pinning allocator rounds it; None where nobody counts."""
        if self.is_card:
            told = self._module.host_memory_stats()
            return int(told["allocated_bytes.peak"]) if "allocated_bytes.peak" in told else None if told else 0
        stats = getattr(self._module, "stats", None)
        return None if stats is None else stats().get("pinned_peak")

    def stamp(self) -> Any:
        """Return a moment on the device: an event of CUDA's, which costs no waiting, else the clock's time."""
        if not self.is_card:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two stamps. The device must have passed both (`synchronize`)."""
        return float(start.elapsed_time(end)) / 1000 if self.is_card else float(end - start)

    @contextlib.contextmanager
    def capped(self, most_bytes: int | None, card_bytes: int | None = None) -> Iterator[None]:
        """Let the allocator hold no more than `most_bytes`, and a card look as if it had `card_bytes` in all.

        The first is PyTorch's own limit (`set_per_process_memory_fraction`). The second is for libraries that read a
        card's size to decide what they keep on it.
        """
        if most_bytes is None:
            yield
            return
        _, total = self.free_and_total_bytes()
        if self.is_card:
            self._module.set_per_process_memory_fraction(min(1.0, most_bytes / total))
        else:
            self._module.set_capacity(most_bytes)
        try:
            with self._looking_like(card_bytes) if self.is_card and card_bytes else contextlib.nullcontext():
                yield
        finally:
            if self.is_card:
                self._module.set_per_process_memory_fraction(1.0)
            else:
                self._module.set_capacity(None)

    @contextlib.contextmanager
    def _looking_like(self, card_bytes: int) -> Iterator[None]:
        module = self._module
        real_info, real_properties = module.mem_get_info, module.get_device_properties
        before = real_info()[0]

        def info(*where: Any, **named: Any) -> tuple[int, int]:
            return max(0, card_bytes - max(0, before - real_info(*where, **named)[0])), card_bytes

        def properties(*where: Any, **named: Any) -> _Smaller:
            return _Smaller(real_properties(*where, **named), card_bytes)

        module.mem_get_info, module.get_device_properties = info, properties
        try:
            yield
        finally:
            module.mem_get_info, module.get_device_properties = real_info, real_properties

    def description(self) -> dict[str, Any]:
        """Return what torch says of the device and of itself."""
        import torch

        told: dict[str, Any] = {"device": self.kind, "torch": torch.__version__}
        if self.is_card:
            properties = self._module.get_device_properties(0)
            told |= {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": int(properties.total_memory),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
                "allocator": self._module.get_allocator_backend(),
            }
        return told


class _Smaller:
    """A card's properties, with another size."""

    def __init__(self, real: Any, total_bytes: int) -> None:
        self._real = real
        self.total_memory = total_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def opened(*, dry: bool) -> Device:
    """Return the device to measure on. Raises: HardwareError, when it is not there."""
    import torch

    if dry:
        return Device(COUNTED, _counted())
    if not torch.cuda.is_available():
        raise HardwareError(
            "torch cannot use a card here",
            f"torch {torch.__version__} starts CUDA on none",
            "install a torch built for CUDA on a machine with an NVIDIA driver, or try the harness with --dry",
        )
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return Device(CUDA, torch.cuda)


def _counted() -> Any:
    import torch

    try:
        counted = importlib.import_module("truth.device")
    except ImportError as error:
        raise HardwareError(
            "the device that counts bytes is not here",
            f"truth.device cannot be imported ({error}), and dry mode runs on it",
            "run from a checkout of the repository, or from a folder that `pack` wrote",
        ) from None
    counted.load()
    return torch.get_device_module(COUNTED)
