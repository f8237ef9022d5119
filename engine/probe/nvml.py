"""NVIDIA cards through NVML (pynvml): their memory as it is, without a CUDA context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from engine.errors import HardwareError
from engine.values import Gpu

NO_DRIVER = "no NVIDIA driver was found"
HIDDEN = "CUDA_VISIBLE_DEVICES hides every card"


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    """Yield pynvml, initialised, and shut it down afterwards. Raises: pynvml's own errors."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Return the cards that a CUDA program started now would see, and why there are none if there are none.

    Raises: HardwareError, when a driver is there and does not answer as it should, or the variable names no card.
    """
    import pynvml

    try:
        with _session() as nvml:
            gpus = tuple(_gpu(nvml, i) for i in range(nvml.nvmlDeviceGetCount()))
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return (), NO_DRIVER
    except pynvml.NVMLError as error:
        raise HardwareError(
            "the NVIDIA driver does not answer",
            str(error),
            "run nvidia-smi to see what it says; `--device cpu` runs without the card",
        ) from None
    if not gpus:
        return (), "the NVIDIA driver is there, and no card is"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus, None
    left = visible(gpus, chosen)
    return left, None if left else HIDDEN


def visible(gpus: tuple[Gpu, ...], variable: str) -> tuple[Gpu, ...]:
    """Return the cards that a value of CUDA_VISIBLE_DEVICES leaves, in its order.

    As CUDA does: entries are indices or (beginnings of) UUIDs, and the list ends before the first that names no card.
    """
    chosen: list[Gpu] = []
    for entry in (e.strip() for e in variable.split(",")):
        if entry.isdecimal():
            found = [g for g in gpus if g.index == int(entry)]
        elif entry.startswith(("GPU-", "MIG-")):
            found = [g for g in gpus if g.uuid is not None and g.uuid.startswith(entry)]
        else:
            found = []
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return tuple(chosen)


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    total, free = _memory(nvml, handle)
    return Gpu(
        index=index,
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle)) or "unknown card",
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)),
        arch=_arch(_ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)),
        total_bytes=total,
        free_bytes=free,
        mig=_mig(nvml, handle),
    )


def _ask(nvml: Any, call: Any, handle: Any) -> Any:
    """Return an answer, or None where this card or this driver has none. A lost card raises."""
    unknown = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission)
    try:
        return call(handle)
    except unknown:
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _arch(capability: tuple[int, int] | None) -> str | None:
    return None if capability is None else f"{capability[0]}.{capability[1]}"


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """Return (total, free) bytes: by the second call, which knows what the driver keeps for itself, else the first."""
    memory = None
    if hasattr(nvml, "nvmlMemory_v2"):
        memory = _ask(nvml, lambda h: nvml.nvmlDeviceGetMemoryInfo(h, version=nvml.nvmlMemory_v2), handle)
    if memory is None:
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None or not memory.total:
        return None, None
    return int(memory.total), int(memory.free)


def _mig(nvml: Any, handle: Any) -> bool:
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
