"""The door to the dry run: from what is known of a model and what is asked of it to a trace."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine import optimizers
from engine.dryrun import build, components, inputs, record, twins
from engine.errors import DgRunError, IncompatibleError, ModelError, UsageError
from engine.estimate.trace import TRACED_STEPS, Trace
from engine.facts.model import Model
from engine.optimizers.spec import Context
from engine.values import Request, Step

_MOST_STEPS = 40


def trace(
    model: Model,
    request: Request,
    dtype: str,
    changes: Sequence[Step] = (),
    *,
    target: str = "cuda",
    is_plain: bool = False,
) -> Trace:
    """Return the trace of a request: seconds of work, no weights, no device.

    `changes` are the steps that change what is computed: they are applied to the pipeline by their own `apply`. With
    `is_plain` the VAE's other ways are not recorded.
    A run that stops is stood in for by its components (`basis` is "component"), with what stopped it.

    Raises: ModelError, for a model that cannot be built; UsageError, for arguments its pipeline does not take;
        IncompatibleError, for a change that cannot be made to it, or with which a run stops that does not without.
    """
    with _quiet():
        pipe = build.pipeline(model, getattr(torch, dtype))
        change(pipe, changes, dtype)
        asked = _steps(pipe, request)
        call = inputs.call(
            model,
            pipe,
            height=request.height,
            width=request.width,
            frames=request.frames,
            batch=request.batch,
            steps=asked,
            guidance=request.guidance,
            extra=request.call,
        )
        try:
            with twins.assumed() as assumed:
                made = record.record(pipe, call, target, () if is_plain else ways(request.batch))
            return replace(
                made,
                asked_steps=asked,
                usual_steps=_usual_steps(pipe),
                assumptions=(*build.notes(pipe), *sorted(assumed)),
            )
        except UsageError:
            raise
        except Exception as error:  # what a foreign pipeline raises is not one class
            stopped = f"the run stopped at {type(error).__name__}: {_line(error)}"
            if changes and trace(model, request, dtype, target=target, is_plain=True).basis == "traced":
                told = ", ".join(str(s) for s in changes)
                raise IncompatibleError(
                    f"{told} cannot be used for {model.id}", f"{stopped}; without, it does not stop", "leave it out"
                ) from error
            return _by_component(pipe, request, target, stopped)


def change(pipe: Any, changes: Sequence[Step], dtype: str) -> None:
    """Apply steps to a pipeline that is on meta. Raises: IncompatibleError."""
    here = Context(device="meta", dtype=dtype)
    loaded = {id(w) for w in _weights(pipe)}
    for step in changes:
        try:
            optimizer = optimizers.get(step.name)
            getattr(optimizer, "apply_dry", optimizer.apply)(pipe, step, here)
        except DgRunError:
            raise
        except Exception as error:
            raise IncompatibleError(f"{step.name} cannot be applied to {type(pipe).__name__}", _line(error)) from error
    for weight in _weights(pipe):
        if id(weight) not in loaded:
            record.made_later(weight)


def _weights(pipe: Any) -> Iterator[torch.Tensor]:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            yield from component.parameters()


def _usual_steps(pipe: Any) -> int | None:
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _steps(pipe: Any, request: Request) -> int:
    """Return how many steps to ask for so that enough are taken: from a picture, a share `strength` of them is."""
    parameter = inspect.signature(pipe.__call__).parameters.get("strength")
    if parameter is None:
        return TRACED_STEPS
    share = request.call.get("strength", parameter.default)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        return TRACED_STEPS
    return min(_MOST_STEPS, math.ceil(TRACED_STEPS / share))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _by_component(pipe: Any, request: Request, target: str, because: str) -> Trace:
    """Return what stands in for a run that stopped. Raises: ModelError, when not one component can be called."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    follower = record.follower_of(modules, target)
    parts = record.components(modules)
    silent = components.trace_each(modules, follower, request, target)
    made = record.trace(pipe, parts, follower)
    if len(silent) == len(modules):
        raise ModelError(
            f"{request.model} cannot be dry-run", f"{because}; {'; '.join(silent)}", "report this with the model's name"
        )
    return replace(made, usual_steps=_usual_steps(pipe), basis="component", assumptions=(because, *silent))


def ways(batch: int) -> tuple[str, ...]:
    """Return the ways through a VAE that can differ from the plain one: slicing acts on batches only."""
    return ("tiled", "sliced", "sliced+tiled") if batch > 1 else ("tiled",)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks on a call without weights away from the user."""
    import diffusers
    import transformers

    loggers: list[tuple[Any, Any]] = [
        (library.utils.logging, library.utils.logging.get_verbosity()) for library in (diffusers, transformers)
    ]
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library, _ in loggers:
            library.set_verbosity_error()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
            for library, verbosity in loggers:
                library.set_verbosity(verbosity)
