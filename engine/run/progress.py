"""What a person sees while it works: one line a stage on stderr, and bars only on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from engine.units import format_seconds
from engine.words import printable


class Progress(Protocol):
    """Where a run says what it is doing."""

    def say(self, text: str) -> None:
        """Tell one line."""

    def stage(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Tell that something begins, and, when it ends, how long it took."""

    def bars(self) -> bool:
        """Whether the libraries may draw their own bars."""


class Quiet:
    """For library calls: nothing is said."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def stage(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def bars(self) -> bool:
        return False


class OnStderr:
    """For the command line."""

    def say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.say(f"{what} …")
        start = time.perf_counter()
        yield
        self.say(f"{what}: done in {format_seconds(time.perf_counter() - start)}")

    def bars(self) -> bool:
        return sys.stderr.isatty()


def settle_libraries(progress: Progress, *, debug: bool) -> None:
    """Let the libraries draw bars only where a person sees them, and keep their notices for --debug."""
    import warnings

    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    # diffusers counts components; a bar of weights within each of them would only flicker.
    transformers_logging.disable_progress_bar()
    if not progress.bars():
        diffusers_logging.disable_progress_bar()
    if not debug:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
    if not debug:
        warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|accelerate)\b.*")


def settle_pipeline(pipe: Any, progress: Progress, what: str) -> None:
    """Name the pipeline's own step bar and draw it only on a terminal."""
    pipe.set_progress_bar_config(desc=what, disable=not progress.bars(), leave=False)
