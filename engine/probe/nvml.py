"""NVIDIA cards through NVML (pynvml): everything a decision needs, in one pass and without a CUDA context."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from engine.probe import faults
from engine.values import Driver, Fault, FrozenDict, Gpu, GpuProcess

NOT_TOLD = "this card does not tell"
_LOCK = threading.Lock()
_MAX_LINKS = 36
_WDDM, _TCC = 0, 1
_MEMORY_CLOCK, _SM_CLOCK = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What NVML told: every card (MIG instances in the place of a card that is cut into them), and what is broken."""

    gpus: tuple[Gpu, ...] = ()
    driver: Driver | None = None
    faults: tuple[Fault, ...] = ()
    nothing_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What moves on one card: None is not known. `busy_percent` is of the time a kernel ran, lately."""

    free_bytes: int | None = None
    own_bytes: int | None = None
    """What this process has on the card, context included."""
    busy_percent: int | None = None


def read() -> Reading:
    """Return the cards as they are now. Raises nothing: what does not work is in `faults`."""
    import pynvml

    with _LOCK:
        try:
            with _session(pynvml):
                return _read(pynvml)
        except pynvml.NVMLError as error:
            return _unread(pynvml, error)


def moment(uuid: str) -> Moment:
    """Return what moves on the card (or MIG instance) of this UUID. Raises nothing: what is not told is None."""
    import pynvml

    with _LOCK:
        try:
            with _session(pynvml):
                for asker in _askers(pynvml):
                    if _text(asker.ask("uuid", pynvml.nvmlDeviceGetUUID)) == uuid:
                        busy = asker.ask("busy_percent", pynvml.nvmlDeviceGetUtilizationRates)
                        return Moment(
                            free_bytes=_memory(pynvml, asker)["free_bytes"],
                            own_bytes=_used(pynvml, asker).get(os.getpid()),
                            busy_percent=None if busy is None else int(busy.gpu),
                        )
        except pynvml.NVMLError:
            pass
    return Moment()


def _askers(nvml: Any) -> Iterator[_Asker]:
    """Yield every card that can be asked, and every instance of one that is cut into them."""
    for index in range(nvml.nvmlDeviceGetCount()):
        with contextlib.suppress(nvml.NVMLError):
            card = _Asker(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            yield card
            yield from (_Asker(nvml, handle) for _, handle in _instances(nvml, card))


@contextlib.contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _unread(nvml: Any, error: Any) -> Reading:
    """Return what a driver that cannot be asked means: nothing here, or something broken."""
    fault: Fault | None
    if error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        fault = faults.without_library()
    elif error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        fault = faults.card_without_driver()
    else:
        fault = faults.of_code(error.value, str(error))
    if fault is None:
        return Reading(nothing_because=faults.NO_DRIVER)
    return Reading(faults=(fault,), nothing_because=fault.what)


def _read(nvml: Any) -> Reading:
    gpus: list[Gpu] = []
    broken: list[Fault] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus += _card(nvml, index)
        except nvml.NVMLError as error:
            broken.append(faults.of_code(error.value, str(error), index))
    nothing = None if gpus else broken[0].what if broken else faults.NO_GPU
    return Reading(gpus=tuple(gpus), driver=_driver(nvml), faults=tuple(broken), nothing_because=nothing)


def _driver(nvml: Any) -> Driver:
    version, cuda = None, None
    with contextlib.suppress(nvml.NVMLError):
        version = _text(nvml.nvmlSystemGetDriverVersion())
    with contextlib.suppress(nvml.NVMLError):
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        cuda = f"{number // 1000}.{number % 1000 // 10}"
    return Driver(version=version, cuda=cuda)


class _Asker:
    """Asks one card, and keeps the reason for everything that it does not tell. A lost card raises."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.unknown: dict[str, str] = {}
        self._reasons = {
            nvml.NVML_ERROR_NOT_SUPPORTED: NOT_TOLD,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "this driver is too old to tell",
            nvml.NVML_ERROR_NO_PERMISSION: "this user may not know",
            nvml.NVML_ERROR_NOT_FOUND: NOT_TOLD,
            nvml.NVML_ERROR_INVALID_ARGUMENT: NOT_TOLD,
        }

    def ask(self, field: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return the answer, or None and its reason under `field`."""
        try:
            return call(self.handle, *arguments)
        except self.nvml.NVMLError as error:
            if error.value not in self._reasons:
                raise
            self.unknown[field] = self._reasons[error.value]
        except UnicodeDecodeError:  # pynvml decodes names itself
            self.unknown[field] = "what this card tells is not text"
        return None


def _card(nvml: Any, index: int) -> list[Gpu]:
    """Return a card, or its MIG instances when it is cut into them."""
    asker = _Asker(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    mode = asker.ask("mig", nvml.nvmlDeviceGetMigMode)
    # Most cards have no such mode: that is an answer, and nothing that is not known.
    asker.unknown.pop("mig", None)
    whole = _gpu(nvml, asker, index)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return [whole]
    return [_instance(nvml, handle, n, whole) for n, handle in _instances(nvml, asker)]


def _instances(nvml: Any, card: _Asker) -> Iterator[tuple[int, Any]]:
    for n in range(card.ask("mig", nvml.nvmlDeviceGetMaxMigDeviceCount) or 0):
        with contextlib.suppress(nvml.NVMLError_NotFound):
            yield n, nvml.nvmlDeviceGetMigDeviceHandleByIndex(card.handle, n)


def _instance(nvml: Any, handle: Any, number: int, whole: Gpu) -> Gpu:
    """Return a MIG instance: its own memory, its card's everything else."""
    asker = _Asker(nvml, handle)
    memory = _memory(nvml, asker)
    name = _text(asker.ask("name", nvml.nvmlDeviceGetName))
    return dataclasses.replace(
        whole,
        name=name or f"{whole.name} MIG",
        uuid=_text(asker.ask("uuid", nvml.nvmlDeviceGetUUID)),
        mig=True,
        mig_instance=number,
        processes=_processes(nvml, asker),
        # An instance has a share of the card's cores; which share is told in ways that differ by driver.
        cores=None,
        unknown=FrozenDict({**whole.unknown, **asker.unknown, "cores": "a MIG instance has a part of its card's"}),
        **memory,
    )


def _gpu(nvml: Any, asker: _Asker, index: int) -> Gpu:
    capability = asker.ask("arch", nvml.nvmlDeviceGetCudaComputeCapability)
    display = asker.ask("display_active", nvml.nvmlDeviceGetDisplayActive)
    memory = _memory(nvml, asker)
    found: dict[str, Any] = {
        "name": _text(asker.ask("name", nvml.nvmlDeviceGetName)) or "unknown card",
        "uuid": _text(asker.ask("uuid", nvml.nvmlDeviceGetUUID)),
        "arch": None if capability is None else f"{capability[0]}.{capability[1]}",
        "driver_model": _driver_model(nvml, asker),
        "display_active": None if display is None else bool(display),
        "pcie_generation": asker.ask("pcie_generation", nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        "pcie_width": asker.ask("pcie_width", nvml.nvmlDeviceGetCurrPcieLinkWidth),
        "nvlink_links": _links(nvml, asker),
        "cores": asker.ask("cores", nvml.nvmlDeviceGetNumGpuCores),
        "sm_clock_mhz": asker.ask("sm_clock_mhz", nvml.nvmlDeviceGetMaxClockInfo, _SM_CLOCK),
        "memory_clock_mhz": asker.ask("memory_clock_mhz", nvml.nvmlDeviceGetMaxClockInfo, _MEMORY_CLOCK),
        "memory_bus_bits": asker.ask("memory_bus_bits", nvml.nvmlDeviceGetMemoryBusWidth),
        "processes": _processes(nvml, asker),
    }
    return Gpu(index=index, unknown=FrozenDict(asker.unknown), **found, **memory)


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _memory(nvml: Any, asker: _Asker) -> dict[str, Any]:
    """Return the four sizes: by the second call, which tells what the driver keeps for itself, else by the first."""
    memory = None
    if hasattr(nvml, "nvmlMemory_v2"):
        memory = asker.ask("reserved_bytes", nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlMemory_v2)
    reserved = None if memory is None else int(memory.reserved)
    if memory is None:
        memory = asker.ask("total_bytes", nvml.nvmlDeviceGetMemoryInfo)
    if memory is None or not memory.total:
        for name in ("total_bytes", "free_bytes", "used_bytes", "reserved_bytes"):
            asker.unknown.setdefault(name, NOT_TOLD)
        return {"total_bytes": None, "free_bytes": None, "used_bytes": None, "reserved_bytes": None}
    return {
        "total_bytes": int(memory.total),
        "free_bytes": int(memory.free),
        "used_bytes": int(memory.used),
        "reserved_bytes": reserved,
    }


def _driver_model(nvml: Any, asker: _Asker) -> str | None:
    """Return "WDDM" or "TCC" on Windows; elsewhere there is no such thing, which is nothing unknown."""
    model = asker.ask("driver_model", nvml.nvmlDeviceGetDriverModel)
    asker.unknown.pop("driver_model", None)
    return None if model is None else {_WDDM: "WDDM", _TCC: "TCC"}.get(model[0], f"model {model[0]}")


def _links(nvml: Any, asker: _Asker) -> int | None:
    """Return how many NVLink links are up; 0 on a card that has none."""
    up = 0
    for link in range(_MAX_LINKS):
        state = asker.ask("nvlink_links", nvml.nvmlDeviceGetNvLinkState, link)
        if state is None:
            break
        up += bool(state)
    reason = asker.unknown.pop("nvlink_links", None)
    if reason not in (None, NOT_TOLD):
        asker.unknown["nvlink_links"] = reason
        return None
    return up


def _processes(nvml: Any, asker: _Asker) -> tuple[GpuProcess, ...]:
    """Return the other processes on the card, the largest first."""
    used = _used(nvml, asker)
    used.pop(os.getpid(), None)
    found = [GpuProcess(pid=pid, name=_process_name(nvml, pid), used_bytes=size) for pid, size in used.items()]
    return tuple(sorted(found, key=lambda p: (-(p.used_bytes or 0), p.pid)))


def _used(nvml: Any, asker: _Asker) -> dict[int, int | None]:
    """Return what each process has on the card."""
    used: dict[int, int | None] = {}
    # By their versions: the unversioned names raise something of their own where the driver is too old for them.
    for call in (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3):
        for process in asker.ask("processes", call) or ():
            used[process.pid] = process.usedGpuMemory
    return used


def _process_name(nvml: Any, pid: int) -> str | None:
    try:
        path = _text(nvml.nvmlSystemGetProcessName(pid))
    except (nvml.NVMLError, UnicodeDecodeError):
        return None
    # PureWindowsPath splits at both kinds of slash; a folder can hold a user's name, and is left out.
    return PureWindowsPath(path).name or None if path else None
