"""Make the traces that are shipped: `python -m tools.ship_traces [--check] [MODEL …]`.

One trace for each model of the catalogue and each of its common sizes, and the embedded model's, each model in
a process of its own. `--check` traces again and compares: so CI sees that shipped traces are not stale.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from engine import facts
from engine.estimate import store, tracefile
from engine.facts import catalogue, embedded
from engine.facts.model import Model
from engine.values import FrozenDict, Request

FOLDER = Path(store.__file__).parent / "shipped"
_WITHOUT_SIZE = ("KandinskyV22PriorPipeline",)
MOST_BYTES = 6 * 1024**2


def requests(model: Model) -> Iterator[tuple[Request, str]]:
    """Yield what is shipped of a model: requests, with the dtype that each is for."""
    usual = model.defaults
    own = Request(
        model=model.id,
        revision=model.revision,
        pipeline_class=model.pipeline_class,
        height=usual.height,
        width=usual.width,
        frames=usual.frames,
        guidance=usual.guidance,
        call=FrozenDict(usual.call),
    )
    for dtype in ("bfloat16", "float16"):
        yield own, dtype
    if model.id == embedded.ID or model.pipeline_class in _WITHOUT_SIZE:
        return
    for side in store.SHIPPED_SIDES_PX:
        if (usual.frames or 1) == 1 and usual.height is not None and (usual.height, usual.width) != (side, side):
            yield dataclasses.replace(own, height=side, width=side), "bfloat16"


def made(name: str) -> Iterator[tuple[Path, bytes]]:
    """Yield the files of a model."""
    from engine.dryrun import run

    model = facts.find(None if name == embedded.ID else name)
    for request, dtype in requests(model):
        trace = run.trace(model, request, dtype)
        said = "; ".join(trace.assumptions)
        print(f"{name} {request.height} x {request.width} {dtype}: {trace.basis} {said}", flush=True)
        yield store.shipped_path(store.key(model, request, dtype)), tracefile.dump(trace)


def one(name: str, *, is_check: bool) -> int:
    """Write a model's files, or compare them. Returns how many differ."""
    stale = 0
    for path, content in made(name):
        if not is_check:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            print(f"  {path.name} is not what is traced now", flush=True)
            stale += 1
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of the catalogue, or 'embedded' (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a shipped trace is stale")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.here:
        return min(1, one(options.models[0], is_check=options.check))
    names = options.models or [embedded.ID, *catalogue.ids()]
    if not options.models and not options.check:
        for old in FOLDER.glob("*.trace"):
            old.unlink()
    command = [sys.executable, "-m", "tools.ship_traces", "--here", *(["--check"] if options.check else [])]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda name: subprocess.run([*command, name], check=False).returncode, names))
    total = sum(p.stat().st_size for p in FOLDER.glob("*.trace"))
    print(f"{len(list(FOLDER.glob('*.trace')))} traces, {total / 1024**2:.2f} MiB")
    failed = [n for n, code in zip(names, codes, strict=True) if code]
    if failed:
        print(f"stale or not traced: {', '.join(failed)}")
    return 1 if failed or total > MOST_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
