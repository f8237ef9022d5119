"""`python -m truth.phantom …`: build the phantom device, run cases on it, and tell what came of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engine.facts import catalogue
from truth.phantom import build, matrix

_TINY = "sd,sd_img2img,sdxl,sd3,pixart,wan,ltx,flux"
_AMPLE_BYTES = 1 << 38


def environment(libraries: Sequence[Path], more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a process that has the phantom device."""
    usual = {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DG_PHANTOM_QUIET": "1",
    }
    return usual | {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | more


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m truth.phantom")
    parser.add_argument("what", choices=("allocator", "tiny", "catalogue"))
    parser.add_argument(
        "--models", help="names of small pipelines, or models of the catalogue; all of them if not given"
    )
    parser.add_argument("--placements", default=",".join(matrix.PLACEMENTS))
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--more", default="", help=f"added to each placement: of {', '.join(matrix.MORE)}")
    parser.add_argument("--count", type=int, default=1000, help="random streams, for the allocator")
    parser.add_argument("--card", default="A100", help="T4, A100, 4090, H100")
    parser.add_argument("--out", type=Path, help="a file to add the results to")
    parser.add_argument("--build", type=Path, default=Path(tempfile.gettempdir()) / "dg-run-phantom")
    asked = parser.parse_args()
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    libraries = build.library(asked.build, home)
    if asked.what == "allocator":
        wanted: list[dict[str, Any]] = [{"kind": "allocator", "count": asked.count}]
    else:
        usual = _TINY if asked.what == "tiny" else ",".join(sorted(catalogue.ids()))
        more = [n for n in asked.more.split(",") if n]
        names, placements = (asked.models or usual).split(","), asked.placements.split(",")
        wanted = [c.json() for c in matrix.cases(asked.what, names, placements, asked.dtypes.split(","), more)]
    # As much as is asked for, unless the environment says how much: predictions are without a limit too.
    settings = {"DG_PHANTOM_CARD": asked.card}
    settings["DG_PHANTOM_BYTES"] = os.environ.get("DG_PHANTOM_BYTES", str(_AMPLE_BYTES))
    child = subprocess.Popen(
        [sys.executable, "-m", "truth.phantom.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(libraries, settings),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("".join(json.dumps(w) + "\n" for w in wanted))
    child.stdin.close()
    with asked.out.open("a", encoding="utf-8") if asked.out else nullcontext() as out:
        for line in child.stdout:
            print(line, end="", flush=True)
            if out is not None and line.startswith("{"):
                out.write(line)
                out.flush()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
