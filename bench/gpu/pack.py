"""One folder to carry to a machine with a card: the harness, a wheel of dg-run, what it needs, and what to type."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from bench.gpu import machines
from engine.errors import FileError, UsageError

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_README = """\
# The GPU harness of dg-run, to be run where a card is

It was made from revision {revision}. Python {python} or newer and an NVIDIA driver are needed, and a network only if
`wheels/` holds nothing but dg-run. To measure, type in this folder:

```sh
python3 -m venv venv && venv/bin/pip install {offline}-r requirements.txt wheels/{wheel}
venv/bin/python -m bench.gpu run --minutes 120 --out results.jsonl
venv/bin/python -m bench.gpu report results.jsonl --write report.md
```

The second goes on where it stopped, however it stopped; bring `results.jsonl` and `report.md` back.
`venv/bin/python -m bench.gpu list` shows what there is to measure, the most informative first, and `run --help` the
options; with `--dry` the same runs without a card, on a device that counts bytes (a C++ compiler and ninja are needed).
`requirements.txt` has exact versions, since predictions are of them. Others' recipes are run too where their packages
are: `venv/bin/pip install {others}`.
"""


def write(folder: Path, *, wheels: bool = False, index_url: str | None = None) -> None:
    """Write the folder. With `wheels` everything that it needs is downloaded into it, for a machine without a network.

    Raises: UsageError, outside a checkout or without what builds a wheel; FileError, when it cannot be written.
    """
    if not (_ROOT / "pyproject.toml").is_file():
        raise UsageError(
            "a folder is packed from a checkout", "there is no pyproject.toml here", "clone the repository"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileError(f"{folder} is not empty", "what was packed before would be mixed in", "give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(folder)
        built = _wheel(folder / "wheels")
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), encoding="utf-8")
        (folder / "README.md").write_text(_readme(built, offline=wheels), encoding="utf-8")
    except OSError as error:
        raise FileError(f"{folder} cannot be written", error.strerror or str(error), "give another folder") from None
    if wheels:
        where = [] if index_url is None else ["--index-url", index_url]
        _run("pip", "download", "--dest", folder / "wheels", "--requirement", folder / "requirements.txt", *where)


def _copy(folder: Path) -> None:
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(_HERE, folder / "bench" / "gpu", ignore=unwanted)
    shutil.copy(_HERE.parent / "__init__.py", folder / "bench" / "__init__.py")
    (folder / "bench" / "gpu" / "REVISION").write_text(f"{machines.revision()}\n", encoding="utf-8")
    counted = _ROOT / "truth"
    if (counted / "device").is_dir():  # for dry mode
        shutil.copytree(counted / "device", folder / "truth" / "device", ignore=unwanted)
        shutil.copy(counted / "__init__.py", folder / "truth" / "__init__.py")


def _wheel(folder: Path) -> str:
    _run("build", "--wheel", "--no-isolation", "--outdir", folder, _ROOT)
    (built,) = folder.glob("dg_run-*.whl")
    return built.name


def _run(module: str, *words: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise UsageError(
            f"python -m {module} failed",
            said,
            "pip install build hatchling" if module == "build" else "is a network there?",
        )


def requirements() -> list[str]:
    """Return everything that dg-run needs, at the versions that are installed here; what is not installed is left open.

    A local part of a version is left out: `+cpu` is of this machine's torch, and a card needs another build of it.
    """
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    _add(found, project["dependencies"])
    return [found[name] for name in sorted(found)]


def _add(found: dict[str, str], wanted: Iterable[str]) -> None:
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in found:
            continue
        try:
            there = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"{requirement.name}{requirement.specifier}"
            continue
        found[name] = f"{name}=={there.version.partition('+')[0]}"
        _add(found, there.requires or ())


def _readme(wheel: str, *, offline: bool) -> str:
    return _README.format(
        revision=machines.revision(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        wheel=wheel,
        offline="--no-index --find-links wheels " if offline else "",
        others=" ".join(machines.ALSO[:2]),
    )
