"""What the harness asks of a device, in one place: of CUDA's, or in dry mode of the one that counts bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import HardwareError

CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most bytes since the last reset: in live tensors, and held by the allocator."""

    allocated_bytes: int
    reserved_bytes: int


class Device:
    """One device, by the names that torch's modules of devices have in common. `kind` is torch's name for it."""

    is_card = False
    block_bytes = 1
    """What the allocator rounds a tensor up to."""

    def __init__(self, kind: str, module: Any) -> None:
        self.kind = kind
        self._module = module

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

    def pinned_bytes(self) -> int | None:
        """Return the most host memory that was pinned, as the pinning allocator rounds it; None where nobody counts."""
        return None

    def capability(self) -> tuple[int, int] | None:
        """Return the compute capability; None where there is none."""
        return None

    def stamp(self) -> Any:
        """Return a moment on the device. It costs no waiting."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two stamps. The device must have passed both (`synchronize`)."""
        return float(end - start)

    @contextlib.contextmanager
    def capped(self, most_bytes: int | None, card_bytes: int | None = None) -> Iterator[None]:
        """Let the allocator hold no more than `most_bytes`, and a card look as if it had `card_bytes` in all."""
        if most_bytes is None:
            yield
            return
        self._cap(most_bytes)
        try:
            with contextlib.nullcontext() if card_bytes is None else self._looking_like(card_bytes):
                yield
        finally:
            self._cap(None)

    def _cap(self, most_bytes: int | None) -> None:
        raise NotImplementedError

    def _looking_like(self, card_bytes: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def description(self) -> dict[str, Any]:
        """Return what torch says of the device and of itself."""
        import torch

        return {"device": self.kind, "torch": torch.__version__}


class Cuda(Device):
    """A card, by `torch.cuda`."""

    is_card = True
    block_bytes = 512

    def pinned_bytes(self) -> int | None:
        told = self._module.host_memory_stats()
        return int(told["allocated_bytes.peak"]) if "allocated_bytes.peak" in told else None if told else 0

    def capability(self) -> tuple[int, int] | None:
        major, minor = self._module.get_device_capability()
        return int(major), int(minor)

    def stamp(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def _cap(self, most_bytes: int | None) -> None:
        """PyTorch's own limit: the CUDA context does not count in it."""
        _, total = self._module.mem_get_info()
        self._module.set_per_process_memory_fraction(1.0 if most_bytes is None else min(1.0, most_bytes / total))

    @contextlib.contextmanager
    def _looking_like(self, card_bytes: int) -> Iterator[None]:
        """For libraries that read a card's size to decide what they keep on it."""
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
        import torch

        properties = self._module.get_device_properties(0)
        return super().description() | {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "total_bytes": int(properties.total_memory),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "allocator": self._module.get_allocator_backend(),
        }


class _Smaller:
    """A card's properties, with another size."""

    def __init__(self, real: Any, total_bytes: int) -> None:
        self._real = real
        self.total_memory = total_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Counted(Device):
    """The device that counts bytes on the CPU; `operators` are its own, `torch.ops.counted`."""

    def __init__(self, kind: str, module: Any, operators: Any, counts: Any) -> None:
        super().__init__(kind, module)
        self._operators = operators
        self._counts = counts

    def pinned_bytes(self) -> int | None:
        return int(self._counts().pinned_peak_bytes)

    def _cap(self, most_bytes: int | None) -> None:
        self._operators.set_capacity(-1 if most_bytes is None else most_bytes)


def opened(*, dry: bool) -> Device:
    """Return the device to measure on. Raises: HardwareError, when it is not there."""
    import torch

    if dry:
        return _counted()
    if not torch.cuda.is_available():
        raise HardwareError(
            "torch cannot use a card here",
            f"torch {torch.__version__} starts CUDA on none",
            "install a torch built for CUDA on a machine with an NVIDIA driver, or try the harness with --dry",
        )
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return Cuda(CUDA, torch.cuda)


def _counted() -> Device:
    import torch

    try:
        from truth import device as counted
    except ImportError as error:
        raise HardwareError(
            "the device that counts bytes is not here",
            f"truth.device cannot be imported ({error}), and dry mode runs on it",
            "run from a checkout of the repository, or from a folder that `pack` wrote",
        ) from None
    try:
        module = counted.load()
    except (RuntimeError, OSError) as error:
        raise HardwareError(
            "the device that counts bytes cannot be built",
            " ".join(str(error).split())[-300:],
            "install a C++ compiler and ninja (pip install ninja)",
        ) from None
    return Counted(counted.NAME, module, torch.ops.counted, counted.counts)
