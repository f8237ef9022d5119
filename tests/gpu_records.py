"""Records of the GPU harness that nobody measured: invented figures, for the tests of its report.

They are made, and not kept as a file, so that their plans are always of the present schema.
"""

from __future__ import annotations

from typing import Any

import engine
from bench.gpu import matrix, predict
from bench.gpu.journal import SCHEMA
from bench.gpu.matrix import Case
from engine.units import GIB
from engine.values import Hardware

MACHINE: dict[str, Any] = {
    "device": "cuda",
    "card": "Invented Card",
    "driver": "1.2.3",
    "versions": {"dg-run": "0", "torch": "2.13.0"},
    "revision": "0000000",
    "gpu": {"arch": "9.0"},
}


def hardware() -> Hardware:
    """Return an H100 that is not here."""
    return engine.resolve(gpu="H100 SXM", host_ram="128GiB").hardware


def case(case_id: str) -> Case:
    """Return a case of the full or the quick set by its id."""
    return next(c for c in (*matrix.cases("quick"), *matrix.cases("full")) if c.id == case_id)


def phase(name: str, gib: float, seconds: float, reserved_gib: float | None = None) -> dict[str, Any]:
    """Return a phase as it is recorded."""
    reserved = gib if reserved_gib is None else reserved_gib
    return {
        "name": name,
        "seconds": seconds,
        "allocated_bytes": round(gib * GIB),
        "reserved_bytes": round(reserved * GIB),
        "nvml_process_bytes": round((reserved + 0.5) * GIB),
        "nvml_card_bytes": round((reserved + 3.5) * GIB),
    }


def measured(peak_gib: float, seconds: float, step_s: float = 0.1) -> dict[str, Any]:
    """Return what a run measured whose first call took twice as long as its second, and 1 GiB less."""

    def call(factor: float, most_gib: float) -> dict[str, Any]:
        phases = [
            phase("encode", most_gib / 2, 0.25 * seconds * factor),
            phase("denoise", most_gib, 0.5 * seconds * factor, most_gib + 1),
            phase("decode", most_gib / 3, 0.25 * seconds * factor),
        ]
        return {"seconds": seconds * factor, "phases": phases, "step_seconds": [step_s] * 3}

    return {
        "before": {"process_bytes": None, "card_bytes": 3 * GIB},
        "load": [phase("load", peak_gib / 4, 1.0)],
        "calls": [call(2, peak_gib), call(1, peak_gib + 1)],
        "host": {"pinned_bytes": 0, "peak_bytes": 2 * GIB, "anonymous_bytes": GIB},
    }


def record(of: Case | str, status: str = "measured", because: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a record; its plan is dg-run's own for the invented card, of a list: nothing is searched for."""
    of = case(of) if isinstance(of, str) else of
    listed = of if of.kind != "chosen" else case(f"exact/{of.id.split('/', 1)[1].rpartition('/')[0]}/float16/resident")
    expected = predict.outlook(listed, hardware())
    return {
        "schema": SCHEMA,
        "id": of.id,
        "case": of.plain(),
        "machine": MACHINE,
        "at": 0,
        "wall_s": 1.0,
        "cap_bytes": expected.cap_bytes,
        "plan": None if expected.plan is None else predict.plain(expected.plan),
        "status": status,
        "because": because,
        "phase": None,
        "measured": {},
        **more,
    }


def records() -> list[dict[str, Any]]:
    """Return one of each kind."""
    sdxl = "SDXL/1024x1024/4steps"
    return [
        record("machine/context", measured=_context()),
        record(f"exact/{sdxl}/float16/resident", measured=measured(8.0, 1.0)),
        record(f"exact/{sdxl}/float16/model", measured=measured(6.0, 2.0)),
        record(f"exact/{sdxl}/float16/group-leaf", "oom", "CUDA out of memory", phase="decode"),
        record(f"chosen/{sdxl}/8GiB", measured=measured(5.0, 3.0)),
        record(f"chosen/{sdxl}/12GiB", "oom", "CUDA out of memory"),
        record(f"required/{sdxl}/float16/resident/+3.0%", "oom", "CUDA out of memory"),
        record(f"required/{sdxl}/float16/model/+3.0%", measured=measured(6.0, 2.5)),
        record(f"recipe/{sdxl}/float16/model/8GiB", measured=measured(6.0, 2.2)),
        record(f"recipe/{sdxl}/float16/group/8GiB", "oom", "CUDA out of memory"),
        record(f"recipe/{sdxl}/float16/mmgp/8GiB", "skipped", "not installed: pip install mmgp"),
        record(f"exact/{sdxl}/float16/sequential", "timeout", "it was ended after 6 min 0 s"),
    ]


def _context() -> dict[str, Any]:
    stage = {"after": "a tensor", "allocated_bytes": 512, "kept_bytes": 0, "reserved_bytes": 2 * 1024**2}
    return {
        "before": {"process_bytes": None, "card_bytes": GIB},
        "torch": {"device": "cuda"},
        "context": [stage | {"process_bytes": None, "card_bytes": 2 * GIB + 2 * 1024**2}],
    }
