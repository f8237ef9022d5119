"""Dry-run the catalogue: `python -m bench.dryrun [MODEL …]`.

Prints, a model a line, how long the pipeline takes to build and to run on meta (two steps at its own size, as a card
computes it, bfloat16), how many events that is, its weights, its most activations, and the peak under each placement;
or the operation that stopped it. Each model runs in a process of its own, so that its memory can be told too.
"""

from __future__ import annotations

import argparse
import inspect
import resource
import subprocess
import sys
import time

from engine import facts, replay
from engine.facts import catalogue
from engine.units import GIB


def one(name: str) -> str:
    """Return the line for a model."""
    import diffusers
    import torch
    import transformers
    from PIL import Image

    from engine.dryrun import build, record

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    model = facts.find(name)
    start = time.perf_counter()
    pipe = build.pipeline(model, torch.bfloat16)
    built_s = time.perf_counter() - start
    usual = model.defaults
    asked: dict[str, object] = {
        "prompt": "x",
        "height": usual.height,
        "width": usual.width,
        "num_frames": usual.frames,
        "guidance_scale": usual.guidance,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    taken = inspect.signature(pipe.__call__).parameters
    if "mask_image" in taken or model.pipeline_class.endswith("EditPipeline"):
        picture = Image.new("RGB", (usual.width or 1024, usual.height or 1024))
        asked |= {"image": picture, "mask_image": picture.convert("L")}
    start = time.perf_counter()
    trace = record.record(pipe, {k: v for k, v in asked.items() if v is not None and k in taken}, "cuda")
    ran_s = time.perf_counter() - start
    resident = replay.peaks(trace, replay.Resident(trace))
    best = max(resident, key=lambda p: p.peak_bytes)
    peaks = {
        "model": replay.ModelOffload(trace),
        "block": replay.GroupOffload(trace, block_level=True),
        "leaf": replay.GroupOffload(trace),
        "sequential": replay.SequentialOffload(trace),
    }
    told = ", ".join(f"{k} {replay.peak_bytes(trace, p) / GIB:.2f}" for k, p in peaks.items())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return (
        f"{built_s:4.1f} s + {ran_s:4.1f} s, {len(trace.events):6} events, {memory:.2f} GiB of RAM;"
        f" weights {best.weights_bytes / GIB:6.2f}, activations {best.activation_bytes / GIB:6.2f} GiB in {best.name};"
        f" peaks in GiB: resident {best.peak_bytes / GIB:.2f}, {told}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of the catalogue (default: all)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(one(options.models[0]))
        return
    for name in options.models or catalogue.ids():
        command = [sys.executable, "-m", "bench.dryrun", "--here", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "Error" in line or "why:" in line or "ValueNeeded" in line]
        stopped = " ".join(said[-2:])[:200]
        print(f"{name:<55} {done.stdout.strip() if done.returncode == 0 else 'STOPPED ' + stopped}", flush=True)


if __name__ == "__main__":
    main()
