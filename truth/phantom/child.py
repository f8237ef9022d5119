"""The process in which the phantom device is loaded: cases in, a JSON object a line; results out, the same.

Each case has a process of its own, so that it begins with nothing allocated: a fork of this one, in which everything is
imported and no device was touched.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import warnings
from typing import Any

import torch

# The libraries look for devices when they are imported, after which a fork could not use one.
_LOOKS = torch.cuda.is_available, torch.cuda.device_count
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1

import accelerate  # noqa: E402
import diffusers  # noqa: E402
import transformers  # noqa: E402

from engine import facts  # noqa: E402
from engine.dryrun import run  # noqa: E402
from engine.facts.model import Model  # noqa: E402
from engine.values import FrozenDict, Request  # noqa: E402
from truth.phantom import allocation, card, witness  # noqa: E402
from truth.phantom.matrix import PLACEMENTS, Case  # noqa: E402

VERSIONS = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)}


def request(model: Model) -> Request:
    """Return a call of a model at its usual size."""
    usual = model.defaults
    return Request(
        model=model.id,
        pipeline_class=model.pipeline_class,
        height=usual.height,
        width=usual.width,
        frames=usual.frames,
        guidance=usual.guidance,
        call=FrozenDict(usual.call),
    )


def compared(case: Case) -> dict[str, Any]:
    """Return what was predicted of a case and what was executed, in bytes."""
    chosen = witness.steps(PLACEMENTS[case.placement], *((name, {}) for name in case.more))
    if case.kind == "tiny":
        home: Any = importlib.import_module("truth.pipelines")
        made = [home.made(case.name) for _ in range(2)]
        for pipe, _ in made:
            witness.loaded_as(pipe, case.dtype)
        trace, answers = witness.dry(made[0], chosen, case.dtype)
        second = made[1]
    else:
        model = facts.find(case.name)
        asked = request(model)
        is_plain = not any(n.startswith("vae_") for n in case.more)
        with card.listening() as answers:
            trace = run.trace(model, asked, case.dtype, witness.changing(chosen), is_plain=is_plain)
        second = witness.catalogued(model, asked, case.dtype)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    here = torch.cuda.get_device_properties(0)
    said = witness.predicted(trace, chosen, case.dtype, (here.major, here.minor), here.multi_processor_count)
    did = witness.executed(second, chosen, case.dtype, answers)
    left, _ = card.untold()
    return {
        "basis": trace.basis,
        "predicted": {"allocated_bytes": said.allocated, "reserved_bytes": said.reserved_bytes},
        "executed": {"allocated_bytes": did.allocated, "reserved_bytes": did.reserved_bytes},
        "is_equal": (said.allocated, said.reserved_bytes) == (did.allocated, did.reserved_bytes),
        "answers_left": left,
    }


def streams(count: int) -> dict[str, Any]:
    """Return how many random streams came out of both allocators alike, without a limit and within three."""
    runs = failures = 0
    unlike = []
    for seed in range(count):
        chance = random.Random(seed)
        events, sizes, optional, aside = allocation.random_stream(chance)
        free = allocation.predicted(events, sizes, is_optional=optional, aside=aside)
        assert not isinstance(free, int)
        limits = [int(free.peak_reserved_bytes * chance.uniform(0.5, 1.05)) >> 21 << 21 for _ in range(3)]
        for limit in (None, *(max(2 << 20, n) for n in limits)):
            runs += 1
            did = allocation.executed(events, sizes, limit, is_optional=optional, aside=aside)
            said = allocation.predicted(events, sizes, limit, is_optional=optional, aside=aside)
            failures += isinstance(did, int)
            if did != said:
                unlike.append({"seed": seed, "capacity_bytes": limit})
    return {"kind": "allocator", "streams": count, "runs": runs, "out_of_memory": failures, "unlike": unlike}


def _forked(case: Case) -> None:
    sys.stdout.flush()
    number = os.fork()
    if number:
        os.waitpid(number, 0)
        return
    try:
        found = compared(case)
    except BaseException as error:  # noqa: BLE001 - what a foreign pipeline raises is not one class
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    _say(case.json() | found)
    os._exit(0)


def _say(found: dict[str, Any]) -> None:
    played = os.environ.get("DG_PHANTOM_CARD", "A100")
    print(json.dumps(found | {"card": played, "versions": VERSIONS}), flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        content = json.loads(line)
        if content["kind"] == "allocator":
            _say(streams(content["count"]))
        else:
            _forked(Case.of(content))


if __name__ == "__main__":
    main()
