"""Where the project's own data lies, and where a user's files go."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Return the folder of shipped data called `name` ("profiles" or "schema").

    A wheel carries both inside the package. In a checkout (an editable install) they lie at its top, and the
    checkout's `pyproject.toml` tells it from a site-packages that happens to hold a folder of that name.
    """
    packaged = _PACKAGE / "_data" / name
    if packaged.is_dir():
        return packaged
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return _PACKAGE.parent / name
    raise FileNotFoundError(f"this installation of dg-run lacks its folder {name!r}: {packaged}")


def embedded_model_dir() -> Path:
    """Return the folder of the embedded pipeline, in diffusers layout."""
    return _PACKAGE / "embedded" / "tiny-flux"


def cache_dir() -> Path:
    """Return the folder for what can be made again; `DG_RUN_CACHE` names another. It may not exist yet."""
    if chosen := os.environ.get("DG_RUN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dg-run" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dg-run"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dg-run"


def config_dir() -> Path:
    """Return the folder for what a user writes, such as profiles; `DG_RUN_CONFIG` names another. It may not exist."""
    if chosen := os.environ.get("DG_RUN_CONFIG"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "dg-run"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "dg-run"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dg-run"


def state_dir() -> Path:
    """Return the folder for what was learnt of this machine's cards and cannot simply be made again.

    `DG_RUN_STATE` names another. It may not exist yet.
    """
    if chosen := os.environ.get("DG_RUN_STATE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dg-run" / "state"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "dg-run"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dg-run"


def hub_cache_dir() -> Path:
    """Return the Hugging Face model cache, by the environment variables that huggingface_hub reads, in its order."""
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(chosen)).expanduser()
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"
