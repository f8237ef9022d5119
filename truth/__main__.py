"""Executed peaks against predicted ones, on the counted device: `python -m truth [--cases N] [--seed N] [--write]`.

Every architecture under every placement, then random cases. Prints each that is not equal to the byte, and figures by
architecture and placement. Ends with 1 when a peak is off by more than 1 %. `--write` keeps the figures for
docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time

import engine
from engine import versions
from truth import cases, compare, many, results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], prog="python -m truth")
    parser.add_argument("--cases", type=int, default=2000, help="random cases, beside every placement once (2000)")
    parser.add_argument("--seed", type=int, default=0, help="which random cases (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--write", action="store_true", help="keep the figures in truth/results/counted.json")
    options = parser.parse_args()
    start = time.perf_counter()
    many.prepare()
    random_cases = itertools.islice(cases.random_cases(options.seed), options.cases)
    staged, listed = (
        list(cases.staged()),
        [*cases.every_placement(), *cases.every_mixture(), *cases.every_tile(), *cases.every_cast(), *random_cases],
    )
    rows = []
    for row in many.each(results.row, [*staged, *listed], options.jobs):
        rows.append(row)
        for difference in row.differences if len(rows) > len(staged) else ():
            print(f"{row.id}\n    {difference}", flush=True)
        if len(rows) % 100 == 0:
            print(f"{len(rows)} of {len(listed)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    ran = {
        "seed": options.seed,
        "random_cases": options.cases,
        "versions": {n: versions.installed(n) for n in ("torch", "diffusers", "transformers", "accelerate")},
        "dg-run": engine.__version__,
    }
    found = results.summary(rows[len(staged) :], rows[: len(staged)], ran)
    for kind in ("by_architecture", "by_placement"):
        for name, figures in {**found[kind], "all": found["all"]}.items():
            print(
                f"{name:<32} {figures['equal']:>5} of {figures['cases']:>5} equal, worst {figures['worst_error']:.3%},"
                f" worst phase {figures['worst_phase_error']:.3%}"
            )
        print()
    print(f"{len(rows)} cases in {time.perf_counter() - start:.0f} s")
    if options.write:
        results.write(found)
    return int(any(abs(r.error) > compare.TOLERANCE for r in rows))


if __name__ == "__main__":
    sys.exit(main())
