"""`dg-run profiles lint`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine import profiles
from engine.cli import options
from engine.documents import Problem, shown_at
from engine.errors import FileError, ProfileError
from engine.profiles import Examined

FORMATS = ("text", "github", "json")


def lint_parser() -> options.Parser:
    """Return the parser of `dg-run profiles lint`."""
    made = options.Parser(
        "dg-run profiles lint",
        "Check profiles: every problem of every file, with its line and column. A folder stands for the .yaml files\n"
        "in it. It ends with 0 when all are sound, with 3 when one is not, and with 8 when a file cannot be read.\n"
        "Warnings change nothing of that.",
    )
    made.add_argument("files", nargs="+", type=Path, metavar="FILE|DIR", help="what to check")
    made.add_argument(
        "--format", choices=FORMATS, default="text", help="text; github: annotations of a pull request; json (text)"
    )
    return made


def run_lint(given: argparse.Namespace) -> int:
    """Print what is wrong; 0, 3 or 8."""
    examined: list[Examined] = []
    unreadable: list[tuple[str, str]] = []
    for path in given.files:
        try:
            examined += [profiles.examine(file) for file in files(path)]
        except (ProfileError, FileError) as error:
            unreadable.append((str(path), f"{error.what}: {error.why}" if error.why else error.what))
    {"text": _text, "github": _github, "json": _json}[given.format](examined, unreadable)
    if unreadable:
        return FileError.exit_code
    return ProfileError.exit_code if any(e.problems for e in examined) else 0


def files(path: Path) -> Iterator[Path]:
    """Yield a file itself, or the YAML files of a folder by name. Raises: FileError, when there are none."""
    if not path.is_dir():
        yield path
        return
    found = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml") and p.name[0] != "." and p.is_file())
    if not found:
        raise FileError(f"{path} holds no .yaml file", "", "give a file, or the folder that they are in")
    yield from found


_Unreadable = Iterable[tuple[str, str]]


def _told(examined: Iterable[Examined]) -> Iterator[tuple[Examined, str, Problem]]:
    for one in examined:
        yield from ((one, "error", p) for p in one.problems)
        yield from ((one, "warning", p) for p in one.warnings)


def _text(examined: list[Examined], unreadable: _Unreadable) -> None:
    for one, kind, problem in _told(examined):
        print(shown_at(str(one.path), problem, one.text.splitlines(), f"{kind}: "))
        if problem.do:
            print(f"         do: {problem.do}")
    for path, why in unreadable:
        print(f"{path}: error: {why}")
    problems = sum(len(e.problems) for e in examined)
    warnings = sum(len(e.warnings) for e in examined)
    print(f"{_count(len(examined), 'profile')}, {_count(problems, 'problem')}, {_count(warnings, 'warning')}")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _github(examined: list[Examined], unreadable: _Unreadable) -> None:
    """Print workflow commands, which become annotations beside the lines of a pull request."""
    for one, kind, problem in _told(examined):
        at = {"file": str(one.path)}
        if problem.place is not None:
            at |= {"line": str(problem.place.line), "col": str(problem.place.column)}
        properties = ",".join(f"{k}={_escaped(v, ',:')}" for k, v in at.items())
        print(f"::{kind} {properties}::{_escaped('. '.join(filter(None, (problem.what, problem.do))))}")
    for path, why in unreadable:
        print(f"::error file={_escaped(path, ',:')}::{_escaped(why)}")


def _escaped(text: str, more: str = "") -> str:
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)


def _json(examined: list[Examined], unreadable: _Unreadable) -> None:
    found: list[dict[str, Any]] = [
        {
            "file": str(one.path),
            "line": problem.place and problem.place.line,
            "column": problem.place and problem.place.column,
            "severity": kind,
            "message": problem.what,
            "do": problem.do,
        }
        for one, kind, problem in _told(examined)
    ]
    found += [
        {"file": path, "line": None, "column": None, "severity": "error", "message": why, "do": ""}
        for path, why in unreadable
    ]
    print(json.dumps(found, indent=2, ensure_ascii=False))
