"""`dg-run plan --check FILE`: does a lock still stand."""

from __future__ import annotations

import sys
from pathlib import Path

import engine
from engine.check import OTHERWISE
from engine.errors import NothingFitsError

_VERDICTS = {
    0: "it would be planned so again",
    OTHERWISE: "it would be planned otherwise now",
    NothingFitsError.exit_code: "it no longer fits",
}


def check(path: Path, *, is_json: bool) -> int:
    """Print whether a lock still stands, fact by fact; 0 the same, 3 planned otherwise, 4 it no longer fits."""
    found = engine.read_lock(path).check(told=lambda line: print(line, file=sys.stderr, flush=True))
    if is_json:
        print(found.to_json())
        return found.exit_code
    fits = {True: "it fits", False: "it does not fit", None: "whether it fits is not known"}[found.fits]
    verdict = _VERDICTS[found.exit_code]
    told = verdict if found.exit_code == NothingFitsError.exit_code else f"{fits}, and {verdict}"
    print(f"{path}, on {found.card}{' (imagined)' if found.hypothetical else ''}: {told}")
    for fact in found.facts:
        print(f"  {fact.severity:<7} {fact}")
    return found.exit_code
