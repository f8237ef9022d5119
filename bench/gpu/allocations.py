"""What a resident run holds at the peak of each phase, block by block, as CUDA's own allocator tells it.

A prediction that is off by some bytes says nothing of which tensor it missed; this does. Weights are summed.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.gpu import phases, weights
from bench.gpu.device import Device
from engine import facts
from engine.dryrun import inputs
from engine.plan import Plan
from engine.run.load import context

_MOST_ENTRIES = 4_000_000
_LEAST_BYTES = 16 << 10
_STEPS = 2
_ALLOCATED, _FREED, _TAKEN, _GIVEN_BACK = "alloc", "free_completed", "segment_alloc", "segment_free"
_FOREIGN = ("torch/nn/modules/module.py", "torch/utils", "accelerate/hooks", "bench/gpu")


class _Marks:
    """Notes when each phase begins, in the clock of the allocator's history."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []

    def enter(self, kind: str) -> None:
        if not self.begun or self.begun[-1][0] != kind:
            torch.cuda.synchronize()
            self.begun.append((kind, time.time_ns() // 1000))

    def step(self) -> None:
        pass


def measured(device: Device, plan: Plan) -> dict[str, Any]:
    """Return, for each phase of one call, the peak and the blocks that were held at it beside the weights."""
    model, request = facts.find(plan.request.model), plan.request
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_MOST_ENTRIES)
    pipe = weights.pipeline(model, context(plan).dtype, device.kind)
    arguments = inputs.call(
        model,
        pipe,
        height=request.height,
        width=request.width,
        frames=request.frames,
        batch=request.batch,
        steps=_STEPS,
        guidance=request.guidance,
        extra=request.call,
    )
    marks = _Marks()
    marks.enter("start")
    with phases.marked(pipe, marks), torch.no_grad():
        pipe(**arguments)
    device.synchronize()
    (history, *_) = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(None)
    return {"allocations": _peaks(history, marks.begun)}


def _peaks(history: list[dict[str, Any]], begun: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Walk through a history, and return what is live where each phase has its most."""
    live: dict[int, tuple[int, str]] = {}
    loaded: set[int] = set()
    found: list[dict[str, Any]] = []
    now = most = 0
    coming = [*begun, ("", 1 << 62)]
    at: dict[int, tuple[int, str]] | None = {}  # None while the peak still grows
    for entry in history:
        while entry["time_us"] >= coming[0][1]:
            name, _ = coming.pop(0)
            if not found:
                loaded = set(live)
            else:
                found[-1] |= _told(most, live if at is None else at, loaded)
            found.append({"phase": name})
            most, at = now, dict(live)
        if found and entry["action"] in (_TAKEN, _GIVEN_BACK):
            sign = 1 if entry["action"] == _TAKEN else -1
            told = [sign * entry["size"], now, _where(entry.get("frames") or ()), entry["addr"]]
            found[-1].setdefault("segments", []).append(told)
        if entry["action"] == _ALLOCATED:
            size = -(-entry["size"] // 512) * 512
            live[entry["addr"]] = size, _where(entry.get("frames") or ())
            now += size
            if now > most:
                most, at = now, None
        elif entry["action"] == _FREED and entry["addr"] in live:
            if at is None:
                at = dict(live)  # the peak ends here
            now -= live.pop(entry["addr"])[0]
            loaded.discard(entry["addr"])
    if found:
        found[-1] |= _told(most, live if at is None else at, loaded)
    return found


def _told(most: int, at: dict[int, tuple[int, str]] | None, loaded: set[int]) -> dict[str, Any]:
    blocks = Counter(b for a, b in (at or {}).items() if a not in loaded and b[0] >= _LEAST_BYTES)
    return {
        "blocks_bytes": most,
        "loaded_bytes": sum(b[0] for a, b in (at or {}).items() if a in loaded),
        "blocks": [[size, count, where] for (size, where), count in sorted(blocks.items(), reverse=True)],
    }


def _where(frames: Any) -> str:
    for frame in frames:
        name = str(frame["filename"])
        if name.endswith(".py") and not any(part in name for part in _FOREIGN):
            return f"{Path(name).name}:{frame['line']} {frame['name']}"
    return ""
