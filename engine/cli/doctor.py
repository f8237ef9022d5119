"""`dg-run doctor`: what was probed, what is installed, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import engine
from engine import doctor, probe, versions
from engine.cli import options
from engine.errors import HardwareError
from engine.values import Hardware

_MARKS = {"ok": " ", "note": "·", "fault": "✗"}


def parser() -> options.Parser:
    """Return the parser of `dg-run doctor`."""
    made = options.Parser(
        "dg-run doctor", "Show what this machine has, what is installed, and what is missing and how to get it."
    )
    made.add_argument("--json", action="store_true", help="print it as JSON, for a bug report; it names nobody")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(arguments: list[str]) -> int:
    """Print one screen; 6 when the hardware or a library is at fault."""
    given = parser().read(arguments)
    seen = probe.snapshot()
    lines = doctor.examine(seen)
    if given.json:
        print(json.dumps(_report(seen, lines), indent=2))
    else:
        _print(lines)
    return HardwareError.exit_code if any(line.state == "fault" for line in lines) else 0


def _print(lines: tuple[doctor.Line, ...]) -> None:
    print(f"dg-run {engine.__version__}")
    for section, group in itertools.groupby(lines, key=lambda line: line.section):
        print(f"\n{section}")
        for line in group:
            first, *rest = line.text.splitlines()
            print(f"{_MARKS[line.state]} {line.name:<16} {first}")
            for more in rest:
                print(f"  {'':<16} {more}")


def _report(seen: Hardware, lines: tuple[doctor.Line, ...]) -> dict[str, Any]:
    """Return what a bug report needs, without whole UUIDs, and without who else runs what."""
    cards = [dataclasses.asdict(g) | {"uuid": doctor.short_uuid(g.uuid)} for g in seen.gpus]
    for card in cards:
        card["processes"] = [{"used_bytes": p["used_bytes"]} for p in card["processes"]]
    return {
        "dg-run": engine.__version__,
        "hardware": dataclasses.asdict(seen) | {"gpus": cards},
        "versions": {n: versions.installed(n) for n in (*versions.TESTED, *versions.OTHERS, *versions.OPTIONAL)},
        "findings": [dataclasses.asdict(line) for line in lines if line.state != "ok"],
    }
