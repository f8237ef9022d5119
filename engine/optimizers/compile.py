"""`compile`: the denoiser's blocks are compiled into kernels of their own at their first call.

Source of the behaviour: `torch.compile` of torch 2.13 and `ModelMixin.compile_repeated_blocks` of diffusers 0.42. A
block is compiled in place (`nn.Module.compile`), once for all that are alike; hooks on it stay as they are. Fused
kernels round in other places than the operators that they replace, so that the result is near. Modes that replay CUDA
graphs are not offered: they want weights that never move.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from typing import Any

from engine.errors import IncompatibleError
from engine.optimizers import hooks
from engine.optimizers.spec import Context, NotApplied, Param, Pipeline, Spec, denoisers, names
from engine.values import Step

SPEC = Spec(
    name="compile",
    summary="the denoiser's blocks are compiled into kernels of their own at their first call",
    slot=80,
    quality="near",
    params=(
        Param(
            name="scope",
            kind="word",
            default="regional",
            choices=("regional", "whole"),
            about="compile the blocks that repeat, once for all alike; or the whole denoiser, which takes much longer",
        ),
        Param(
            name="fullgraph",
            kind="bool",
            default=False,
            about="refuse whatever does not compile into one graph, instead of computing that part as ever",
        ),
        Param(
            name="mode",
            kind="word",
            default="default",
            choices=("default", "max-autotune-no-cudagraphs"),
            about="max-autotune-no-cudagraphs tries several kernels for each product and keeps the fastest",
        ),
    ),
)
BACKEND = "inductor"


def not_estimated(step: Step) -> str | None:
    """Return why there is no estimate of a run with it."""
    return "what compiled blocks hold and take is decided by their compiler: compile is not estimated"


def load_arguments(step: Step, context: Context) -> dict[str, Any]:
    """Nothing; but what compiling needs is looked for before anything is loaded. Raises: IncompatibleError."""
    _refuse_without_tools(context.device)
    return {}


@functools.cache
def _refuse_without_tools(device: str) -> None:
    """Raises: IncompatibleError, where the compiler that torch's compiler calls is missing."""
    if BACKEND != "inductor":
        return
    if device != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise IncompatibleError(
                "compile cannot act on this machine",
                "torch compiles for a card with triton, and finds none that this card can use",
                "pip install triton (on Windows: triton-windows), or leave compile out",
            )
        if shutil.which("gcc") is None and shutil.which("cc") is None and shutil.which("clang") is None:
            raise _no_compiler("triton builds its launchers with a C compiler, and none was found")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise _no_compiler(" ".join(str(error).split())[:200]) from error


def _no_compiler(why: str) -> IncompatibleError:
    return IncompatibleError(
        "compile cannot act on this machine",
        why,
        "install one (apt install g++; xcode-select --install; the Build Tools of Visual Studio), or leave compile out",
    )


def _regions(module: Any, step: Step) -> dict[str, Any]:
    """Return the parts of a denoiser that are compiled, by path; the denoiser's own path is empty."""
    if step.params["scope"] == "whole":
        return {"": module}
    classes = getattr(module, "_repeated_blocks", None) or ()
    return {path: part for path, part in module.named_modules() if type(part).__name__ in classes}


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    _refuse_without_tools(context.device)
    targets = denoisers(pipe)
    without = [n for n, m in targets.items() if not _regions(m, step)]
    if without or not targets:
        raise IncompatibleError(
            f"compile cannot act on {names(without) if without else type(pipe).__name__} by regions",
            "its class does not say which blocks repeat",
            "take the scope whole, or leave compile out for this model",
        )
    for module in targets.values():
        for part in _regions(module, step).values():
            part.compile(backend=BACKEND, fullgraph=step.params["fullgraph"], mode=step.params["mode"])


def _compiled(pipe: Pipeline) -> Mapping[str, set[str]]:
    """Return the paths of what is compiled, by component."""
    return {
        name: {
            path
            for path, part in module.named_modules()
            if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        }
        for name, module in denoisers(pipe).items()
    }


def undo(pipe: Pipeline, step: Step, context: Context) -> None:
    """Call the plain forward again. Kernels that were made stay in torch's caches."""
    for module in denoisers(pipe).values():
        for part in _regions(module, step).values():
            part._compiled_call_impl = None


def seen(pipe: Pipeline, context: Context) -> str | None:
    found = [f"{hooks.first(paths)} of {name}" for name, paths in _compiled(pipe).items() if paths]
    return f"{'; '.join(found)} is compiled already" if found else None


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    told = []
    for name, compiled in _compiled(pipe).items():
        planned = set(_regions(denoisers(pipe)[name], step))
        if missing := planned - compiled:
            raise NotApplied("compile", f"{hooks.first(missing)} of {name} is not compiled")
        if more := compiled - planned:
            raise NotApplied("compile", f"{hooks.first(more)} of {name} is compiled as well")
        told.append(
            f"{len(planned)} blocks of {name}" if step.params["scope"] == "regional" else f"the whole of {name}"
        )
    return f"{'; '.join(told)} compiled at the first call"


def settled(pipe: Pipeline, step: Step, context: Context) -> str:
    """After a call torch has code of its own for every class that was to be compiled."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for name, module in denoisers(pipe).items():
        for path, part in _regions(module, step).items():
            # What is hooked has another forward: the class's own is what is compiled.
            if not _debug_get_cache_entry_list(type(part).forward.__code__):
                raise NotApplied("compile", f"after a call there is no compiled code for {path or 'itself'} of {name}")
    return f"{names(denoisers(pipe))} computed with compiled code"
