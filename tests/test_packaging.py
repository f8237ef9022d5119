"""What a user installs: the wheel holds the profiles, the schemas, the catalogue and the model, and works anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from engine import versions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def outside(code: str, *, cwd: Path, path: Path) -> str:
    """Run code in another directory, with nothing but `path` before the libraries."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_wheel_carries_its_data_and_no_stray_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {n.partition("/")[0] for n in names}
    assert tops == {"engine", next(t for t in tops if t.endswith(".dist-info"))}
    for needed in (
        "engine/_data/profiles/low.yaml",
        "engine/_data/schema/plan.schema.json",
        "engine/_data/schema/compatibility.yaml",
        "engine/embedded/tiny-flux/model_index.json",
        "engine/embedded/facts.json",
        "engine/facts/models/flux1-dev.json",
        "engine/py.typed",
    ):
        assert needed in names
    assert not [n for n in names if "test" in n or n.endswith(".pyc")]


def test_the_wheels_content_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A user's own folder of that name must not be taken for ours.
    (elsewhere / "profiles").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import engine, engine.paths, engine.profiles;"
        "print(engine.__file__); print(engine.paths.data_dir('profiles'));"
        "print([p.name for p in engine.profiles.built_in()]); print(engine.resolve(device='cpu').profile.name)"
    )
    file, data, names, chosen = outside(code, cwd=elsewhere, path=installed).splitlines()
    assert Path(file).parent == installed / "engine"
    assert Path(data) == installed / "engine" / "_data" / "profiles"
    assert names == "['extreme-low', 'low', 'hi-res', 'medium', 'max', 'cpu']"
    assert chosen == "cpu"


def test_the_checkout_works_from_another_directory(tmp_path: Path) -> None:
    code = "import engine.paths; print(engine.paths.data_dir('schema'))"
    assert outside(code, cwd=tmp_path, path=ROOT).strip() == str(ROOT / "schema")


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment_draws_a_picture(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_dir = tmp_path / "venv" / "bin"
    constraints = ROOT / "constraints.txt"
    install: list[str | Path] = [
        bin_dir / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)
    command: list[str | Path] = [
        bin_dir / "dg-run",
        "--auto",
        "--device",
        "cpu",
        "--prompt",
        "a red circle on a blue background",
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--output", "p.png"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "p.png\n"
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_tested_ranges_hold_what_the_constraints_pin() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    for name in versions.TESTED:
        assert versions.note(name, pinned[name]) is None


def test_users_are_not_bound_to_the_pinned_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=2.13" in project["dependencies"]
    assert project["optional-dependencies"]["xdit"] == ["xfuser>=0.7; sys_platform == 'linux'"]
