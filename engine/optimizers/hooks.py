"""The hooks that diffusers' registry has put on a live module's parts, and the layers that its optimizations act on."""

from __future__ import annotations

from typing import Any


def of(module: Any, name: str) -> dict[str, Any]:
    """Return the hooks of this name on a module and its parts, by path; the module's own path is empty."""
    found = {}
    for path, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and (hook := registry.get_hook(name)) is not None:
            found[path] = hook
    return found


def are_layers() -> tuple[type, ...]:
    """Return the classes that are one layer to layerwise casting and to groups of leaves.

    Source: `_GO_LC_SUPPORTED_PYTORCH_LAYERS` of diffusers 0.42, `hooks/_common.py`.
    """
    from torch import nn

    return (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.Linear, nn.Embedding),
    )


def first(paths: set[str]) -> str:
    """Return the first of some paths for a line of text, and how many more there are."""
    ordered = sorted(paths)
    shown = ordered[0] or "itself"
    return shown if len(ordered) == 1 else f"{shown} and {len(ordered) - 1} more"
