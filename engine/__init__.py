"""dg-run: run a diffusion pipeline on the GPU that is there.

>>> import engine
>>> plan = engine.resolve(height=128, width=128, device="cpu")
>>> [step.name for step in plan.optimizers]
['dtype', 'vae_slicing', 'resident']

`resolve` gives a `Plan`: a plain value that says what would be run and why. Nothing here imports torch until a plan is
loaded, applied or run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.advice import advise
    from engine.api import resolve
    from engine.check import Check
    from engine.drift import Drift
    from engine.errors import (
        DgRunError,
        FileError,
        HardwareError,
        IncompatibleError,
        ModelError,
        NothingFitsError,
        OutOfMemoryError,
        ProfileError,
        UsageError,
    )
    from engine.lock import Lock
    from engine.lockfile import read as read_lock
    from engine.plan import Plan
    from engine.rungs import ladder
    from engine.version import __version__

__all__ = [
    "Check",
    "DgRunError",
    "Drift",
    "FileError",
    "HardwareError",
    "IncompatibleError",
    "Lock",
    "ModelError",
    "NothingFitsError",
    "OutOfMemoryError",
    "Plan",
    "ProfileError",
    "UsageError",
    "__version__",
    "advise",
    "ladder",
    "read_lock",
    "resolve",
]

_HOMES = {
    "resolve": "engine.api",
    "advise": "engine.advice",
    "ladder": "engine.rungs",
    "Plan": "engine.plan",
    "Lock": "engine.lock",
    "read_lock": "engine.lockfile",
    "Drift": "engine.drift",
    "Check": "engine.check",
    "__version__": "engine.version",
}
_OTHER_NAMES = {"read_lock": "read"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "engine.errors")), _OTHER_NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
