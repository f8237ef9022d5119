"""Hold Ctrl-C back while it would do harm, and let it through right after."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end, not within, if Ctrl-C is pressed meanwhile.

    Starting torch runs Python from C++ initialisers, and an exception that comes up there ends the process by
    `terminate`, with a core dump and without a word to the user. Only the main thread receives signals; elsewhere, and
    where somebody's own handler is not Python's, this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed = False

    def remember(*_: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
