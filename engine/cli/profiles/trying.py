"""`dg-run profiles test`."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from engine import profiles, scenarios
from engine.cli import options
from engine.cli.profiles.linting import files
from engine.errors import FileError, ProfileError

DEFAULT = Path("scenarios")


def test_parser() -> options.Parser:
    """Return the parser of `dg-run profiles test`."""
    made = options.Parser(
        "dg-run profiles test",
        "Run scenarios against the profiles that are used here. A scenario is a YAML file: a machine and a request,\n"
        "and what is expected of the plan (docs/teams.md). It ends with 0 when all is as expected, with 3 when\n"
        "something is not, and with 8 when a scenario cannot be read.",
    )
    made.add_argument(
        "scenarios",
        nargs="*",
        type=Path,
        metavar="FILE|DIR",
        help=f"scenarios, or a folder of them (default: {DEFAULT}/)",
    )
    made.add_argument(
        "--profiles",
        type=Path,
        metavar="DIR",
        help="use the profiles of this folder and the built-in ones, and no others: the same on every machine",
    )
    made.add_argument("--json", action="store_true", help="print the results as JSON")
    return made


def run_test(given: argparse.Namespace) -> int:
    """Print a line for each scenario, and what differs; 0, 3 or 8."""
    if given.profiles is not None and not given.profiles.is_dir():
        raise FileError(f"{given.profiles} is no folder", "", "give the folder of your profiles")
    if not given.scenarios and not DEFAULT.is_dir():
        raise FileError(
            f"there is no folder {DEFAULT}/ here", "", "write scenarios (docs/teams.md), or say where they are"
        )
    with contextlib.nullcontext() if given.profiles is None else profiles.only(given.profiles):
        broken = [b.error.what for b in profiles.broken() if b.error is not None]
        results = [_result(file) for path in given.scenarios or [DEFAULT] for file in files(path)]
    failing = [r for r in results if r["differences"]]
    if given.json:
        print(json.dumps({"scenarios": results, "broken_profiles": broken}, indent=2, ensure_ascii=False))
    else:
        for result in results:
            print(f"{'FAIL' if result['differences'] else 'ok  '} {result['file']}: {result['why']}")
            for line in result["differences"]:
                print("     " + line.replace("\n", "\n       "))
        for what in broken:
            print(f"FAIL {what}; `dg-run profiles lint` says why")
        print(f"{len(results) - len(failing)} of {len(results)} scenarios are as expected")
    if any(r["unreadable"] for r in results):
        return FileError.exit_code
    return ProfileError.exit_code if failing or broken else 0


def _result(file: Path) -> dict[str, Any]:
    try:
        outcome = scenarios.run(scenarios.load(file))
    except FileError as error:
        return {
            "file": str(file),
            "why": "it cannot be used",
            "unreadable": True,
            "differences": [error.why or error.what],
            "profile": None,
        }
    plan = outcome.plan
    return {
        "file": str(file),
        "why": outcome.scenario.why,
        "unreadable": False,
        "differences": list(outcome.differences),
        "profile": None if plan is None or plan.profile is None else plan.profile.name,
    }
