"""`attention_backend`: the denoiser's attention is computed by the kernel that is named, and by no other.

Source of the behaviour: diffusers 0.42, `models/attention_dispatch.py`. A model's own `set_attention_backend` sets the
default of the whole process beside, so that it is not called here: the name is given to the processors of this
pipeline's denoisers, where the dispatcher looks first. Their choices are those that give the plain picture up to the
order of sums. Left out are SageAttention, which rounds to 8 bits, kernels that are fetched from the hub as code, flex,
which is slow until it is compiled, and what packs sequences of unequal length.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from engine import versions
from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, nothing_to_load
from engine.values import Step
from engine.words import listing

SPEC = Spec(
    name="attention_backend",
    summary="the denoiser's attention is computed by the kernel that is named, and by no other",
    slot=36,
    changes_computing=True,
    params=(
        Param(
            name="backend",
            kind="word",
            default="native",
            choices=(
                "native",
                "_native_flash",
                "_native_efficient",
                "_native_cudnn",
                "_native_math",
                "flash",
                "xformers",
            ),
            about="as diffusers calls it; native leaves the choice to torch, whatever the process's default is",
        ),
    ),
)
load_arguments = nothing_to_load

PACKAGES = {"flash": ("flash-attn", "2.6.3"), "xformers": ("xformers", "0.0.29")}
"""What a backend is a kernel of, if not of torch, and the least version that diffusers takes."""
_ASKED, _BEFORE = "_attention_backend", "_dg_run_attention_backend"


def before_start(step: Step) -> None:
    """Raises: IncompatibleError, when the package that a backend belongs to is missing, or too old."""
    package, least = PACKAGES.get(step.params["backend"], ("", ""))
    if not package:
        return
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not versions.within(found, f">={least}"):
        raise IncompatibleError(
            f"attention_backend cannot be {step.params['backend']} here",
            f"{package} is not installed" if found is None else f"{package} is {found}, and diffusers wants {least}",
            f"pip install '{package}>={least}', or take a backend of torch's own (native)",
        )


def _processors(pipe: Pipeline) -> dict[str, list[Any]]:
    """Return the processors that ask for a backend, of each denoiser that has any."""
    found = {}
    for name, module in denoisers(pipe).items():
        processors = (getattr(part, "processor", None) for part in module.modules())
        asking = {id(p): p for p in processors if hasattr(p, _ASKED)}
        if asking:
            found[name] = list(asking.values())
    return found


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    from diffusers.models import attention_dispatch

    targets = _processors(pipe)
    if not targets:
        raise IncompatibleError(
            f"attention_backend cannot act on {type(pipe).__name__}",
            "the attention of its denoiser asks for no backend",
            "leave attention_backend out for this model",
        )
    before_start(step)
    backend = attention_dispatch.AttentionBackendName(step.params["backend"])
    attention_dispatch._check_attention_backend_requirements(backend)
    for processor in (p for several in targets.values() for p in several):
        if not hasattr(processor, _BEFORE):
            setattr(processor, _BEFORE, getattr(processor, _ASKED))
        setattr(processor, _ASKED, backend)


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    wanted, told = step.params["backend"], []
    for name, processors in _processors(pipe).items():
        others = [p for p in processors if getattr(getattr(p, _ASKED), "value", None) != wanted]
        if others:
            raise NotApplied(SPEC.name, f"{len(others)} of {len(processors)} attentions of {name} ask for another")
        told.append(f"{len(processors)} attentions of {name} by {wanted}")
    if not told:
        raise NotApplied(SPEC.name, "no attention of what denoises asks for a backend")
    return "; ".join(told)


def seen(pipe: Pipeline, context: Context) -> str | None:
    told = []
    for name, processors in _processors(pipe).items():
        named = {str(getattr(b, "value", b)) for p in processors if (b := getattr(p, _ASKED)) is not None}
        told += [f"attentions of {name} ask for {listing(sorted(named))}"] if named else []
    return "; ".join(told) or None


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Let every attention ask for what it asked for before."""
    for processor in (p for several in _processors(pipe).values() for p in several):
        if hasattr(processor, _BEFORE):
            setattr(processor, _ASKED, getattr(processor, _BEFORE))
            delattr(processor, _BEFORE)
