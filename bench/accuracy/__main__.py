"""Print predictions beside published figures; write docs/accuracy.md, or see that it is not stale."""

from __future__ import annotations

import argparse
import sys

from bench.accuracy import page, published
from engine.units import GIB


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=(__doc__ or "").splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--write", action="store_true", help="write docs/accuracy.md")
    kind.add_argument(
        "--check", action="store_true", help="end with 1 when docs/accuracy.md is not what would be written"
    )
    options = parser.parse_args()
    peaks, seconds = published.peaks(), published.seconds()
    for points, unit, name in ((peaks, GIB, "GiB"), (seconds, 1.0, "s")):
        for p in points:
            inside = "" if p.low is None else "  inside" if p.is_inside else "  OUTSIDE its interval"
            print(f"{p.id:<22} {p.published / unit:9.3f} {p.predicted / unit:9.3f} {name:<4}{p.error:+8.2%}{inside}")
        print(published.summary(points))
    text = page.made(peaks, seconds)
    if options.write:
        page.PATH.write_text(text, encoding="utf-8")
        print(f"written: {page.PATH.name}")
    if options.check and page.PATH.read_text(encoding="utf-8") != text:
        print(f"{page.PATH.name} is stale: python -m bench.accuracy --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
