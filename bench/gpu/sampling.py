"""What NVML says that this process holds on its card: looked at by a thread of its own, some fifty times a second."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes used on the card: by this process (None where the driver does not name it, as in containers), by all."""

    process_bytes: int | None
    card_bytes: int | None


class Sampler:
    """Keeps the most that was seen since the last `taken`. Without a card it sees nothing."""

    def __init__(self, ask: Any = None) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._most = Sample(None, None)
        self._ended = threading.Event()

    def look(self) -> Sample:
        """Return what is used at this moment, and count it."""
        seen = Sample(None, None) if self._ask is None else self._ask()
        with self._lock:
            self._most = _larger(self._most, seen)
        return seen

    def taken(self) -> Sample:
        """Return the most since this was last asked, this moment included."""
        now = self.look()
        with self._lock:
            most, self._most = self._most, now
        return most

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self.look()

    @contextlib.contextmanager
    def running(self) -> Iterator[Sampler]:
        """Look again and again while this is active."""
        if self._ask is None:
            yield self
            return
        thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()


def of_card(uuid: str | None) -> Sampler:
    """Return a sampler of the card (or MIG instance) of this UUID; one that sees nothing where NVML does not answer."""
    if uuid is None:
        return Sampler()
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return Sampler()
    own = os.getpid()

    def ask() -> Sample:
        process = card = None
        with contextlib.suppress(pynvml.NVMLError):
            running = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
            process = next((p.usedGpuMemory for p in running if p.pid == own), None)
        with contextlib.suppress(pynvml.NVMLError):
            card = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        return Sample(process, card)

    return Sampler(ask)


def _larger(a: Sample, b: Sample) -> Sample:
    def most(x: int | None, y: int | None) -> int | None:
        return y if x is None else x if y is None else max(x, y)

    return Sample(most(a.process_bytes, b.process_bytes), most(a.card_bytes, b.card_bytes))
