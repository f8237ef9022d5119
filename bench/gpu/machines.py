"""The machine that measurements are of: what makes two of them comparable, and nothing that names its owner."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import engine
from engine import probe, versions
from engine.errors import HardwareError, UsageError
from engine.values import Gpu, Hardware

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "nvidia-ml-py")
ALSO = ("mmgp", "cache-dit", "optimum-quanto")
"""Others' packages, for their recipes; where they are absent, these are passed over."""
DRY_CARD = "RTX 4090"
"""What predictions are for in dry mode, where there is no card to ask."""


def missing() -> list[str]:
    """Return the packages that measuring needs and that are not installed."""
    return [name for name in NEEDED if versions.installed(name) is None]


def refuse_incomplete() -> None:
    """Raises: UsageError, when packages are missing."""
    if absent := missing():
        raise UsageError(
            f"{', '.join(absent)} not installed",
            f"the harness runs real pipelines: it needs dg-run with {', '.join(NEEDED)}",
            f"pip install {' '.join(absent)}",
        )


def hardware(dry: bool, gpu: str | None = None, ram_bytes: int | None = None) -> Hardware:
    """Return the hardware as it is now, with the one card that is meant; in dry mode one that is made up.

    `ram_bytes` is what the host has where it shows less: a virtual machine's memory can grow as it is used.

    Raises: HardwareError, when there is no card; UsageError, for one that is not here.
    """
    if dry:
        seen = engine.resolve(gpu=DRY_CARD, host_ram="64GiB").hardware
        return dataclasses.replace(seen, notes=())
    seen = probe.snapshot()
    if ram_bytes is not None:
        seen = dataclasses.replace(seen, host=dataclasses.replace(seen.host, ram_bytes=ram_bytes))
    if not seen.gpus:
        raise HardwareError(
            "there is no card here",
            seen.no_gpu_because or "",
            "run this on a machine with an NVIDIA card, or try the harness with --dry",
        )
    wanted = [g for g in seen.gpus if gpu in (None, str(g.index), g.uuid)]
    if not wanted:
        raise UsageError(f"there is no card {gpu!r} here", do="give the index or UUID that nvidia-smi shows")
    card = max(wanted, key=lambda g: g.free_bytes or 0)
    return dataclasses.replace(seen, gpus=(card,))


def described(seen: Hardware, torch_says: dict[str, Any]) -> dict[str, Any]:
    """Return the machine as a record keeps it."""
    (card,) = seen.gpus
    installed = {n: v for n in (*NEEDED, *ALSO) if (v := _version(n)) is not None}
    libraries = {k: str(torch_says[k]) for k in ("cuda", "cudnn") if torch_says.get(k) is not None}
    return {
        "device": torch_says["device"],
        "card": torch_says.get("name", f"no card: bytes are counted, predictions are for {card.name}"),
        "driver": None if seen.driver is None else seen.driver.version,
        "versions": {
            "dg-run": engine.__version__,
            **installed,
            "torch": torch_says["torch"],
            **libraries,
            "python": platform.python_version(),
        },
        "revision": revision(),
        "gpu": _plain(card),
        "host": dataclasses.asdict(seen.host),
        "torch": torch_says,
    }


def _plain(card: Gpu) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(card, uuid=None, processes=()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """Return the commit that dg-run is at, where it runs from a checkout, or from a folder that one was packed into."""
    packed = Path(__file__).with_name("REVISION")
    if packed.is_file():
        return packed.read_text(encoding="utf-8").strip()
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
