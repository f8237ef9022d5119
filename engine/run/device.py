"""Make the chosen card, and no other, the one that CUDA sees; then look that it is."""

from __future__ import annotations

import os
import sys

from engine.errors import HardwareError
from engine.plan import Plan
from engine.probe import nvml


def choose(plan: Plan) -> None:
    """Set the environment so that the plan's card is CUDA's only one. To be called before torch starts CUDA.

    The card is named by UUID, since CUDA numbers cards by speed and NVML by bus.

    Raises: HardwareError, when the plan is for a card that is not here, or CUDA has already started on others.
    """
    planned = plan.card
    if plan.device is None or planned is None:
        return
    if planned.hypothetical:
        raise HardwareError(
            f"the plan is for a hypothetical card ({planned.name})",
            "it can be read, not run",
            "plan without --gpu and --vram",
        )
    if plan.device.uuid is not None:
        make_visible(plan.device.uuid)
    _cap(plan, planned.total_bytes)


def make_visible(uuid: str) -> None:
    """Make the card of this UUID CUDA's only one, and start CUDA on it. Raises: HardwareError, when it cannot be."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    _check(uuid)


def _cap(plan: Plan, total_bytes: int | None) -> None:
    """Hold the process to the memory that the user allowed it, so that neighbours on the card are safe."""
    if plan.request.vram_bytes is not None and total_bytes:
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.request.vram_bytes / total_bytes), 0)


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
