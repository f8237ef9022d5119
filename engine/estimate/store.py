"""Where traces come from: this process, the cache on disk, those that are shipped, and last a dry run.

A trace is known by its content: the model's configurations, the sizes, the dtype, the libraries' versions. What was
estimated from it is kept beside it, so that asking again reads one small file. Files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import paths, versions
from engine.estimate.dryrunner import DryRunner
from engine.facts.model import Component, Model
from engine.files import write
from engine.values import Estimate, Gpu, HostBytes, Interval, Phase, Request, Step

if TYPE_CHECKING:
    from engine.estimate.trace import Trace

# An answer that was given before needs no trace: what reads and replays one is imported when it does.

_SHIPPED = Path(__file__).parent / "shipped"
_PACKAGE = Path(__file__).parents[1]
# What a trace depends on, and what an answer from it does: changed code makes neither old nor wrong ones live on.
_TRACING = ("estimate/trace.py", "estimate/tracefile.py", "dryrun/*.py", "optimizers/*.py")
_ANSWERING = ("estimate/*.py", "gpus/*.json")
_LIBRARIES = ("torch", "diffusers", "transformers")
_KEPT_IN_MEMORY = 4
SHIPPED_SIDES_PX = (512, 1024)
"""Sides of the square pictures that traces are shipped for, beside each model's own size."""
_dry = DryRunner()
# What is known of a component's weights as they lie on disk: no matter to a run that has none.
_OF_FILES = ("stored_dtype", "variants")


def key(model: Model, request: Request, dtype: str, changes: Sequence[Step] = ()) -> str:
    """Return what a trace is known by: a hash of all that it depends on but the code that makes it.

    `changes` are the steps that change what is computed, in their order.
    """
    content: dict[str, Any] = {
        "pipeline": model.pipeline_class,
        "components": {n: _configured(c) for n, c in model.components.items()},
        "sizes": [request.height, request.width, request.frames, request.batch],
        "guidance": request.guidance,
        "call": dict(request.call),
        "dtype": dtype,
        "libraries": _library_versions(),
    }
    if changes:
        content["changes"] = [[s.name, dict(s.params)] for s in changes]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _configured(component: Component) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(component).items() if k not in _OF_FILES}


@functools.cache
def _library_versions() -> dict[str, str]:
    """Return the installed versions without local parts; where a library is absent, the one that is tested with."""
    return {name: (versions.installed(name) or versions.TESTED[name].low).partition("+")[0] for name in _LIBRARIES}


@functools.cache
def _fingerprint(patterns: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for path in sorted(p for pattern in patterns for p in _PACKAGE.glob(pattern)):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def can_trace() -> bool:
    """Whether the libraries that a dry run needs are installed. Imports none of them."""
    return all(importlib.util.find_spec(name) is not None for name in _LIBRARIES)


@functools.lru_cache(maxsize=_KEPT_IN_MEMORY)
def _read(path: Path, stamp: float) -> Trace | None:
    from engine.estimate import tracefile

    try:
        return tracefile.load(path.read_bytes())
    except (OSError, tracefile.BadTrace):
        return None


def _stored(path: Path) -> Trace | None:
    try:
        stamp = path.stat().st_mtime
    except OSError:
        return None
    return _read(path, stamp)


def known(wanted: str) -> Trace | None:
    """Return the trace of this key from the cache, or the shipped one; None where there is neither."""
    return _stored(_cached_path(wanted)) or _stored(shipped_path(wanted))


def shipped_path(wanted: str) -> Path:
    """Return where a shipped trace of this key is, or would be."""
    return _SHIPPED / f"{wanted}.trace"


def _cached_path(wanted: str) -> Path:
    return paths.cache_dir() / "traces" / f"{wanted}-{_fingerprint(_TRACING)}.trace"


def find(
    model: Model,
    request: Request,
    dtype: str,
    changes: Sequence[Step] = (),
    told: Callable[[str], None] | None = None,
    *,
    is_plain: bool = False,
) -> Trace | None:
    """Return the trace of a request: a known one, else from a dry run; None where no dry run can be made here.

    `told` is given a line before a dry run. `is_plain` does without the other ways through the VAE, which take most of
    the time where a video is decoded in tiles. Raises: ModelError, UsageError, IncompatibleError.
    """
    wanted = key(model, request, dtype, changes)
    found = known(wanted) or (known(f"{wanted}-plain") if is_plain else None)
    if found is not None or not can_trace():
        return found
    if told is not None:
        told(f"dry run of {model.id} (once for each size; some seconds, no weights)")
    from engine.estimate import tracefile

    made = _dry.trace(model, request, dtype, changes, is_plain=is_plain)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write(_cached_path(f"{wanted}-plain" if is_plain else wanted), made)
    return tracefile.load(made)


def case(
    steps: Sequence[Step],
    gpu: Gpu,
    request: Request,
    stored: Mapping[str, str | None],
    calibration: str | None = None,
) -> str:
    """Return what an estimate from one trace is known by; `calibration` is the digest of its card's."""
    content = [
        [[s.name, dict(s.params)] for s in steps],
        [gpu.name, gpu.arch, gpu.total_bytes, gpu.pcie_generation, gpu.pcie_width, gpu.mig],
        [gpu.cores, gpu.sm_clock_mhz, gpu.memory_clock_mhz, gpu.memory_bus_bits],
        request.steps,
        sorted(request.components),
        dict(stored),
        versions.torch(),
        versions.cudnn(),
        calibration,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Answers:
    """The estimates that were made from one trace, kept on disk as one small file."""

    def __init__(self, wanted: str) -> None:
        self._path = paths.cache_dir() / "estimates" / f"{wanted}-{_fingerprint((*_TRACING, *_ANSWERING))}.json"
        self._new: dict[str, Any] = {}
        self._old = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def get(self, name: str) -> Estimate | None:
        """Return an estimate that was made before."""
        found = self._new.get(name) or self._old.get(name)
        try:
            return None if found is None else _estimate(found)
        except (TypeError, KeyError, ValueError):
            return None

    def put(self, name: str, estimate: Estimate) -> None:
        self._new[name] = dataclasses.asdict(estimate)

    def save(self) -> None:
        """Keep what is new, beside what others have kept meanwhile."""
        if self._new:
            content = json.dumps(self._read() | self._new, separators=(",", ":"))
            with contextlib.suppress(OSError):
                write(self._path, content.encode())


def _estimate(content: Mapping[str, Any]) -> Estimate:
    parts = dict(content)
    return Estimate(
        **parts
        | {
            "host": HostBytes(**parts["host"]),
            "interval": Interval(**parts["interval"]),
            "phases": tuple(Phase(**p) for p in parts["phases"]),
            "assumptions": tuple(parts["assumptions"]),
        }
    )
