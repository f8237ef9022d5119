"""What `dg-run doctor` shows: the machine, the libraries, and what is missing and how to get it."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import calibration, gpus, history, paths, versions
from engine.calibration import Calibration
from engine.facts import catalogue, embedded, hub
from engine.gpus import Rates
from engine.history import Summary
from engine.units import format_size
from engine.values import Driver, Gpu, GpuProcess, Hardware
from engine.words import listing

State = Literal["ok", "note", "fault"]
_LEAST_FREE_BYTES = 10 * 2**30
_SECONDS_OFF, _BYTES_OFF = 0.15, 0.03
"""From where on a systematic error is worth a word."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at. A `fault` keeps things from working; a `note` is worth knowing."""

    section: str
    name: str
    state: State
    text: str


def examine(seen: Hardware) -> tuple[Line, ...]:
    """Return everything that was looked at, in the order it is shown."""
    return (*_machine(seen), *_cards(seen), *_libraries(), *_models(seen))


def _machine(seen: Hardware) -> Iterator[Line]:
    host = seen.host
    system = f"{platform.system()} {platform.release()}{' (WSL)' if 'microsoft' in platform.release().lower() else ''}"
    yield Line("machine", "system", "ok", f"{system}, {platform.machine()}, Python {sys.version.split()[0]}")
    if host.ram_bytes is None or host.total_ram_bytes is None:
        yield Line("machine", "host RAM", "note", "not known")
    else:
        swap = "" if host.swap_free_bytes is None else f", {format_size(host.swap_free_bytes)} of swap free"
        total = format_size(host.total_ram_bytes)
        yield Line("machine", "host RAM", "ok", f"{format_size(host.ram_bytes)} available of {total}{swap}")
    yield Line("machine", "cores", "ok", str(host.cores))
    if host.output_disk_free_bytes is not None:
        yield Line("machine", "output disk", "ok", f"{format_size(host.output_disk_free_bytes)} free in this directory")


def _cards(seen: Hardware) -> Iterator[Line]:
    if seen.driver is not None:
        yield Line("cards", "driver", "ok", f"{seen.driver.version or 'not known'}, runs CUDA up to {seen.driver.cuda}")
    for gpu in seen.gpus:
        label = f"card {gpu.index}" + (f".{gpu.mig_instance}" if gpu.mig else "")
        yield Line("cards", label, "ok", "\n".join(_card(gpu)))
        yield from _learnt(label, gpu, seen.driver)
    for fault in seen.faults:
        label = "driver" if fault.index is None else f"card {fault.index}"
        yield Line("cards", label, "fault", f"{fault.what}\nwhy: {fault.why}\ndo:  {fault.do}")
    for note in seen.notes:
        yield Line("cards", "note", "note", note)
    if not seen.gpus and not seen.faults:
        yield Line("cards", "none", "note", f"{seen.no_gpu_because}; runs go to the CPU")


def _card(gpu: Gpu) -> Iterator[str]:
    """Yield the lines about one card: what it is, its memory, its links, who uses it, what it computes."""
    yield ", ".join(
        [gpu.name, f"compute capability {gpu.arch or 'not known'}", short_uuid(gpu.uuid) or "UUID not known"]
        + (["MIG instance"] if gpu.mig else [])
        + (["shares the host's memory"] if gpu.unified_memory else [])
    )
    yield _memory(gpu)
    yield _links(gpu)
    if gpu.processes:
        yield "used by " + listing(map(_process, gpu.processes[:4])) + _more(len(gpu.processes) - 4)
    found = gpus.rates(gpu)
    yield "rates not known" if found is None else _rates(found)
    if gpu.unknown:
        reasons = {r: [n for n, why in gpu.unknown.items() if why == r] for r in gpu.unknown.values()}
        yield "not known: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())


def _learnt(label: str, gpu: Gpu, driver: Driver | None) -> Iterator[Line]:
    """Yield what was measured of a card, and what its runs say of its predictions."""
    if gpu.uuid is None:
        return
    found = calibration.find(gpu, driver)
    measured = found.calibration
    if measured is None:
        told = found.dropped or "none: plans use published rates; `dg-run calibrate` measures this card in a minute"
        yield Line("cards", f"{label}: measured", "note" if found.dropped else "ok", told)
    else:
        state: State = "note" if measured.disturbed or measured.missing else "ok"
        yield Line("cards", f"{label}: measured", state, _measured(measured))
    runs = history.comparable(gpu, driver, measured)
    others = len(history.read(gpu.uuid)) - len(runs)
    if runs or others:
        yield _remembered(f"{label}: runs", history.summary(runs), others, is_calibrated=measured is not None)


def _measured(found: Calibration) -> str:
    told = f"on {found.when[:10]}, in {found.took_seconds:.0f} s"
    if found.disturbed:
        told += f"; another program computed on it meanwhile: {calibration.AGAIN} when none does"
    if found.missing:
        told += f"; not measured: {listing(found.missing)}"
    return told


