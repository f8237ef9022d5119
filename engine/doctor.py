"""What `dg-run doctor` shows: the machine, the libraries, and what is missing and how to get it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import paths, probe, versions
from engine.errors import HardwareError
from engine.facts import catalogue, embedded, hub
from engine.units import format_size


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at. A `fault` keeps things from working; a `note` is worth knowing."""

    section: str
    name: str
    state: Literal["ok", "note", "fault"]
    text: str


def examine() -> tuple[Line, ...]:
    """Return everything that was looked at, in the order it is shown."""
    return (*_machine(), *_libraries(), *_data())


def _machine() -> Iterator[Line]:
    yield Line("machine", "python", "ok", f"{sys.version.split()[0]} on {sys.platform}")
    try:
        seen = probe.snapshot()
    except HardwareError as error:
        yield Line("machine", "gpu", "fault", f"{error.what}: {error.why}; {error.do}")
        return
    host = seen.host
    if host.ram_bytes is None or host.total_ram_bytes is None:
        yield Line("machine", "host RAM", "note", "not known")
    else:
        yield Line(
            "machine",
            "host RAM",
            "ok",
            f"{format_size(host.ram_bytes)} available of {format_size(host.total_ram_bytes)}",
        )
    yield Line("machine", "cores", "ok", str(host.cores))
    for gpu in seen.gpus:
        free = "not known" if gpu.free_bytes is None else format_size(gpu.free_bytes)
        total = "not known" if gpu.total_bytes is None else format_size(gpu.total_bytes)
        yield Line(
            "machine", f"gpu {gpu.index}", "ok", f"{gpu.name}, compute capability {gpu.arch}, {free} free of {total}"
        )
    if not seen.gpus:
        yield Line("machine", "gpu", "note", f"none: {seen.no_gpu_because}; runs go to the CPU")


def _libraries() -> Iterator[Line]:
    for name in versions.TESTED:
        version = versions.installed(name)
        note = versions.note(name, version)
        state: Literal["ok", "note", "fault"] = "ok" if note is None else "note" if version else "fault"
        yield Line("libraries", name, state, f"{version or ''} {note or 'tested'}".strip())
    for name in versions.OTHERS:
        version = versions.installed(name)
        yield Line("libraries", name, "ok" if version else "fault", version or f"not installed: pip install {name}")
    for name, how in versions.OPTIONAL.items():
        version = versions.installed(name)
        yield Line("libraries", name, "ok", version or f"not installed, optional: {how}")


def _data() -> Iterator[Line]:
    model = embedded.model()
    yield Line("models", "embedded", "ok", f"{model.pipeline_class}, revision {model.revision}")
    yield Line("models", "catalogue", "ok", f"{len(catalogue.ids())} models known by name")
    cache = paths.hub_cache_dir()
    nearest = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    free = format_size(shutil.disk_usage(nearest).free)
    yield Line(
        "models", "hub cache", "ok", f"{_home(cache)}, {free} free on its disk{', offline' if hub.is_offline() else ''}"
    )


def _home(path: Path) -> str:
    """Return a path for a bug report: without the user's name."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
