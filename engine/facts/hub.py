"""Models on the Hugging Face hub: what the cache holds, and, when online, the few kilobytes that say what it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import ModelError
from engine.facts import directory
from engine.facts.model import Model

# Not every *.json: a tokenizer's can have megabytes, and says nothing about memory.
_CONFIGURATIONS = (directory.INDEX, *(f"*/{name}" for name in directory.CONFIGS))
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


def cached_snapshot(name: str, cache: Path) -> Path | None:
    """Return the cached folder of a hub model's `main`, or None when its index was never downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if _COMMIT.match(commit) and (snapshot / directory.INDEX).is_file() else None


def is_offline() -> bool:
    """Return whether the user told the Hugging Face libraries to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch(name: str, suggestion: str) -> Model:
    """Return a hub model from its configuration files, downloading those alone (no weights). Raises: ModelError."""
    if is_offline():
        raise ModelError(
            f"the model {name!r} is not on this machine",
            "HF_HUB_OFFLINE is set, the cache does not hold it, and the catalogue does not know it",
            suggestion,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(name, allow_patterns=list(_CONFIGURATIONS))
    except GatedRepoError:
        raise ModelError(
            f"the model {name!r} is gated, and your access was not accepted",
            "its owner asks for an agreement first",
            f"accept it on the model's page, then `hf auth login`, or set HF_TOKEN ({name})",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no model {name!r} on the hub", "or it is private and you are not logged in", suggestion
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {name!r} is not on this machine, and the hub could not be asked",
            str(error.__cause__ or error).splitlines()[0][:200] or type(error).__name__,
            f"check the network; or {suggestion}",
        ) from None
    return directory.read(Path(folder), name, source="hub", revision=Path(folder).name)
