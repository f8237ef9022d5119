"""Two starts on one card wait for each other around probe and load.

Each reads what is free and then takes it: without a lock two of them read the same bytes as free, and both take them.
The lock is advisory, one file a card, kept by the operating system: it goes when its process goes, however that ends.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from engine import paths
from engine.errors import HardwareError
from engine.values import Gpu

PATIENCE_S = 30 * 60
_POLL_S = 0.2


@contextlib.contextmanager
def held(card: Gpu | None, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a card; without a card hold nothing. `waiting` is called once if somebody else holds it.

    Raises: HardwareError, when the other does not let go within half an hour.
    """
    if card is None:
        yield
        return
    from filelock import FileLock, Timeout

    # One lock object a path: a process that holds it already enters again without waiting for itself.
    # A UUID names the card whoever starts; its hash keeps it out of file names.
    name = hashlib.sha256((card.uuid or f"index-{card.index}").encode()).hexdigest()[:16]
    folder = paths.cache_dir() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock", thread_local=False, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting(f"another dg-run is loading on {card.name}; waiting for it …")
            lock.acquire(timeout=PATIENCE_S, poll_interval=_POLL_S)
    except Timeout:
        raise HardwareError(
            f"another dg-run has been loading on {card.name} for {PATIENCE_S // 60} minutes",
            f"it holds {folder / name}.lock",
            "end it, or name another card with --gpu",
        ) from None
    except OSError as error:
        # A cache that cannot be written must not keep anybody from running; only neighbours are then not waited for.
        waiting(f"no lock can be kept in {folder} ({error.strerror or error}): other starts are not waited for")
        yield
        return
    try:
        yield
    finally:
        lock.release()
