"""Read a model's facts from a folder in diffusers layout: `model_index.json` and each component's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.facts.model import Component, Defaults, Model
from engine.values import FrozenDict

INDEX = "model_index.json"
MAX_JSON_BYTES = 8 * 1024**2
CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")


def read(
    folder: Path,
    name: str,
    *,
    source: str = "directory",
    revision: str | None = None,
    defaults: Defaults | None = None,
    vocabulary: frozenset[str] | None = None,
) -> Model:
    """Return the model in `folder`, called `name`. Raises: ModelError, saying what is missing or unreadable."""
    if not folder.is_dir():
        raise ModelError(
            f"{name} is a file, not a model's directory",
            "single-file checkpoints are not read by this version",
            "give a directory in diffusers layout (one with a model_index.json)",
        )
    index = read_json(folder / INDEX, name)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str) or not pipeline_class.isidentifier():
        raise ModelError(
            f"{name}: model_index.json names no pipeline class of the library",
            f"its _class_name is {json.dumps(pipeline_class)[:80]}; code that comes with a model is not run",
            "use a model whose pipeline is part of diffusers",
        )
    components = {
        n: _component(folder, name, n, entry)
        for n, entry in index.items()
        if not n.startswith("_") and isinstance(entry, list) and entry and entry[0] is not None
    }
    return Model(
        id=name,
        source=source,
        pipeline_class=pipeline_class,
        components=FrozenDict(components),
        revision=revision,
        path=folder,
        defaults=defaults or Defaults(),
        vocabulary=vocabulary,
    )


def _component(folder: Path, model: str, name: str, entry: list[Any]) -> Component:
    if len(entry) != 2 or not all(isinstance(e, str) and e.replace(".", "_").isidentifier() for e in entry):
        raise ModelError(
            f"{model}: model_index.json names no class for its component {name!r}",
            f"it says {json.dumps(entry)[:80]}",
            "download the model again, or mend its model_index.json",
        )
    # A component's folder carries its name; a name that leaves the model's folder is an attack.
    if not name.isidentifier():
        raise ModelError(f"{model}: model_index.json has a component called {name[:40]!r}", "that is not a name")
    file = next((f for f in (folder / name / c for c in CONFIGS) if f.is_file()), None)
    config = read_json(file, model) if file else {}
    return Component(library=entry[0], cls=entry[1], config=FrozenDict(config))


def read_json(path: Path, model: str) -> Mapping[str, Any]:
    """Return the mapping in a JSON file of a model. Raises: ModelError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{model}: {path.name} is not a configuration", f"it has {size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{model} is not a model in diffusers layout",
            f"there is no {path.name} in {path.parent}",
            "give the directory that holds model_index.json; if the download was cut off, finish it",
        ) from None
    except OSError as error:
        raise ModelError(
            f"{model}: {path} cannot be read", str(error.strerror or error), "check who may read the model's directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{model}: {path} is not JSON",
            str(error)[:200],
            "the file is damaged or half-downloaded: download it again",
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{model}: {path} is not a configuration", "a JSON object is wanted there")
    return value
