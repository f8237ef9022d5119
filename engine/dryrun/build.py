"""Build a pipeline on `meta` from a model's facts alone: its real classes, its real configurations, no weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from engine.dryrun import pictures, stand_ins, twins
from engine.dryrun.tokens import StubImageProcessor, StubTokenizer, StubVisionProcessor, Vision
from engine.errors import ModelError
from engine.facts.model import Component, Model

_NOTES = "_dg_notes"
_CLIP_POSITIONS, _USUAL_POSITIONS = 77, 512
# What classes raise on a configuration that is not theirs, or not a model's, is not one class.
_UNBUILDABLE = (
    *(TypeError, ValueError, LookupError, AttributeError, NameError, ArithmeticError, RuntimeError),
    *(ImportError, OSError, AssertionError, MemoryError, StrictDataclassError),
)


Weightless = Callable[[], AbstractContextManager[Any]]
"""Gives a context in which modules are made without weights."""
ALL_ON_META: Weightless = partial(torch.device, "meta")


def pipeline(model: Model, dtype: torch.dtype, weightless: Weightless = ALL_ON_META) -> Any:
    """Return the model's pipeline with every weight on meta, in the dtypes that loading it so would give.

    Another `weightless` can leave buffers on the host, with the values that their classes give them: for whoever puts
    weights in the parameters' places, and runs it.

    Raises: ModelError, when a class is not in the installed libraries or does not take its configuration.
    """
    import diffusers

    cls = _class(diffusers, model.pipeline_class)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline):
        raise ModelError(
            f"diffusers has no pipeline {model.pipeline_class}",
            f"installed is {diffusers.__version__}",
            "update diffusers",
        )
    taken = inspect.signature(cls.__init__).parameters
    parts = {
        name: _component(model, name, part, dtype, weightless)
        for name, part in model.components.items()
        if name in taken
    }
    for name, parameter in taken.items():
        if name != "self" and name not in parts and parameter.default is inspect.Parameter.empty:
            parts[name] = None
    guardrail = stand_ins.guardrail(taken, parts)
    if guardrail is not None:
        parts["safety_checker"] = guardrail
    # AnimateDiff makes a component of two others, and loads it with their weights: on meta too, where these are.
    makes_parts = weightless() if "motion_adapter" in parts else contextlib.nullcontext()
    with makes_parts, stand_ins.building(cls):
        built = cls(**parts)
    for name, part in built.components.items():
        if isinstance(part, torch.nn.Module):
            stand_ins.settle(part)
            if part is not parts.get(name):
                part.to("meta").eval()
    built.set_progress_bar_config(disable=True)
    pictures.stay_empty(built)
    setattr(built, _NOTES, () if guardrail is None else (guardrail.note,))
    return built


def notes(pipe: Any) -> tuple[str, ...]:
    """Return what a pipeline that was built here lacks of the real one, in sentences."""
    return tuple(getattr(pipe, _NOTES, ()))


def component(model: Model, name: str, dtype: torch.dtype) -> Any:
    """Return one component of a model, every weight of it on meta, as `pipeline` has it. Raises: ModelError."""
    return _component(model, name, model.components[name], dtype)


def _component(
    model: Model, name: str, part: Component, dtype: torch.dtype, weightless: Weightless = ALL_ON_META
) -> Any:
    import diffusers
    import transformers

    if "ImageProcessor" in part.cls or "FeatureExtractor" in part.cls:
        return StubImageProcessor()
    if "Tokenizer" in part.cls or "Processor" in part.cls:
        seen = [v for c in model.components.values() if (v := Vision.of(c.config))]
        if "Processor" in part.cls and seen:
            return StubVisionProcessor(_USUAL_POSITIONS, seen[0])
        return StubTokenizer(_CLIP_POSITIONS if "CLIP" in part.cls else _USUAL_POSITIONS)
    library: Any = {"diffusers": diffusers, "transformers": transformers}.get(part.library)
    if library is not None and part.module is not None and part.module.partition(".")[0] == part.library:
        library = _module(part.module)
    cls = _class(library, part.cls)
    # A class of another package that a library happens to import is not the library's.
    if cls is None or cls.__module__.partition(".")[0] != part.library:
        raise ModelError(
            f"{model.id}: its component {name} is a {part.library}.{part.cls}, which is not installed",
            "a dry run builds components from their classes",
            f"install or update {part.library}",
        )
    try:
        if not issubclass(cls, torch.nn.Module):
            if not issubclass(cls, diffusers.ConfigMixin):
                raise TypeError(f"{part.cls} is no part of a pipeline: neither a module nor configured")
            return cls.from_config(dict(part.config))
        with weightless():
            is_configured = part.library == "diffusers" and hasattr(cls, "from_config")
            made = cls.from_config(dict(part.config)) if is_configured else cls(_transformers_config(part))
    except _UNBUILDABLE as error:
        raise ModelError(
            f"{model.id}: its component {name} ({part.cls}) cannot be built from its configuration",
            " ".join(str(error).split())[:300],
            "check the model's config.json",
        ) from error
    made = as_loaded(made, dtype)
    if part.cls.endswith("SafetyChecker"):
        _let_everything_pass(made)
    return made


def _class(library: Any, name: str) -> Any:
    """Return a library's class, or None. A module or a function that is called so is refused with the rest."""
    try:
        found = getattr(library, name, None)
    except (ImportError, RuntimeError):  # there, and needing a package that is not
        return None
    return found if inspect.isclass(found) else None


def _module(name: str) -> Any:
    """Return a module of a library; None, when this version of it has none. `facts` lets no other names through."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _let_everything_pass(checker: torch.nn.Module) -> None:
    """Give a safety checker's thresholds values: it reads them one by one, to decide which pictures to blacken."""
    for weight in (*checker.parameters(recurse=False), *checker.buffers(recurse=False)):
        twins.give(weight, torch.zeros(weight.shape, dtype=weight.dtype))


def _transformers_config(part: Component) -> Any:
    import transformers

    config = {k: v for k, v in part.config.items() if k not in ("architectures", "transformers_version")}
    if part.config_class is not None:
        return getattr(transformers, part.config_class)(**config)
    return transformers.AutoConfig.for_model(**config)


def as_loaded(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return a module in the precision that `from_pretrained(dtype=…)` gives it.

    Parameters and persistent buffers follow the dtype, except what the class keeps in float32 (`_keep_in_fp32_modules`;
    transformers heeds that only under float16). Buffers that are not saved stay as they were made. Parameters require
    gradients, as loaded ones do: `matmul` copies an input that is not contiguous for a weight that does, and only then.
    """
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    if type(module).__module__.startswith("transformers") and dtype != torch.float16:
        kept = ()
    for name, owner in module.named_modules():
        for key, value in (*owner._parameters.items(), *owner._buffers.items()):
            is_saved = key in owner._parameters or key not in owner._non_persistent_buffers_set
            path = f"{name}.{key}" if name else key
            if value is None or not value.is_floating_point() or not is_saved:
                continue
            if any(k in path.split(".") for k in kept):
                continue
            cast = value.detach().to(dtype)
            if key in owner._parameters:
                owner._parameters[key] = torch.nn.Parameter(cast)
            else:
                owner._buffers[key] = cast
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    return module.eval()
