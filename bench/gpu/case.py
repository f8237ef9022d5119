"""Measure one case: `python -m bench.gpu.case` reads what to do as JSON from stdin, and prints one record.

It is a process of its own, so that nothing of the case before is left: no cached blocks, no context, no workspaces.
What libraries print goes to stderr; stdout is the record's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import device as devices
from bench.gpu import sampling
from bench.gpu.device import Device
from bench.gpu.matrix import Case
from bench.gpu.recipes import RECIPES
from bench.gpu.sampling import Sampler
from engine.errors import DgRunError, OutOfMemoryError
from engine.plan import Plan

_FRAMES = 6
CALLS = 2
"""The first starts CUDA's libraries; the second is what a user waits for from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a case's process is told to do."""

    case: dict[str, Any]
    plan: dict[str, Any] | None = None
    cap_bytes: int | None = None
    card_bytes: int | None = None
    uuid: str | None = None
    dry: bool = False
    limit_s: float = 600.0
    second_under_s: float | None = None
    """A second call is made only where the first took less; None: always."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of it: `status` is measured, oom, or failed."""

    status: str = "measured"
    because: str | None = None
    phase: str | None = None
    """Where it stopped."""
    measured: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    order = Order(**json.load(sys.stdin))
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps(asdict(measure(order))), file=answer, flush=True)


def measure(order: Order, ready: Any = None) -> Outcome:
    """Return what became of a case. `ready` is a pipeline that was built for it, its weights on meta."""
    case = Case.of(order.case)
    outcome = Outcome()
    if order.dry:
        import torch

        torch.set_num_threads(1)
    sampler = sampling.of_card(order.uuid)
    outcome.measured["before"] = asdict(sampler.look())  # CUDA starts: what is used so far is others'
    try:
        device = devices.opened(dry=order.dry)
        if case.kind == "machine":
            from bench.gpu import machine

            outcome.measured |= machine.measured(case.part or "", device, sampler, _plan(order))
        else:
            _run(case, order, device, sampler, outcome, ready)
    except Exception as error:  # noqa: BLE001 - what a foreign library raises is not one class, and all of it is an answer
        explain(error, outcome)
    return outcome


def explain(error: Exception, outcome: Outcome) -> None:
    """Say in an outcome what went wrong."""
    import torch

    is_full = isinstance(error, OutOfMemoryError | torch.OutOfMemoryError)
    outcome.status = "oom" if is_full else "failed"
    said = unnamed(" ".join(str(error).split()))[:600]
    outcome.because = said if isinstance(error, DgRunError) else f"{type(error).__name__}: {said}"
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    outcome.measured["where"] = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]


def unnamed(text: str) -> str:
    """Return what a library said without the folders of this machine, which can hold a user's name."""
    for folder, name in ((sys.prefix, "<python>"), (str(Path.cwd()), "<here>"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def _run(case: Case, order: Order, device: Device, watched: Sampler, outcome: Outcome, ready: Any) -> None:
    """Build, place and call a pipeline, and keep in `outcome` whatever was measured before it stopped."""
    from bench.gpu import phases

    started = time.perf_counter()
    with watched.running() as sampler, device.capped(order.cap_bytes, order.card_bytes):
        watch = phases.Watch(device, sampler)
        found = outcome.measured
        try:
            watch.begin("load")
            pipe, arguments = _placed(case, order, device, ready)
            found["load"] = phases.plain(watch.end())
            found["calls"] = []
            for _ in range(CALLS):
                found["calls"].append(_call(pipe, arguments, watch, device))
                took = found["calls"][-1]["seconds"]
                if time.perf_counter() - started + took * 1.2 > order.limit_s:
                    break  # the next would be cut off
                if order.second_under_s is not None and took > order.second_under_s:
                    break
        except Exception:
            outcome.phase = watch.now
            found["peaks_at_the_end"] = asdict(device.peaks())
            raise
        finally:
            found["host"] = {"pinned_bytes": device.pinned_bytes(), **host_peaks(), "trimmed_bytes": _trimmed()}
            with contextlib.suppress(RuntimeError):  # after an error of CUDA's own nothing works any more
                device.synchronize()
            found["at_rest"] = asdict(sampler.look()) | {"reserved_bytes": device.reserved_bytes()}


def dtype_of(order: Order) -> str:
    """Return the dtype that a case's pipeline is made in."""
    from engine.run import load

    plan = _plan(order)
    return Case.of(order.case).dtype or "float32" if plan is None else load.context(plan).dtype


def is_on_card(order: Order) -> bool:
    """Whether a case's weights are made on the card."""
    from bench.gpu import predict

    plan = _plan(order)
    return plan is not None and predict.is_built_on_card(plan.optimizers)


def _placed(case: Case, order: Order, device: Device, ready: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline with its weights where they are to be, and the arguments of its call."""
    import torch

    from bench.gpu import weights
    from engine import facts
    from engine.dryrun import inputs
    from engine.optimizers.spec import Context
    from engine.run import load

    assert case.model is not None
    _settle()
    torch.manual_seed(0)
    model = facts.find(case.model)
    plan = _plan(order)
    dtype, on_card = dtype_of(order), is_on_card(order)
    pipe = weights.filled(ready or weights.weightless(model, dtype), device.kind if on_card else "cpu")
    arguments = inputs.call(
        model,
        pipe,
        height=case.height,
        width=case.width,
        frames=case.frames,
        batch=case.batch,
        steps=case.steps,
        guidance=model.defaults.guidance if plan is None else plan.request.guidance,
        extra=model.defaults.call if plan is None else plan.request.call,
    )
    if plan is not None:
        load.apply_steps(plan, pipe, Context(device=device.kind, dtype=dtype))
    else:
        assert case.recipe is not None and case.budget_bytes is not None
        RECIPES[case.recipe].apply(pipe, device.kind, case.budget_bytes)
    return pipe, arguments


def _plan(order: Order) -> Plan | None:
    return None if order.plan is None else Plan.from_json(json.dumps(order.plan))


def _settle() -> None:
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()


def _call(pipe: Any, arguments: dict[str, Any], watch: Any, device: Device) -> dict[str, Any]:
    """Return what one call took, phase by phase."""
    from bench.gpu import phases

    with phases.marked(pipe, watch):
        watch.begin(phases.BEFORE)
        started = time.perf_counter()
        result = pipe(**arguments)
        del result
        done = watch.end()
        return {
            "seconds": round(time.perf_counter() - started, 6),
            "phases": phases.plain(done),
            "step_seconds": [round(s, 6) for s in watch.step_seconds()],
        }


def _trimmed() -> int | None:
    """Return the anonymous memory that is left once the C library has given back what it only keeps."""
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library than GNU's
        return None
    return host_peaks()["anonymous_bytes"]


def host_peaks() -> dict[str, int | None]:
    """Return the most of the host's memory that this process had, of files and without."""
    found: dict[str, int | None] = {"peak_bytes": None, "anonymous_bytes": None}
    with contextlib.suppress(OSError):
        with Path("/proc/self/status").open(encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        for name, key in (("peak_bytes", "VmHWM"), ("anonymous_bytes", "RssAnon")):
            if key in lines:
                found[name] = int(lines[key].split()[0]) * 1024
    return found


if __name__ == "__main__":
    main()
