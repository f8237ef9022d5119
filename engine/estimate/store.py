"""Where traces come from: this process, the cache on disk, those that are shipped, and last a dry run.

A trace is known by its content: the model's configurations, the sizes, the dtype, the libraries' versions. What was
estimated from it is kept beside it, so that asking again reads one small file. Files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import paths, versions
from engine.estimate.dryrunner import DryRunner
from engine.facts.model import Model
from engine.files import stamp, write
from engine.values import Estimate, FrozenDict, Gpu, HostBytes, Interval, Phase, Request, Step, plain

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
_ANSWERS_KEPT = 32
SHIPPED_SIDES_PX = (512, 1024)
"""Sides of the square pictures that traces are shipped for, beside each model's own size."""
_dry = DryRunner()
_LOCK_S = 10
# What is known of a component's weights as they lie on disk: no matter to a run that has none.
_OF_FILES = ("stored_dtype", "variants")


class NotTraced(Exception):
    """A dry run would be needed, and none is wanted."""


def key(model: Model, request: Request, dtype: str, changes: Sequence[Step] = ()) -> str:
    """Return what a trace is known by: a hash of all that it depends on but the code that makes it.

    `changes` are the steps that change what is computed, in their order.
    """
    configured, known = _configured(model)
    content: dict[str, Any] = {
        "pipeline": model.pipeline_class,
        "sizes": [request.height, request.width, request.frames, request.batch],
        "guidance": request.guidance,
        "call": dict(request.call),
        "dtype": dtype,
        "libraries": _library_versions(),
    }
    if changes:
        content["changes"] = [[s.name, dict(s.params)] for s in changes]
    beside = _canonical(content)
    found = known.get(beside)
    if found is None:
        text = _canonical({**content, "components": configured})
        found = known[beside] = hashlib.sha256(text.encode()).hexdigest()[:32]
    return found


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)


def _configured(model: Model) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what of a model's components decides a trace, and the keys that were asked for by all else of them.

    Configurations are long, a plan asks for a dozen keys, and the next plan for the same ones.
    """
    known = _configurations.get(id(model))
    if known is None or known[0] is not model:
        made = {
            name: {k: v for k, v in plain(component).items() if k not in _OF_FILES}
            for name, component in model.components.items()
        }
        known = _configurations[id(model)] = model, made, {}
        for oldest in list(_configurations)[:-_KEPT_IN_MEMORY]:
            _configurations.pop(oldest, None)
    return known[1:]


_configurations: dict[int, tuple[Model, dict[str, Any], dict[str, str]]] = {}


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
    may_run: bool = True,
) -> Trace | None:
    """Return the trace of a request: a known one, else from a dry run; None where no dry run can be made here.

    `told` is given a line before a dry run. `is_plain` does without the other ways through the VAE, which take most of
    the time where a video is decoded in tiles. Raises: ModelError, UsageError, IncompatibleError; NotTraced, where
    there would be a dry run and it may not run.
    """
    wanted = key(model, request, dtype, changes)
    found = known(wanted) or (known(f"{wanted}-plain") if is_plain else None)
    if found is not None or not can_trace():
        return found
    if not may_run:
        raise NotTraced(model.id)
    from engine.estimate import tracefile

    with _dry.one_at_a_time:
        # Another thread may have made it meanwhile.
        found = known(wanted) or (known(f"{wanted}-plain") if is_plain else None)
        if found is not None:
            return found
        if told is not None:
            told(f"dry run of {model.id} (once for each size; some seconds, no weights)")
        made = _dry.trace(model, request, dtype, changes, is_plain=is_plain)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write(_cached_path(f"{wanted}-plain" if is_plain else wanted), made)
    return tracefile.load(made)


def card_key(gpu: Gpu, request: Request, stored: Mapping[str, str | None], calibration: str | None = None) -> str:
    """Return what every estimate from one trace has in common: the card, the files, and the number of steps.

    `calibration` is the digest of the card's.
    """
    content = [
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


@functools.lru_cache(maxsize=_ANSWERS_KEPT)
def _read_answers(path: Path, as_it_is: tuple[int, int, int]) -> Mapping[str, Any]:
    """Return the answers in a file. Read once: a process plans for the same models again and again."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return FrozenDict(found) if isinstance(found, dict) else FrozenDict()


class Answers:
    """The estimates that were made from one trace, kept on disk as one small file."""

    def __init__(self, wanted: str) -> None:
        self._path = paths.cache_dir() / "estimates" / f"{wanted}-{_fingerprint((*_TRACING, *_ANSWERING))}.json"
        self._new: dict[str, Any] = {}
        self._old = self._read()

    def _read(self) -> Mapping[str, Any]:
        try:
            return _read_answers(self._path, stamp(self._path))
        except (OSError, ValueError, RecursionError):
            return {}

    def get(self, name: str) -> Estimate | None:
        """Return an estimate that was made before."""
        found = self._new.get(name) or self._old.get(name)
        try:
            return None if found is None else _estimate(found)
        except (TypeError, KeyError, ValueError):
            return None

    def put(self, name: str, estimate: Estimate) -> None:
        self._new[name] = plain(estimate)

    def note(self, name: str) -> Any:
        """Return something else that was found out from the trace, as JSON has it; None where nothing was."""
        return self._new.get(name, self._old.get(name))

    def keep(self, name: str, value: Any) -> None:
        self._new[name] = value

    def save(self) -> None:
        """Keep what is new, beside what others have kept meanwhile: of those that save at once none loses."""
        if not self._new:
            return
        with contextlib.suppress(OSError), _alone(self._path.parent):
            content = json.dumps({**self._read(), **self._new}, separators=(",", ":"))
            write(self._path, content.encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of answers while one is merged. Where no lock can be had, go on: at worst an answer is lost."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(
            OSError, NotImplementedError
        ):  # a Timeout is an OSError; and file systems without locks
            held.enter_context(FileLock(folder / ".lock", timeout=_LOCK_S))
        yield


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
