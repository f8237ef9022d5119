"""Make the chosen card, and no other, the one that CUDA sees; then look that it is."""

from __future__ import annotations

import gc
import os
import sys

from engine.errors import HardwareError
from engine.plan import Plan
from engine.probe import nvml
from engine.run import tables


def choose(plan: Plan) -> None:
    """Set the environment so that the plan's card is CUDA's only one. To be called before torch starts CUDA.

    The card is named by UUID, since CUDA numbers cards by speed and NVML by bus.

    Raises: HardwareError, when the plan is for a card that is not here, or CUDA has already started on others.
    """
    if plan.device is None or plan.card is None:
        return
    refuse_imagined(plan)
    if plan.device.uuid is not None:
        make_visible(plan.device.uuid)
    _cap(plan)


def refuse_imagined(plan: Plan) -> None:
    """Raises: HardwareError, where a plan is for a card that is not here."""
    if plan.card is not None and plan.card.hypothetical:
        raise HardwareError(
            f"the plan is for a hypothetical card ({plan.card.name})",
            "it can be read, not run",
            "plan without --gpu and --vram",
        )


def make_visible(uuid: str) -> None:
    """Make the card of this UUID CUDA's only one, and start CUDA on it. Raises: HardwareError, when it cannot be."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    _check(uuid)


def _cap(plan: Plan) -> None:
    """Hold the process to its plan's budget, so that neighbours on the card are safe."""
    import torch

    total = int(torch.cuda.get_device_properties(0).total_memory)  # of an instance of MIG, the instance's own
    most = most_reserved_bytes(plan)
    # Half a byte more: torch cuts what it gets off to whole bytes.
    share = 1.0 if most is None else min(1.0, (int(torch.cuda.memory_reserved(0)) + most + 0.5) / total)
    torch.cuda.set_per_process_memory_fraction(share, 0)


def most_reserved_bytes(plan: Plan) -> int | None:
    """Return what torch's allocator may reserve for a plan: its budget less the context; None where there is no limit.

    torch counts what its allocator has reserved, and not the context (CUDACachingAllocator.cpp: `set_fraction`, against
    `totalGlobalMem` of the device). The context is that of the estimate: what is required is told by a replay within
    just this limit, so that a plan that fits by its estimate fits under it. A plan that runs although it was not
    expected to fit has no limit but that of `--vram`.
    """
    if any(n.kind == "forced" for n in plan.notes):
        return plan.request.vram_bytes
    if plan.budget_bytes is None:
        return None
    taken = plan.estimate
    known = taken.device_bytes is not None and taken.peak_reserved_bytes is not None
    context = (taken.device_bytes or 0) - (taken.peak_reserved_bytes or 0) if known else 0
    return max(0, plan.budget_bytes - context)


def _check(uuid: str) -> None:
    import torch

    if not torch.cuda.is_available():
        reading = nvml.read()
        shown = f"the driver shows {len(reading.gpus)}, and this torch ({torch.__version__}) starts CUDA on none"
        raise HardwareError(
            "torch cannot use the card",
            reading.nothing_because or shown,
            "install a torch built for CUDA (pip install torch), or run with --device cpu",
        )
    seen = str(torch.cuda.get_device_properties(0).uuid)
    if not uuid.startswith("MIG-") and seen not in uuid:
        raise HardwareError(
            "CUDA started on another card than the one that is meant",
            f"meant is {uuid}, and this is GPU-{seen}",
            "start a new process, without another CUDA_VISIBLE_DEVICES",
        )


def peak_allocated_bytes(device: str) -> int | None:
    """Return the most bytes that were in live device tensors since `reset_peak`, or None without a card."""
    if device != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated())


def is_started(device: str) -> bool:
    """Whether this process has a context on the card."""
    torch = sys.modules.get("torch")
    return device == "cuda" and torch is not None and torch.cuda.is_initialized()


def reserved_bytes(device: str) -> int:
    """Return what torch's allocator holds of the card: tensors, and what it keeps for others. 0 without one."""
    if not is_started(device):
        return 0
    import torch

    return int(torch.cuda.memory_reserved(0))


def release(device: str) -> None:
    """Give back everything that nothing holds any more, on the card and of the pinned memory of the host."""
    tables.forget()
    gc.collect()
    empty_cache(device)
    if is_started(device):
        import torch

        torch.cuda.synchronize()
        torch._C._host_emptyCache()


def reset_peak(device: str) -> None:
    """Start measuring the peak anew."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def empty_cache(device: str) -> None:
    """Give back what the device's allocator only keeps, where it has one."""
    import torch

    module = getattr(torch, device, None)
    if device != "cpu" and module is not None:
        module.empty_cache()
