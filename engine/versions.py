"""Which versions of the libraries are installed, and which the project is tested with. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from engine.version import __version__


@dataclass(frozen=True, slots=True)
class Tested:
    """A library's tested range: from `low`, up to and not including `below`."""

    low: str
    below: str


TESTED = {
    "torch": Tested("2.13", "2.14"),
    "diffusers": Tested("0.42.1", "0.43"),
    "transformers": Tested("5.23", "5.24"),
    "accelerate": Tested("1.15", "1.16"),
}
OTHERS = ("safetensors", "huggingface-hub", "nvidia-ml-py", "jsonschema", "pyyaml")
OPTIONAL = {"xfuser": "pip install 'dg-run[xdit]' (Linux, for several cards)"}


@cache
def installed(name: str) -> str | None:
    """Return a distribution's version, or None when it is not installed: as it was when first asked in this process."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cudnn() -> tuple[int, ...] | None:
    """Return the version of cuDNN that is installed beside torch, or None where there is none to be seen."""
    found = next((v for n in ("cu13", "cu12") if (v := installed(f"nvidia-cudnn-{n}"))), None)
    return None if found is None else tuple(int(part) for part in re.findall(r"\d+", found)[:3])


@cache
def torch() -> tuple[int, int] | None:
    """Return the installed torch's version, the first two of its numbers; None where there is none."""
    found = re.match(r"(\d+)\.(\d+)", installed("torch") or "")
    return None if found is None else (int(found[1]), int(found[2]))


@cache
def cuda() -> str | None:
    """Return the CUDA version that torch was built for, as "13.0"; None for a torch without CUDA, or without torch.

    It stands in a file of torch's own, which is read and not imported.
    """
    try:
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None:
            return None
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return None if match is None else match[1]


def of_gpu() -> dict[str, str | None]:
    """Return the versions of what computes on a card."""
    deep = cudnn()
    return {
        "torch": installed("torch"),
        "cuda": cuda(),
        "cudnn": None if deep is None else ".".join(map(str, deep)),
    }


def snapshot() -> dict[str, str | None]:
    """Return the versions a plan is made with."""
    return {"dg-run": __version__} | {name: installed(name) for name in TESTED}


@lru_cache(maxsize=256)
def within(version: str, ranges: str) -> bool:
    """Whether a version lies in ranges such as ">=0.42.1,<0.43", by the numbers of its release.

    Not by `packaging`, which takes longer to import than a plan to make: a build before 0.43 counts as 0.43.
    """
    found = _release(version)
    for bound in ranges.split(","):
        sign, wanted = bound[: 1 + (bound[1] == "=")], _release(bound.lstrip("<>=!"))
        order = (found > wanted) - (found < wanted)
        if not {">=": order >= 0, "<=": order <= 0, "==": order == 0, "!=": order != 0, ">": order > 0, "<": order < 0}[
            sign
        ]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\s*\d+(\.\d+)*", version)
    numbers = [int(n) for n in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def note(name: str, version: str | None) -> str | None:
    """Return what to say of an installed version against the tested range, or None when it lies inside."""
    from packaging.version import Version

    tested = TESTED[name]
    span = f"{tested.low} up to, not including, {tested.below}"
    pin = f"pip install '{name}>={tested.low},<{tested.below}'"
    if version is None:
        return f"not installed: {pin}"
    if Version(version) < Version(tested.low):
        return f"older than what is tested ({span}): {pin}"
    if Version(version) >= Version(tested.below):
        return f"newer than what is tested ({span}): it may well work; if it does not, {pin}"
    return None
