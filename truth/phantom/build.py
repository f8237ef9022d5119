"""Build the phantom device with plain `cc`: one library that plays CUDA, and an empty one for each name it goes by.

What torch's libraries ask of CUDA's and we do not play ourselves is generated: it says so on stderr, and fails; the
computing functions of cuBLAS succeed, and compute nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
NAMES = (
    *("libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1", "libnvrtc.so.13"),
    *("libcublas.so.13", "libcublasLt.so.13", "libcudnn.so.9"),
)
"""The libraries that are stood in for: torch's own find them in memory already, under these names."""

_OURS = re.compile(
    r"(__cuda[A-Z]|cuda[A-Z]|cublas(Lt)?[A-Z]|cudnn[A-Z]|cu(Ctx|Device|Mem|Module|Func|Launch|Occup|Link))\w*$"
)
_FAILURES = {"cublas": 0, "cudnn": 3000, "cuda": 801, "__cuda": 801, "cu": 801}
"""What a function that is not played returns, by the beginning of its name: "not supported"."""


def library(root: Path, cuda_home: Path) -> tuple[Path, ...]:
    """Build the libraries under `root`, where they are not there already; return them in the order of preloading.

    `cuda_home` is a CUDA toolkit of the same major version as torch's: its headers are needed, and nothing else of it.
    """
    site = Path(str(distribution("torch").locate_file("")))
    headers = [cuda_home / "include", site / "nvidia/cu13/include", site / "nvidia/cudnn/include"]
    sources = sorted(SOURCES.iterdir())
    parts = [*(p.read_bytes() for p in sources), Path(__file__).read_bytes(), distribution("torch").version.encode()]
    folder = root / hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    main = folder / "libphantom.so"
    found = (main, *(folder / n for n in NAMES))
    if all(p.exists() for p in found):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{p}" for p in headers]
    objects = []
    for source in (p for p in sources if p.suffix == ".c"):
        objects.append(folder / f"{source.stem}.o")
        _cc("-c", "-O1", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", *includes, str(source), "-o", str(objects[-1]))
    rest = folder / "rest.c"
    rest.write_text(unplayed(asked(site / "torch/lib"), _symbols(objects, "--defined-only")), encoding="utf-8")
    _cc("-c", "-fPIC", "-w", str(rest), f"-I{SOURCES}", "-o", str(folder / "rest.o"))
    made = folder / "made.so"
    _cc(
        "-shared",
        "-Wl,-soname,libphantom.so",
        *(str(o) for o in (*objects, folder / "rest.o")),
        "-ldl",
        "-lpthread",
        "-o",
        str(made),
    )
    made.replace(main)
    for name in NAMES:
        # Whoever looks a function up in one of these finds it in what it needs.
        options = (f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN")
        _cc("-shared", *options, str(main), "-o", str(folder / name))
    return found


def asked(folder: Path) -> set[str]:
    """Return what torch's libraries in a folder ask of CUDA's."""
    return {s for s in _symbols(sorted(folder.glob("*.so")), "-D", "--undefined-only") if _OURS.match(s)}


def unplayed(wanted: Iterable[str], played: Iterable[str]) -> str:
    """Return the C source of what is wanted and not played."""
    lines = ['#include "phantom.h"']
    for name in sorted(set(wanted) - set(played)):
        beginning = next(b for b in _FAILURES if name.startswith(b))
        says = "" if beginning == "cublas" else f'phantom_unplayed("{name}"); '
        lines.append(f"int {name}(void) {{ {says}return {_FAILURES[beginning]}; }}")
    return "\n".join(lines) + "\n"


def _symbols(files: Sequence[Path], *options: str) -> set[str]:
    done = subprocess.run(["nm", *options, *map(str, files)], check=True, capture_output=True, text=True)
    words = (line.split() for line in done.stdout.splitlines())
    return {w[-1].partition("@")[0] for w in words if len(w) >= 2 and not w[-1].endswith(":")}


def _cc(*arguments: str) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler: set CC")
    subprocess.run([compiler, *arguments], check=True)
