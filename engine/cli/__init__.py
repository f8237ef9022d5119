"""The command `dg-run`: arguments in, exit code out. Everything else is the library's."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from engine.cli.options import COMMANDS
from engine.errors import INTERRUPTED_EXIT_CODE, DgRunError, UsageError
from engine.words import did_you_mean

INTERNAL_ERROR = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. The one place where errors become text."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name or an arrow that the terminal's encoding lacks is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _command(arguments)(arguments)
    except DgRunError as error:
        if "--debug" in arguments:
            raise
        print(f"dg-run: {error}", file=sys.stderr)
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
            f"dg-run: an internal error: {type(error).__name__}: {error}\n"
            "  why: this is a mistake in dg-run, not in what you asked for\n"
            "  do:  run again with --debug, and report what it prints",
            file=sys.stderr,
        )
        return INTERNAL_ERROR


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
