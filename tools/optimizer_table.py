"""Write the table of docs/optimizers.md that says what each optimizer does to each architecture; or compare it.

python -m tools.optimizer_table --write [--only OPTIMIZER …] [--missing] [--jobs N] | --check

`--write` makes every run (`truth/effects.py`), some 300 of them, and keeps what came of each in
truth/results/optimizers.json; with `--only` those of some optimizers, with `--missing` those that were never made.
`--check` runs nothing: it ends with 1 when the page is not the one of those results, or when there are none of an
optimizer or of an architecture. Either ends with 1 when a run came to something else than the rules had said before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from engine import compat, optimizers, versions
from truth import effects, many, outputs
from truth.effects import APPLIED, FAILED, NOTHING, REFUSED, Cell

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
RESULTS = Path(effects.__file__).parent / "results" / "optimizers.json"
BEGIN, END = "<!-- acts: begin, by tools/optimizer_table.py -->", "<!-- acts: end -->"
SIGNS = {APPLIED: "✓", NOTHING: "–", REFUSED: "✗", FAILED: "fails"}


def wanted() -> tuple[tuple[str, str], ...]:
    """Return every cell there should be: its way, and its architecture."""
    return tuple((way, name) for way in effects.ways() for name in effects.ARCHITECTURES)


def stored() -> tuple[Cell, ...]:
    """Return what came of the runs that are kept."""
    if not RESULTS.is_file():
        return ()
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    return tuple(Cell(**{**row, "rules": tuple(row["rules"])}) for row in rows)


def made(cell: tuple[str, str]) -> Cell:
    """Make the run of a cell."""
    way, architecture = cell
    return effects.cell(architecture, way)


def keep(cells: Iterable[Cell]) -> None:
    """Write the results, in the order of the table."""
    order = {key: i for i, key in enumerate(wanted())}
    rows = sorted((c for c in cells if (c.way, c.architecture) in order), key=lambda c: order[c.way, c.architecture])
    libraries = {n: versions.installed(n) for n in ("torch", "diffusers", "transformers", "accelerate")}
    lines = ",\n  ".join(json.dumps(asdict(c)) for c in rows)
    text = f'{{"versions": {json.dumps(libraries)},\n "cells": [\n  {lines}\n ]}}\n'
    RESULTS.write_text(text, encoding="utf-8")


def table(cells: Sequence[Cell]) -> str:
    """Return the table as markdown, with the reasons below it."""
    by_place = {(c.way, c.architecture): c for c in cells}
    reasons: dict[str, int] = {}

    def sign(cell: Cell | None) -> str:
        if cell is None:
            return ""
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in _reasons(cell)]
        return " ".join((SIGNS[outcome(cell)], *([f"({', '.join(numbers)})"] if numbers else [])))

    lines = [f"| optimizer | {' | '.join(effects.ARCHITECTURES)} |", "| --- " * (len(effects.ARCHITECTURES) + 1) + "|"]
    for way in effects.ways():
        signs = [sign(by_place.get((way, name))) for name in effects.ARCHITECTURES]
        lines.append(f"| {_told(way)} | {' | '.join(signs)} |")
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    absent = [f"`{name}` is not in the table: {because}." for name, because in outputs.LEFT_OUT.items()]
    return "\n".join([*lines, "", *listed, "", *absent])


def outcome(cell: Cell) -> str:
    """Return what a user gets: what the rules say where they say something, else what was seen."""
    return cell.seen if cell.told == APPLIED else cell.told


def _told(way: str) -> str:
    name, _, rest = way.partition(", ")
    return f"`{name}`{f': {rest}' if rest else ''}"


def _reasons(cell: Cell) -> Iterator[str]:
    because = {r.id: r.because for r in compat.rules()}
    for rule in cell.rules:
        yield f"{because[rule]} (rule `{rule}`)"
    if not cell.rules and cell.because:
        yield cell.because


def page(cells: Sequence[Cell]) -> str:
    """Return docs/optimizers.md with the table of these results."""
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} has no place for the table ({BEGIN})")
    return f"{before}{BEGIN}\n{table(cells)}\n{END}{after}"


def problems(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what is wrong with the results, in words: what is not there, and where a run was not foretold."""
    there = {(c.way, c.architecture) for c in cells}
    if missing := [key for key in wanted() if key not in there]:
        yield f"{len(missing)} runs were not made, such as {missing[0]}: python -m tools.optimizer_table --write"
    for cell in cells:
        if not cell.agrees:
            came = f"{cell.seen!r} {cell.because}"
            yield f"{cell.way} on {cell.architecture}: the rules say {cell.told!r}, and it is {came}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], prog="python -m tools.optimizer_table"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="make the runs, and write the results and the page")
    what.add_argument("--check", action="store_true", help="exit 1 if the page is stale, or a run was not foretold")
    parser.add_argument("--only", nargs="+", default=optimizers.NAMES, metavar="OPTIMIZER", help="of these alone")
    parser.add_argument("--missing", action="store_true", help="those alone of which there are no results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    options = parser.parse_args()
    cells = stored()
    if options.write:
        todo = [key for key in wanted() if key[0].partition(", ")[0] in options.only]
        kept = {(c.way, c.architecture): c for c in cells}
        todo = [key for key in todo if not (options.missing and key in kept)]
        # One architecture after the other: what is plain of it is executed once.
        todo.sort(key=lambda key: outputs.QUICK_FIRST.index(key[1]))
        for cell in many.each(made, todo, options.jobs):
            print(
                "" if cell.agrees else "NOT FORETOLD",
                cell.architecture,
                cell.way,
                cell.seen,
                file=sys.stderr,
                flush=True,
            )
            kept[cell.way, cell.architecture] = cell
            keep(kept.values())
        cells = stored()
        PAGE.write_text(page(cells), encoding="utf-8")
    wrong = list(problems(cells))
    if PAGE.read_text(encoding="utf-8") != page(cells):
        wrong.append("docs/optimizers.md is stale: run `python -m tools.optimizer_table --write`")
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
