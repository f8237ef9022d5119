"""Small pipelines as folders, to be loaded in parts as any model is. Their tokenizers are stubs, and are handed in."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.facts import directory
from engine.facts.model import Model
from engine.run import parts
from engine.run.parts import Parts
from truth import pipelines
from truth.cases import Case

Loaded = Callable[[str, torch.nn.Module], None]


def parts_of(pipe: Any, where: Path, dtype: str, loaded: Loaded | None = None) -> Parts:
    """Return how the pipeline in a folder is loaded in parts; `pipe` lends its tokenizers and its class.

    `loaded` is told of each component that comes with its weights.
    """
    known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    twins = parts.twins(directory.read(where, str(where)), dtype)
    stubs = {n: c for n, c in pipe.components.items() if _is_stub(c)}

    def make(given: Mapping[str, Any]) -> Any:
        # diffusers would rather have a tokenizer of transformers.
        with mock.patch("diffusers.pipelines.pipeline_utils.maybe_raise_or_warn", lambda *_: None):
            made = type(pipe).from_pretrained(where, dtype=getattr(torch, dtype), **stubs | dict(given))
        made.set_progress_bar_config(disable=True)
        for name, component in made.components.items():
            if not isinstance(component, torch.nn.Module) or any(component is g for g in given.values()):
                continue
            component.requires_grad_(False)
            if loaded is not None and component not in known:
                known.add(component)
                loaded(name, component)
        return made

    return Parts(make=make, twins=twins)


def parts_of_case(case: Case, pipe: Any, loaded: Loaded | None = None) -> Parts:
    """Return how a case's pipeline is loaded in parts."""
    return parts_of(pipe, folder(case.architecture), case.dtype, loaded)


@functools.cache
def folder(architecture: str) -> Path:
    """Return a folder with a pipeline of `pipelines.ALL`; it is gone when the process ends."""
    where = Path(tempfile.mkdtemp(prefix="dg-run-truth-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    save(pipelines.made(architecture)[0], where)
    return where


@functools.cache
def model(architecture: str) -> Model:
    """Return what is known of a pipeline of `pipelines.ALL` before it is loaded."""
    where = folder(architecture)
    return directory.read(where, architecture)


def save(pipe: Any, where: Path) -> None:
    """Write a pipeline in diffusers layout. What its stubs stand for is named, and not there."""
    index: dict[str, Any] = {"_class_name": type(pipe).__name__, "_diffusers_version": "0.42.1"}
    index |= {k: v for k, v in pipe.config.items() if not k.startswith("_")}
    for name, component in pipe.components.items():
        if component is None:
            index[name] = [None, None]
        elif _is_stub(component):
            index[name] = ["transformers", "CLIPTokenizer"]
        else:
            index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
            component.save_pretrained(where / name)
    (where / "model_index.json").write_text(json.dumps(index))


def _is_stub(component: Any) -> bool:
    return type(component).__module__.startswith("engine.dryrun.")
