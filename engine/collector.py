"""Python's collector of cycles, kept from running where it would cost time or tell untruths."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Keep it from running: what a cycle holds would die at a moment that nothing determines.

    While torch, diffusers and transformers are imported it finds nothing to free and looks through some 700,000 objects
    again and again: a fifth of the time that importing takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def leave_what_is_there() -> None:
    """Never look again through what this process holds now; Python does at its end, for a second and more.

    For processes that are our own: of somebody else's, the garbage that is there would never be freed.
    """
    gc.freeze()
