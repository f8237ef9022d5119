"""A machine with any cards: a small libnvidia-ml.so.1, compiled from C, whose answers come from a YAML topology.

The real pynvml runs against it. A topology is a file in `tests/topologies/`:

    driver: {version: "580.65.06", cuda: 13000}     # or {error: 18}: nvmlInit fails
    cards:
      - name: NVIDIA GeForce RTX 4090
        uuid: GPU-…
        capability: 8 9
        memory_mib: {total: 24564, reserved: 421, used: 310}     # free is what is left
        pcie: {generation: 4, width: 16}
        cores: 16384
        clocks_mhz: {sm: 2520, memory: 10501}
        bus_bits: 384
        display: 1
        driver_model: 0                              # 0 WDDM, 1 TCC
        nvlink: 12                                   # links that are up
        busy: 97                                     # per cent of the time that a kernel runs
        processes: {4242: [/usr/bin/blender, 310]}   # MiB
        mig: [{name: …, uuid: MIG-…, memory_mib: …}]
        errors: {nvmlDeviceGetName: 15}              # any function, NVML's error code
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TOPOLOGIES = HERE.parent / "topologies"
MIB = 1024**2
NOT_AVAILABLE = 2**64 - 1


def compile_stub(folder: Path, *, old: bool = False) -> Path:
    """Compile the library into `folder` and return its path; `old` leaves out what drivers before 510 lack."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    flags = ["-DOLD_DRIVER"] if old else []
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *flags, "-o", library, HERE / "nvml_stub.c"],
        check=True,
    )
    return library


def topology(name: str) -> dict[str, Any]:
    """Return a committed topology by its file's stem."""
    loaded: dict[str, Any] = yaml.safe_load((TOPOLOGIES / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def lines(told: dict[str, Any]) -> str:
    """Return a topology as the stub reads it."""
    driver, cards = told.get("driver", {}), told.get("cards", [])
    sys = {
        "nvmlSystemGetDriverVersion": driver.get("version", "580.65.06"),
        "nvmlSystemGetCudaDriverVersion": driver.get("cuda", 13000),
        "nvmlDeviceGetCount": driver.get("count", len(cards)),
    }
    if "error" in driver:
        sys["nvmlInit"] = f"!{driver['error']}"
    rows = {f"sys.{k}": v for k, v in sys.items()}
    for index, card in enumerate(cards):
        rows |= _card(f"d{index}", card)
    return "".join(f"{k}={v}\n" for k, v in rows.items())


def memory(told: dict[str, int]) -> str:
    """Return "total reserved used free" in bytes."""
    free = told.get("free", told["total"] - told.get("reserved", 0) - told.get("used", 0))
    return " ".join(str(n * MIB) for n in (told["total"], told.get("reserved", 0), told.get("used", 0), free))


def _used(size_mib: int | None) -> int:
    """Return what NVML tells of a process's use; under WDDM it tells "not available", which is a number too."""
    return NOT_AVAILABLE if size_mib is None else size_mib * MIB


def _card(scope: str, card: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}

    def put(function: str, value: Any) -> None:
        if value is not None:
            rows[f"{scope}.{function}"] = value

    put("nvmlDeviceGetName", card.get("name"))
    put("nvmlDeviceGetUUID", card.get("uuid"))
    put("nvmlDeviceGetCudaComputeCapability", card.get("capability"))
    if "memory_mib" in card:
        put("memory", memory(card["memory_mib"]))
    put("nvmlDeviceGetMaxPcieLinkGeneration", card.get("pcie", {}).get("generation"))
    put("nvmlDeviceGetCurrPcieLinkWidth", card.get("pcie", {}).get("width"))
    put("nvmlDeviceGetNumGpuCores", card.get("cores"))
    put("nvmlDeviceGetMaxClockInfo.sm", card.get("clocks_mhz", {}).get("sm"))
    put("nvmlDeviceGetMaxClockInfo.mem", card.get("clocks_mhz", {}).get("memory"))
    put("nvmlDeviceGetMemoryBusWidth", card.get("bus_bits"))
    if "busy" in card:
        put("nvmlDeviceGetUtilizationRates", f"{card['busy']} 0")
    put("nvmlDeviceGetDisplayActive", card.get("display"))
    if "driver_model" in card:
        put("nvmlDeviceGetDriverModel_v2", f"{card['driver_model']} {card['driver_model']}")
    for link in range(card.get("nvlink", 0)):
        put(f"nvmlDeviceGetNvLinkState.{link}", 1)
    processes = card.get("processes", {})
    if processes:
        put("computeProcesses", " ".join(f"{pid} {_used(size)}" for pid, (_, size) in processes.items()))
        rows |= {f"sys.nvmlSystemGetProcessName.{pid}": name for pid, (name, _) in processes.items() if name}
    if "mig" in card:
        put("nvmlDeviceGetMigMode", "1 1")
        put("nvmlDeviceGetMaxMigDeviceCount", 7)
        put("migDevices", len(card["mig"]))
        for number, instance in enumerate(card["mig"]):
            rows |= _card(f"{scope}.m{number}", instance)
    for function, code in card.get("errors", {}).items():
        put(function, f"!{code}")
    return rows | {f"{scope}.{k}": v for k, v in card.get("raw", {}).items()}
