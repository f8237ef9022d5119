"""What is known of a model before it is loaded: from its configuration files alone.

A model is looked for where it would be found: the embedded one, a directory, the Hugging Face cache, the shipped
catalogue, and last, when online, the hub. OWNER/MODEL@REVISION is a model of the hub at a branch, a tag or a commit,
which the catalogue, being of no revision, does not answer for. To add a model to the catalogue: a file in
`engine/facts/models/`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from engine import paths
from engine.errors import ModelError
from engine.facts import catalogue, directory, embedded, hub
from engine.facts.model import Model
from engine.words import listing, nearest

__all__ = ["Model", "find"]

# A revision is a path within the cache, and git itself allows no ".." in one.
_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[A-Za-z0-9][\w./+-]*))?\Z", re.ASCII
)


def find(name: str | None, revision: str | None = None) -> Model:
    """Return the model called `name`; None is the embedded one.

    `revision` is that of a model on the hub, as the name's own after an @. Raises: ModelError.
    """
    if name is None or name == embedded.ID:
        return embedded.model()
    if not name.strip():
        raise ModelError(
            "the model's name is empty", do="give a directory, or a name such as black-forest-labs/FLUX.1-schnell"
        )
    path = Path(name).expanduser()
    if _exists(path, name):
        return directory.read(path, name)
    match = _HUB_ID.match(name if revision is None else f"{name.partition('@')[0]}@{revision}")
    if not match:
        raise ModelError(
            f"there is no model {name[:80]!r}",
            "it is neither a directory here nor a name of the form OWNER/MODEL or OWNER/MODEL@REVISION",
            _suggestion(name),
        )
    return _on_the_hub(match["id"], match["revision"])


def _on_the_hub(name: str, revision: str | None) -> Model:
    partial: ModelError | None = None
    cache = paths.hub_cache_dir()
    if snapshot := hub.cached_snapshot(name, cache, revision):
        try:
            cached = directory.read(
                snapshot, name, source="cache", revision=snapshot.name, defaults=catalogue.defaults(name)
            )
            return cached if hub.has_weights(snapshot) else dataclasses.replace(cached, path=None)
        except directory.Incomplete as error:  # a download that was cut off, or fetched some files only
            partial = error
    if revision is None and (known := catalogue.find(name)):
        return known
    if partial is not None and hub.is_offline():
        raise partial
    return dataclasses.replace(hub.fetch(name, _suggestion(name), cache, revision), path=None)


def _exists(path: Path, name: str) -> bool:
    try:
        return path.exists()
    except PermissionError:
        raise ModelError(
            f"{name} cannot be read", "permission denied", "check who may read the model's directory"
        ) from None
    except (OSError, ValueError):  # a name too long for a file, or with a NUL in it, is no file
        return False


def _suggestion(name: str) -> str:
    """Return what to give instead, comparing the part after the owner, which people remember."""
    tails = {i.rpartition("/")[2]: i for i in catalogue.ids()}
    tail = name.rpartition("/")[2].casefold()
    close = [tails[t] for t in nearest(tail, tails, count=3)]
    if not close and len(tail) > 3:
        close = [i for t, i in tails.items() if tail in t.casefold()][:3]
    hint = f"did you mean {listing(close, 'or')}? Else " if close else ""
    return hint + "give a directory in diffusers layout, or OWNER/MODEL as it stands on the hub"
