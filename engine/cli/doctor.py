"""`dg-run doctor`: what was probed, what is installed, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import itertools
import json

import engine
from engine import doctor
from engine.cli import options
from engine.errors import HardwareError

_MARKS = {"ok": " ", "note": "·", "fault": "✗"}


def parser() -> options.Parser:
    """Return the parser of `dg-run doctor`."""
    made = options.Parser(
        "dg-run doctor", "Show what this machine has, what is installed, and what is missing and how to get it."
    )
    made.add_argument("--json", action="store_true", help="print it as JSON, for a bug report")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(arguments: list[str]) -> int:
    """Print one screen; 6 when the hardware or a library is at fault."""
    given = parser().read(arguments)
    lines = doctor.examine()
    if given.json:
        print(
            json.dumps({"dg-run": engine.__version__, "lines": [dataclasses.asdict(line) for line in lines]}, indent=2)
        )
    else:
        print(f"dg-run {engine.__version__}")
        for section, group in itertools.groupby(lines, key=lambda line: line.section):
            print(f"\n{section}")
            for line in group:
                print(f"{_MARKS[line.state]} {line.name:<16} {line.text}")
    return HardwareError.exit_code if any(line.state == "fault" for line in lines) else 0
