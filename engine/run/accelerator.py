"""The one place where `torch.cuda` is used to measure: a small adapter, so that measuring can be tried without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from engine.probe import nvml

if TYPE_CHECKING:
    from torch import Tensor


class Accelerator(Protocol):
    """What measuring needs of a device."""

    torch_device: str

    def now(self) -> float:
        """Return the seconds of a clock that never goes back."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long the device is busy with what `call` starts."""

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Return how long `call` takes to come back, the device being idle before it and not waited for after it."""

    def taken_bytes(self, call: Callable[[], object]) -> int:
        """Return the most bytes of the device that were taken during `call`, beside those taken before."""

    def free_bytes(self) -> int:
        """Return what a tensor can still take."""

    def release(self) -> None:
        """Give back what is only cached."""

    def pinned(self, size_bytes: int) -> Tensor:
        """Return pinned host memory."""

    def context_bytes(self) -> int | None:
        """Return what this process takes on the device beside tensors; None where that is not told."""

    def multiprocessors(self) -> int | None:
        """Return how many multiprocessors the device has."""


class Cuda:
    """The card that is CUDA's first, through torch; `free_before_bytes` is what was free before CUDA started on it.

    `is_alone` says that nobody else was seen to use the card: only then does free memory that went tell what we took.
    """

    torch_device = "cuda"

    def __init__(self, uuid: str, free_before_bytes: int | None, *, is_alone: bool) -> None:
        self._uuid = uuid
        self._free_before_bytes = free_before_bytes
        self._is_alone = is_alone

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, call: Callable[[], object]) -> float:
        from torch import cuda

        start, end = (cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def host_seconds(self, call: Callable[[], object]) -> float:
        from torch import cuda

        cuda.synchronize()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        cuda.synchronize()
        return taken

    def taken_bytes(self, call: Callable[[], object]) -> int:
        from torch import cuda

        self.release()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        result = call()
        cuda.synchronize()
        del result
        return int(cuda.max_memory_allocated() - before)

    def free_bytes(self) -> int:
        from torch import cuda

        self.release()
        return int(cuda.mem_get_info()[0])

    def release(self) -> None:
        from torch import cuda

        cuda.synchronize()
        cuda.empty_cache()

    def pinned(self, size_bytes: int) -> Tensor:
        import torch

        return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)

    def context_bytes(self) -> int | None:
        from torch import cuda

        self.release()
        reserved = int(cuda.memory_reserved())
        moment = nvml.moment(self._uuid)
        # In a container a process may be listed under the host's number, which can even be another's here.
        if moment.own_bytes is not None and moment.own_bytes > reserved:
            return moment.own_bytes - reserved
        if self._is_alone and self._free_before_bytes is not None and moment.free_bytes is not None:
            gone = self._free_before_bytes - moment.free_bytes - reserved
            return gone if gone > 0 else None
        return None

    def multiprocessors(self) -> int | None:
        from torch import cuda

        return int(cuda.get_device_properties(0).multi_processor_count)
