"""The command `dg-run`: arguments in, exit code out. Everything else is the library's."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import NoReturn

from engine import collector
from engine.cli.options import COMMANDS
from engine.errors import INTERRUPTED_EXIT_CODE, DgRunError, UsageError
from engine.words import did_you_mean, printable

INTERNAL_ERROR = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. The one place where errors become text."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name or an arrow that the terminal's encoding lacks is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _ended_as_by_ctrl_c():
            return _command(arguments)(arguments)
    except DgRunError as error:
        if "--debug" in arguments:
            raise
        print(f"dg-run: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndg-run: interrupted; no unfinished file is left", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(
            f"dg-run: an internal error: {type(error).__name__}: {printable(str(error))}\n"
            "  why: this is a mistake in dg-run, not in what you asked for\n"
            "  do:  run again with --debug, and report what it prints",
            file=sys.stderr,
        )
        return INTERNAL_ERROR


def entry() -> NoReturn:
    """Run the command line of this process, and end it with the exit code."""
    code = main()
    if code == INTERRUPTED_EXIT_CODE:
        # Ended by Python itself, a process has been seen to end by the signal, after `main` had said and returned 130:
        # Ctrl-C had come while modules were imported. Nothing that Python does at its end is left to come upon it.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    collector.leave_what_is_there()
    sys.exit(code)


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: what is half-written goes, what is finished stays."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _command(arguments: list[str]) -> Callable[[list[str]], int]:
    """Return the function for a command line, taking the command's own name off it."""
    if not arguments or arguments[0].startswith("-"):
        name = "generate"
    elif arguments[0] in COMMANDS:
        name = arguments.pop(0)
    else:
        do = did_you_mean(arguments[0], COMMANDS)
        raise UsageError(
            f"there is no command {arguments[0]!r}", do=f'{do} To draw: dg-run --auto --prompt "…"'.strip()
        )
    run: Callable[[list[str]], int] = import_module(f"engine.cli.{name}").run
    return run
