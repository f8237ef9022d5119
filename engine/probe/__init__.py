"""What the machine has at this moment: one snapshot for one decision. No torch, no CUDA context."""

from __future__ import annotations

from engine.probe import host, nvml
from engine.values import Hardware


def snapshot() -> Hardware:
    """Return the cards a new process could use, and the host around them.

    Raises: HardwareError, when there is a card whose driver does not answer as it should.
    """
    gpus, because = nvml.visible_gpus()
    return Hardware(gpus=gpus, host=host.snapshot(), no_gpu_because=because)
