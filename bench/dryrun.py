"""Dry-run the catalogue: `python -m bench.dryrun [MODEL …]`.

Prints, a model a line, how long the pipeline takes to build and to run on meta (two steps at its own size, as a card
computes it, bfloat16), how many events that is, its weights, its most activations, and the peak under each placement;
or the operation that stopped it. Each model runs in a process of its own, so that its memory can be told too.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from engine import facts
from engine.estimate import placements, stream
from engine.facts import catalogue
from engine.units import GIB


def one(name: str, batch: int) -> str:
    """Return the line for a model."""
    import diffusers
    import torch
    import transformers

    from engine.dryrun import build, inputs, record, twins

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    model = facts.find(name)
    start = time.perf_counter()
    pipe = build.pipeline(model, torch.bfloat16)
    built_s = time.perf_counter() - start
    usual = model.defaults
    asked = inputs.call(
        model,
        pipe,
        height=usual.height,
        width=usual.width,
        frames=usual.frames,
        steps=2,
        guidance=usual.guidance,
        batch=batch,
    )
    start = time.perf_counter()
    with twins.assumed() as assumed:
        trace = record.record(pipe, asked, "cuda")
    ran_s = time.perf_counter() - start
    resident = stream.peaks(stream.build(trace, placements.Resident(trace)))
    best = max(resident, key=lambda p: p.peak_bytes)
    peaks = {
        "model": placements.ModelOffload(trace),
        "block": placements.GroupOffload(trace, block_level=True),
        "leaf": placements.GroupOffload(trace),
        "sequential": placements.SequentialOffload(trace),
    }
    told = ", ".join(
        f"{k} {stream.peak_bytes(stream.peaks(stream.build(trace, p))) / GIB:.2f}" for k, p in peaks.items()
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return (
        f"{built_s:4.1f} s + {ran_s:4.1f} s, {len(trace.events):6} events, {memory:.2f} GiB of RAM;"
        f" weights {best.weights_bytes / GIB:6.2f}, activations {best.activation_bytes / GIB:6.2f} GiB in {best.name};"
        f" peaks in GiB: resident {best.peak_bytes / GIB:.2f}, {told}"
        + "".join(f"; {note}" for note in (*build.notes(pipe), *sorted(assumed)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of the catalogue (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="pictures or videos a prompt")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(one(options.models[0], options.batch))
        return
    for name in options.models or catalogue.ids():
        command = [sys.executable, "-m", "bench.dryrun", "--batch", str(options.batch), "--here", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "Error" in line or "why:" in line or "ValueNeeded" in line]
        stopped = " ".join(said[-2:])[:200]
        print(f"{name:<55} {done.stdout.strip() if done.returncode == 0 else 'STOPPED ' + stopped}", flush=True)


if __name__ == "__main__":
    main()
