"""`channels_last`: two-dimensional convolutions keep their filters with the channels last, and so give their results.

Source of the behaviour: torch 2.13, `memory_format=torch.channels_last`; a convolution computes in that layout where
its filters or its input have it, and converts the other. It acts on what denoises and on the VAE. The layers of a
module are converted one by one: `Module.to(memory_format=...)` raises where there are three-dimensional ones beside.
The results are the plain ones up to the order of sums. Group norms give planar tensors on CUDA whatever they are given,
so that between two convolutions what passes through one is converted back and forth.
"""

from __future__ import annotations

from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Pipeline, Spec, denoisers, is_vae, modules, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="channels_last",
    summary="two-dimensional convolutions of what denoises and of the VAE keep their filters with the channels last",
    slot=37,
    changes_computing=True,
)
load_arguments = nothing_to_load


def _convolutions(pipe: Pipeline) -> dict[str, list[Any]]:
    """Return the two-dimensional convolutions of the components that it acts on, of each that has any."""
    from torch import nn

    found = {}
    for name, module in modules(pipe).items():
        if name in denoisers(pipe) or is_vae(name):
            layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
            if layers:
                found[name] = layers
    return found


def _lay_out(layers: list[Any], layout: Any) -> None:
    for layer in layers:
        # A filter of one pixel is in both layouts, and only a copy has the strides of the one that is meant.
        layer.weight.data = layer.weight.data.clone(memory_format=layout)


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch

    targets = _convolutions(pipe)
    if not targets:
        raise IncompatibleError(
            f"channels_last cannot act on {type(pipe).__name__}",
            "neither what denoises nor the VAE has two-dimensional convolutions",
            "leave channels_last out for this model",
        )
    for layers in targets.values():
        _lay_out(layers, torch.channels_last)


def _is_laid_out(layer: Any) -> bool:
    import torch

    return bool(layer.weight.is_contiguous(memory_format=torch.channels_last))


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    told = []
    for name, layers in _convolutions(pipe).items():
        planar = [m for m in layers if not _is_laid_out(m)]
        if planar:
            raise NotApplied(
                SPEC.name, f"the filters of {len(planar)} of {len(layers)} convolutions of {name} are planar"
            )
        told.append(f"{len(layers)} convolutions of {name}")
    if not told:
        raise NotApplied(SPEC.name, "there is no two-dimensional convolution")
    return f"channels last in {', '.join(told)}"


def seen(pipe: Pipeline, context: Context) -> str | None:
    found = [n for n, layers in _convolutions(pipe).items() if any(_is_only_last(m) for m in layers)]
    return f"filters of {', '.join(found)} have their channels last" if found else None


def _is_only_last(layer: Any) -> bool:
    """Whether a filter is in this layout and in no other."""
    return _is_laid_out(layer) and not layer.weight.is_contiguous()


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    import torch

    for layers in _convolutions(pipe).values():
        _lay_out(layers, torch.contiguous_format)
