"""Hold Ctrl-C and SIGTERM back while they would do harm, and let them through right after."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end, not within, if Ctrl-C is pressed meanwhile, or SIGTERM comes.

    Starting torch runs Python from C++ initialisers, and an exception that comes up there ends the process by
    `terminate`, with a core dump and without a word to the user. Only the main thread receives signals; elsewhere, and
    where somebody's own handler is not Python's, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What ends the process at once, as SIGTERM does by itself, harms nothing.
    before = {s: h for s in _SIGNALS if callable(h := signal.getsignal(s))}
    came = False

    def remember(*_: object) -> None:
        nonlocal came
        came = True

    for each in before:
        signal.signal(each, remember)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        raise KeyboardInterrupt
