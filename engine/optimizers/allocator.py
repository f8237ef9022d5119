"""`allocator`: torch takes the card's memory in segments that grow, so that less of it lies idle between tensors.

Source of the behaviour: torch 2.13, `c10/cuda/CUDAAllocatorConfig.h` and `c10/core/AllocatorConfig.h`. The settings are
read once, of `PYTORCH_CUDA_ALLOC_CONF` or `PYTORCH_ALLOC_CONF`, before CUDA starts; what an allocator has taken in
another way stays so until the process ends. What the user has set there is kept, and joined by `expandable_segments`.
It is the process's, and cannot be undone.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="allocator",
    summary="the card's memory is taken in segments that grow, so that less of it lies idle between tensors",
    slot=1,
    is_of_process=True,
    lasts="what torch's allocator has taken it keeps until the process ends",
)
load_arguments = nothing_to_load

_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The first is what every tested version of torch reads of CUDA's allocator, alone or before the other."""
_SETTING = "expandable_segments"


def before_start(step: Step) -> None:
    """Set the allocator up. Raises: IncompatibleError, when CUDA runs with other settings, or the user's say no."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        if not _settings(torch).get(_SETTING):
            raise IncompatibleError(
                "allocator cannot act: CUDA has started without expandable segments",
                "torch's allocator reads its settings when CUDA starts, and keeps what it has taken until then",
                "start a new process, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before it, or leave "
                "allocator out",
            )
        return
    named = [n for n in _VARIABLES if os.environ.get(n)] or [_VARIABLES[0]]
    joined = {name: merged(name, os.environ.get(name, "")) for name in named}
    os.environ.update(joined)
    if torch is not None:  # it may have read the environment when it was imported
        torch._C._accelerator_setAllocatorSettings(joined[named[0]])


def merged(variable: str, said: str) -> str:
    """Return what an environment variable says, with expandable segments. Raises: IncompatibleError, if it says no."""
    wanted = _of(said, _SETTING)
    backend = _of(said, "backend")
    if (wanted or "true").lower() != "true" or (backend or "native") != "native":
        because = f"{_SETTING}:{wanted}" if backend in (None, "native") else f"backend:{backend}"
        raise IncompatibleError(
            "allocator cannot act beside the settings of your own",
            f"{variable} says {because}, and segments grow only in torch's native allocator, where it is told so",
            f"take it out of {variable}, or leave allocator out",
        )
    return said if wanted else ",".join(filter(None, (said.strip().rstrip(","), f"{_SETTING}:True")))


def _of(said: str, key: str) -> str | None:
    found = re.search(rf"(?:^|,)\s*{key}\s*:\s*(\w+)", said)
    return None if found is None else found[1]


def _settings(torch: Any) -> dict[str, Any]:
    """Return what CUDA's allocator says it was set to."""
    found: dict[str, Any] = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return found


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    before_start(step)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    import torch

    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        raise NotApplied(SPEC.name, "CUDA has not started, so that there is no allocator to ask")
    if not _settings(torch).get(_SETTING):
        raise NotApplied(SPEC.name, "CUDA's allocator says that its segments do not grow")
    plain = [s for s in cuda.memory_snapshot() if not s.get("is_expandable")]
    if plain:
        size = sum(s["total_size"] for s in plain)
        raise NotApplied(SPEC.name, f"{len(plain)} segments with {size} bytes are of a kind that does not grow")
    return "segments grow (expandable_segments)"
