"""The shipped catalogue: configurations of popular models, one JSON file each in `models/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from engine.facts.model import Component, Defaults, Model
from engine.values import FrozenDict

_FOLDER = Path(__file__).parent / "models"


@cache
def _entries() -> dict[str, Mapping[str, Any]]:
    files = sorted(_FOLDER.glob("*.json"))
    return {entry["id"]: entry for entry in (json.loads(f.read_text(encoding="utf-8")) for f in files)}


def ids() -> list[str]:
    """Return the hub names of all models in the catalogue."""
    return list(_entries())


@cache
def find(name: str) -> Model | None:
    """Return a model of the catalogue, or None. The hub does not tell upper case from lower, and nor does this."""
    entry = _entries().get(name) or next((e for i, e in _entries().items() if i.casefold() == name.casefold()), None)
    if entry is None:
        return None
    return Model(
        id=entry["id"],
        source="catalogue",
        pipeline_class=entry["pipeline_class"],
        components=FrozenDict(
            {
                n: Component(
                    library=c["library"],
                    cls=c["class"],
                    module=c.get("module"),
                    config_class=c.get("config_class"),
                    config=FrozenDict(c.get("config") or {}),
                    stored_dtype=c.get("stored_dtype"),
                )
                for n, c in entry["components"].items()
            }
        ),
        defaults=defaults(name),
    )


def defaults(name: str) -> Defaults:
    """Return how a model of the catalogue is meant to be called; all None for any other model."""
    entry = _entries().get(name)
    if entry is None:
        return Defaults()
    said = entry["defaults"]
    return Defaults(
        height=said["height"],
        width=said["width"],
        frames=said["num_frames"],
        steps=said["steps"],
        guidance=said["guidance_scale"],
    )
