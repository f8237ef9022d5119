"""The counted device: a device of torch named "counted", whose every byte is counted. `load()` builds and registers it.

Its memory is the host's, and the CPU's kernels compute on it. The libraries' own hooks run on it as on any accelerator:
`pipe.to`, offloads with streams and pinned memory, layerwise casting. Past a capacity it raises
`torch.OutOfMemoryError`.

What it cannot see: what a CUDA kernel allocates beside its results (workspaces, buffers of sorts and scans), what the
caching allocator rounds up and reserves, and a missing synchronisation (work is done in the order it is asked for).
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch.utils import backend_registration as backend

NAME = "counted"
_SOURCES = ("device.cpp", "operators.cpp")
_HERE = Path(__file__).parent
_BUILD = _HERE.parents[1] / "build"
_module: Any = None


@dataclass(frozen=True, slots=True)
class Counts:
    """What the device says of itself, in the order of its `stats`."""

    live_bytes: int
    peak_bytes: int
    live_storages: int
    pinned_bytes: int
    pinned_peak_bytes: int
    capacity_bytes: int
    """Negative: none is set."""
    refused: int
    """Allocations that did not fit the capacity."""
    synchronisations: int
    streamed: int
    """Calls of `record_stream`: this device frees at once, and does not wait for the stream."""


def load() -> Any:
    """Return the module `torch.counted`, building the device once (some 20 s) and registering it once.

    Raises: RuntimeError, when it cannot be built (it takes a C++ compiler).
    """
    global _module
    if _module is None:
        library: Any = torch.ops
        library.load_library(str(_built()))
        backend.rename_privateuse1_backend(NAME)
        _module = _python_module()
        register: Any = torch._register_device_module
        register(NAME, _module)
        backend.generate_methods_for_privateuse1_backend(for_storage=True)
    return _module


def _built() -> Path:
    """Return the built library; what it is built from, and for which torch, is in its folder's name."""
    from torch.utils import cpp_extension

    content = b"".join((_HERE / f).read_bytes() for f in ("ledger.h", *_SOURCES))
    key = hashlib.sha256(content + torch.__version__.encode() + sys.version.encode()).hexdigest()[:12]
    folder = _BUILD / f"counted-{key}"
    library = folder / "counted_device.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".building"):
        if not library.exists():
            (folder / "lock").unlink(missing_ok=True)  # torch's own, of a build that was killed: it would wait for ever
            # One unit of both: nearly all of the time goes into torch's headers.
            whole = folder / "whole.cpp"
            whole.write_text("".join(f'#include "{_HERE / f}"\n' for f in _SOURCES), encoding="utf-8")
            cpp_extension.load(
                "counted_device",
                [str(whole)],
                extra_cflags=["-O1", "-g0", "-Wno-attributes"],
                build_directory=str(folder),
                is_python_module=False,
            )
    return library


def counts() -> Counts:
    """Return what is on the device now."""
    return Counts(*torch.ops.counted.stats())


def reset_peak() -> None:
    """Count peaks anew, from what is there now."""
    torch.ops.counted.reset_peak()


@contextlib.contextmanager
def capacity(size_bytes: int) -> Iterator[None]:
    """Let the device refuse what would bring it past `size_bytes`: torch.OutOfMemoryError."""
    torch.ops.counted.set_capacity(size_bytes)
    try:
        yield
    finally:
        torch.ops.counted.set_capacity(-1)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[int, int]]]:
    """Collect births (number, bytes) and deaths (-number, bytes), numbers counted from 1; the list fills at the end."""
    torch.ops.counted.recorded(True)
    found: list[tuple[int, int]] = []
    try:
        yield found
    finally:
        found += map(tuple, torch.ops.counted.recorded(False).view(-1, 2).tolist())


class _On:
    """`with torch.counted.device(0):` — there is one device."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0

    def __enter__(self) -> _On:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **given: Any) -> Any:
        return super().__new__(cls, **given) if given else super().__new__(cls, device=NAME, priority=priority)


class _Event(torch.Event):
    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
        return super().__new__(cls, device=NAME, enable_timing=enable_timing)


class _InStream:
    """`with torch.counted.stream(s):`"""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = torch.accelerator.current_stream()
        if self.stream is not None:
            torch.accelerator.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_stream(self.before)


def _python_module() -> types.ModuleType:
    """Return what the libraries expect to find as `torch.<device>`: the part of `torch.cuda` that they use."""
    made = types.ModuleType(f"torch.{NAME}")

    def free_and_total(device: Any = None) -> tuple[int, int]:
        now = counts()
        most = 1 << 40 if now.capacity_bytes < 0 else now.capacity_bytes
        return max(0, most - now.live_bytes), most

    names: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.float32, torch.bfloat16, torch.float16],
        "manual_seed": torch.ops.counted.seed,
        "manual_seed_all": torch.ops.counted.seed,
        "device": _On,
        "Stream": _Stream,
        "Event": _Event,
        "stream": _InStream,
        "set_stream": torch.accelerator.set_stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "synchronize": lambda device=None: torch.ops.counted.synchronize(),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "mem_get_info": free_and_total,
        "memory_allocated": lambda device=None: counts().live_bytes,
        "max_memory_allocated": lambda device=None: counts().peak_bytes,
        "memory_reserved": lambda device=None: counts().live_bytes,
        "max_memory_reserved": lambda device=None: counts().peak_bytes,
        "reset_peak_memory_stats": lambda device=None: reset_peak(),
    }
    for name, value in names.items():
        setattr(made, name, value)
    return made
