"""What dg-run says of a case before it runs: its plan, the memory it may have, and why it would be no use to run it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import engine
from bench.gpu.matrix import Case, step
from engine import facts, optimizers
from engine.errors import DgRunError
from engine.estimate import bounds, store, stream, whole, workspaces
from engine.estimate.ways import way
from engine.plan import Plan
from engine.units import format_size
from engine.values import Gpu, Hardware, Step

_HOPELESS = 1.1
"""Beyond the card's memory by this factor a run only shows once more that it does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a case before it runs."""

    plan: Plan | None = None
    cap_bytes: int | None = None
    """What the allocator may hold; None for the whole card."""
    status: str | None = None
    """Where it will not be run: "skipped", or "refused", when dg-run itself says that nothing fits."""
    because: str | None = None


def outlook(case: Case, hardware: Hardware, told: Callable[[str], None] | None = None) -> Outlook:
    """Return the outlook of a case on a machine. Imports no torch."""
    if case.kind == "machine":
        return _machine(case, hardware, told)
    (card, *_) = hardware.gpus
    if case.budget_bytes is not None and card.total_bytes is not None and case.budget_bytes > card.total_bytes:
        return Outlook(status="skipped", because=f"the card has {format_size(card.total_bytes)}")
    if case.kind == "recipe":
        assert case.budget_bytes is not None
        return Outlook(cap_bytes=max(1, case.budget_bytes - _context_bytes(card)))
    try:
        plan = plan_of(case, hardware, told)
    except DgRunError as error:
        return Outlook(status="skipped", because=" ".join(str(error).split()))
    context = _context_bytes(card, plan.optimizers)
    if case.kind == "chosen":
        assert case.budget_bytes is not None
        if plan.fits is False:
            why = "; ".join(f"{r.profile}: {r.because}" for r in plan.rejected)
            return Outlook(plan=plan, status="refused", because=why)
        return Outlook(plan=plan, cap_bytes=max(1, case.budget_bytes - context))
    if useless := _useless(case, plan, card):
        return Outlook(plan=plan, status="skipped", because=useless)
    required = plan.estimate.required_bytes
    if case.kind == "exact":
        return Outlook(plan=plan)
    if required is None:
        return Outlook(plan=plan, status="skipped", because="what it requires is not known")
    allowed = round(required * (1 + (case.margin or 0.0)))
    return Outlook(plan=plan, cap_bytes=max(1, allowed - context))


def _context_bytes(card: Gpu, steps: Sequence[Step] = ()) -> int:
    """Return what the context is said to take, which the allocator's limit does not count."""
    capability = card.compute_capability
    return 0 if capability is None else workspaces.context_bytes(capability, copies_aside=copies_aside(steps))


def copies_aside(steps: Sequence[Step]) -> bool:
    """Whether weights are copied on a stream of their own."""
    return any(s.name == "group_offload" and s.params["use_stream"] for s in steps)


def _machine(case: Case, hardware: Hardware, told: Callable[[str], None] | None) -> Outlook:
    """A measure of what a model computes needs its request, which a plan holds."""
    if case.model is None:
        return Outlook()
    listed = (step({"dtype": case.dtype or "auto"}), step("resident"))
    try:
        return Outlook(plan=plan_of(dataclasses.replace(case, optimizers=listed), hardware, told))
    except DgRunError as error:
        return Outlook(status="skipped", because=" ".join(str(error).split()))


def plan_of(case: Case, hardware: Hardware, told: Callable[[str], None] | None = None) -> Plan:
    """Return dg-run's plan of a case, or (of no list) what it chooses. Raises: DgRunError."""
    return engine.resolve(
        case.model,
        height=case.height,
        width=case.width,
        frames=case.frames,
        batch=case.batch,
        steps=case.steps,
        optimizers=list(case.optimizers) if case.kind != "chosen" else None,
        vram=case.budget_bytes if case.kind == "chosen" else None,
        hardware=hardware,
        told=told,
    )


def _useless(case: Case, plan: Plan, card: Gpu) -> str | None:
    idle = [n.optimizer for n in plan.notes if n.kind == "no_effect" and n.optimizer]
    if idle:
        return f"{', '.join(idle)} would have no effect: the case without it is the same"
    need, ram = plan.estimate.required_bytes, plan.hardware.host.ram_bytes
    if need is not None and card.free_bytes is not None and need > card.free_bytes * _HOPELESS:
        return f"it needs {format_size(need)} on the card, of which {format_size(card.free_bytes)} are free"
    held = host_bytes(plan)
    if held is not None and ram is not None and held > ram:
        return f"it needs {format_size(held)} of host memory, and {format_size(ram)} are available"
    return None


def is_built_on_card(steps: Sequence[Step]) -> bool:
    """Whether weights can be made where they stay. What is changed before it is moved is made on the host."""
    return {s.name for s in steps} <= {"dtype", "resident", "vae_tiling", "vae_slicing", "attention_slicing"}


def host_bytes(plan: Plan) -> int | None:
    """Return the host memory of a run here: weights come from no file, so that a file's pages are anonymous as well."""
    taken = plan.estimate.host
    if taken.anonymous_bytes is None:
        return None
    if is_built_on_card(plan.optimizers):
        return bounds.HOST_BASE_BYTES
    return taken.anonymous_bytes + (taken.pinned_bytes or 0) + (taken.file_bytes or 0)


def tensor_peaks(plan: Plan) -> dict[str, int] | None:
    """Return the peak of each phase of tensors alone, to the byte: what a device that counts them should see.

    No workspace is among them, and no rounding. None where the trace is not at hand.
    """
    request = plan.request
    dtype = next((str(s.params["value"]) for s in plan.optimizers if s.name == "dtype"), "float32")
    changes = optimizers.changing(plan.optimizers)
    is_plain = request.exact and not way(plan.optimizers)
    trace = store.find(facts.find(request.model), request, dtype, changes, is_plain=is_plain)
    if trace is None:
        return None
    along = trace.along(way(plan.optimizers)).without(request.components)
    found = stream.build(along, whole.placed(along, plan.optimizers, dtype))
    return {p.name: p.peak_bytes for p in stream.peaks(found, granule_bytes=1)}


def plain(plan: Plan) -> dict[str, Any]:
    """Return a plan as a record keeps it: without what names one card or its users."""
    found: dict[str, Any] = json.loads(plan.without_identity().to_json(indent=None))
    return found
