"""The embedded model: a tiny, genuine FLUX pipeline that comes with the package."""

from __future__ import annotations

import json
from functools import cache

from engine import paths
from engine.facts import directory
from engine.facts.model import Defaults, Model
from engine.values import FrozenDict

ID = "embedded"


@cache
def model() -> Model:
    """Return the embedded model, whose weights and facts are package data."""
    folder = paths.embedded_model_dir()
    facts = json.loads((folder.parent / "facts.json").read_text(encoding="utf-8"))
    defaults = facts["defaults"] | {"call": FrozenDict(facts["defaults"]["call"])}
    return directory.read(
        folder,
        ID,
        source="embedded",
        revision=facts["revision"],
        defaults=Defaults(**defaults),
        vocabulary=frozenset(facts["vocabulary"]),
    )
