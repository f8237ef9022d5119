"""Read a model's facts from a folder in diffusers layout: `model_index.json` and each component's configuration.

The folder is somebody else's work. What it says is read in bounded size, and its names and numbers are held against
plain checks, so that what comes out of here can be built without running anybody's code.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.facts import bounds, classes, weights
from engine.facts.model import Component, Defaults, Model
from engine.values import FrozenDict

INDEX = "model_index.json"
MAX_CONFIG_BYTES = 1024**2
"""The largest configuration seen has 100 kB, and Python takes fifty times what a hostile one has."""
MAX_INDEX_BYTES = 32 * 1024**2
"""Of a list of weight files, which names every tensor."""
MAX_COMPONENTS = 64
CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
# What can be planned for without a configuration: it holds no weights, and its own files have other names.
WITHOUT_CONFIG = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor", "ImageProcessorPil")


class Incomplete(ModelError):
    """A model's folder in which a component, or its configuration, is not there."""


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
    if not isinstance(pipeline_class, str) or not classes.is_public_class(pipeline_class):
        raise ModelError(
            f"{name}: model_index.json names no pipeline class of the library",
            f"its _class_name is {json.dumps(pipeline_class)[:80]}; code that comes with a model is not run",
            "use a model whose pipeline is part of diffusers",
        )
    named = {
        n: entry
        for n, entry in index.items()
        if not n.startswith("_") and isinstance(entry, list) and entry and entry[0] is not None
    }
    if len(named) > MAX_COMPONENTS:
        raise ModelError(
            f"{name}: model_index.json is no pipeline's",
            f"it names {len(named):,} components",
            "download the model again, from whom you trust",
        )
    components = {n: _component(folder, name, n, entry) for n, entry in named.items()}
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
    if len(entry) != 2 or not all(isinstance(e, str) for e in entry) or not classes.is_public_class(entry[1]):
        raise ModelError(
            f"{model}: model_index.json names no class for its component {name[:40]!r}",
            f"it says {json.dumps(entry)[:80]}",
            "download the model again, or mend its model_index.json",
        )
    # A component's folder carries its name; a name that leaves the model's folder is an attack.
    if not name.isidentifier() or len(name) > 100:
        raise ModelError(
            f"{model}: model_index.json has a component called {name[:40]!r}",
            "that is not a name",
            "download the model again, from whom you trust",
        )
    where = classes.place(entry[0])
    if where is None:
        raise ModelError(
            f"{model}: its component {name!r} is not part of diffusers or transformers",
            f"model_index.json says {json.dumps(entry)[:80]}; code that comes with a model is not run",
            "use a model whose components are part of these libraries",
        )
    place = folder / name
    file = next((f for f in (place / c for c in CONFIGS) if _is_file(f, model)), None)
    if file is None and not entry[1].endswith(WITHOUT_CONFIG):
        # Without it a class would be built from its defaults, and be some other model.
        lacks = "folder" if not place.is_dir() else "configuration"
        raise Incomplete(
            f"the model {model} is incomplete",
            f"the {lacks} of its component {name!r} ({entry[1]}) is missing",
            "the download was cut off, or files were moved: download the model again",
        )
    config = read_json(file, model) if file else {}
    bounds.check(config, model, name)
    dtype, variants = weights.seen(place, model)
    return Component(
        library=where[0],
        cls=entry[1],
        module=where[1],
        config=FrozenDict(config),
        stored_dtype=dtype or weights.configured(config),
        variants=variants,
    )


def _is_file(path: Path, model: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, model, error) from None


def _unreadable(path: Path, model: str, error: OSError) -> ModelError:
    return ModelError(
        f"{model}: {path} cannot be read",
        str(error.strerror or error),
        "check who may read the model's directory",
    )


def read_json(path: Path, model: str, *, most: int = MAX_CONFIG_BYTES) -> Mapping[str, Any]:
    """Return the mapping in a JSON file of a model, of `most` bytes at most. Raises: ModelError."""
    try:
        # A pipe would be waited for, and a device read, for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(
                f"{model}: {path} is not a file", "a configuration is wanted there", "download the model again"
            )
        with path.open("rb") as stream:
            text = stream.read(most + 1)
        if len(text) > most:
            raise ModelError(
                f"{model}: {path.name} is not a configuration",
                f"it has more than {most:,} bytes",
                "the file is damaged or hostile: download the model again, from whom you trust",
            )
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{model} is not a model in diffusers layout",
            f"there is no {path.name} in {path.parent}",
            "give the directory that holds model_index.json; if the download was cut off, finish it",
        ) from None
    except OSError as error:
        raise _unreadable(path, model, error) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{model}: {path} is not JSON",
            str(error)[:200],
            "the file is damaged or half-downloaded: download it again",
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            f"{model}: {path} is not a configuration", "a JSON object is wanted there", "download the model again"
        )
    return value