def _remembered(name: str, runs: Summary, others: int, *, is_calibrated: bool) -> Line:
    """Return how far predictions were off, and what would help."""
    parts = [f"{runs.runs} remembered, {runs.kinds} of them different"]
    if others:
        parts.append(f"and {others} of other versions or calibrations, which do not count")
    if runs.out_of_memory:
        parts.append(f"{runs.out_of_memory} ran out of memory")
    spans = [
        f"{what} {ratios.low:.2f} to {ratios.high:.2f} of predicted, median {ratios.median:.3f}"
        for what, ratios in (("measured peaks", runs.bytes), ("seconds", runs.seconds))
        if ratios is not None
    ]
    state: State = "ok"
    told = "\n".join([", ".join(parts), *spans])
    if runs.seconds is not None and abs(math.log(runs.seconds.median)) > math.log1p(_SECONDS_OFF):
        state = "note"
        again = "calibrate again when nothing else computes on it" if is_calibrated else "calibrate this card"
        told += f"\nseconds are off: {again} (`dg-run calibrate`)"
    if runs.bytes is not None and abs(runs.bytes.median - 1) > _BYTES_OFF:
        state = "note"
        told += "\npeaks are off: please report it, with the output of `dg-run plan --json`"
    return Line("cards", name, state, told)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _process(process: GpuProcess) -> str:
    size = "" if process.used_bytes is None else f" with {format_size(process.used_bytes)}"
    return f"{process.name or 'a process'} ({process.pid}){size}"


def _memory(gpu: Gpu) -> str:
    if gpu.total_bytes is None or gpu.free_bytes is None:
        return "memory not known"
    parts = [f"{format_size(gpu.free_bytes)} free of {format_size(gpu.total_bytes)}"]
    if gpu.used_bytes is not None:
        parts.append(f"{format_size(gpu.used_bytes)} used")
    if gpu.reserved_bytes is not None:
        parts.append(f"{format_size(gpu.reserved_bytes)} kept by the driver")
    if gpu.display_active is not None:
        parts.append("a display is attached" if gpu.display_active else "no display")
    return ", ".join(parts)


def _links(gpu: Gpu) -> str:
    if gpu.pcie_generation is None or gpu.pcie_width is None:
        link = "PCIe link not known"
    else:
        link = f"PCIe {gpu.pcie_generation} x{gpu.pcie_width}"
    if gpu.nvlink_links:
        link += f", {gpu.nvlink_links} NVLink links"
    return link + (f", driver model {gpu.driver_model}" if gpu.driver_model else "")


def _rates(found: Rates) -> str:
    named = {
        "fp32": found.fp32_flop_per_s,
        "tf32": found.tf32_flop_per_s,
        "fp16": found.fp16_flop_per_s,
        "bf16": found.bf16_flop_per_s,
        "fp8": found.fp8_flop_per_s,
    }
    parts = [f"{kind} {rate / 1e12:.4g}" for kind, rate in named.items() if rate is not None]
    memory = "" if found.memory_bytes_per_s is None else f", memory {found.memory_bytes_per_s / 1e9:.4g} GB/s"
    link = "" if found.link_bytes_per_s is None else f", link {found.link_bytes_per_s / 1e9:.3g} GB/s"
    origin = "" if found.basis.startswith("table") else f" ({found.basis})"
    return f"at best {', '.join(parts)} TFLOPS{memory}{link}{origin}"


def short_uuid(uuid: str | None) -> str | None:
    """Return enough of a UUID to tell cards apart (and for CUDA_VISIBLE_DEVICES), and not the whole of it."""
    return None if uuid is None else uuid[:12]


def _libraries() -> Iterator[Line]:
    for name in versions.TESTED:
        version = versions.installed(name)
        note = versions.note(name, version)
        state: State = "ok" if note is None else "note" if version else "fault"
        yield Line("libraries", name, state, f"{version or ''} {note or 'tested'}".strip())
    for name in versions.OTHERS:
        version = versions.installed(name)
        yield Line("libraries", name, "ok" if version else "fault", version or f"not installed: pip install {name}")
    for name, how in versions.OPTIONAL.items():
        version = versions.installed(name)
        yield Line("libraries", name, "ok", version or f"not installed, optional: {how}")


def _models(seen: Hardware) -> Iterator[Line]:
    model = embedded.model()
    yield Line("models", "embedded", "ok", f"{model.pipeline_class}, revision {model.revision}")
    yield Line("models", "catalogue", "ok", f"{len(catalogue.ids())} models known by name")
    free = seen.host.model_disk_free_bytes
    where = _home(paths.hub_cache_dir())
    offline = ", offline (HF_HUB_OFFLINE)" if hub.is_offline() else ""
    if free is None:
        yield Line("models", "hub cache", "note", f"{where}; what is free on its disk is not known{offline}")
    else:
        state: State = "ok" if free >= _LEAST_FREE_BYTES else "note"
        short = "" if state == "ok" else ": large models are 10 to 60 GiB; HF_HOME names another place"
        yield Line("models", "hub cache", state, f"{where}, {format_size(free)} free on its disk{offline}{short}")


def _home(path: Path) -> str:
    """Return a path for a bug report: without the user's name."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
