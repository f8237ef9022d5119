"""The GPU harness in dry mode, whole: on the device that counts bytes, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import compare, journal, matrix, pack

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.slow


def harness(cwd: Path, path: str, *words: str | Path) -> str:
    """Run the harness and return what it prints."""
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "bench.gpu", *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_runs_and_the_counted_bytes_are_the_predicted_ones(tmp_path: Path) -> None:
    out = tmp_path / "dry.jsonl"
    harness(ROOT, str(ROOT), "run", "--dry", "--out", out)
    runs = compare.runs(journal.read(out))
    assert [r.id for r in runs] == [c.id for c in matrix.cases("dry")]
    assert not [(r.id, r.record["because"]) for r in runs if r.status in journal.DIED]
    assert [r.id for r in runs if r.status == "oom"] == ["required/embedded/128x128/4steps/bfloat16/resident/-4.0%"]
    exact = [r for r in runs if r.case.kind == "exact" and r.is_measured]
    assert len(exact) >= 9
    for run in exact:
        for phase in run.first_phases:
            said = run.tensors.get(phase["name"])
            if said is not None and phase["name"] != "load":
                assert said == pytest.approx(phase["allocated_bytes"], abs=1024), (run.id, phase["name"])


def test_forks_of_one_process_measure_the_same(tmp_path: Path) -> None:
    ids = ["exact/embedded/128x128/4steps/bfloat16/model", "exact/embedded/128x128/4steps/bfloat16/resident"]
    listed = tmp_path / "cases.txt"
    listed.write_text("# in this order\n" + "\n".join(ids) + "\n", encoding="utf-8")
    plain, forked = tmp_path / "plain.jsonl", tmp_path / "forked.jsonl"
    harness(ROOT, str(ROOT), "run", "--dry", "--cases", listed, "--out", plain)
    harness(ROOT, str(ROOT), "run", "--dry", "--cases", listed, "--out", forked, "--fork", "--second-under", "0")
    one, other = (compare.runs(journal.read(path)) for path in (plain, forked))
    assert [r.id for r in one] == [r.id for r in other] == ids
    assert [len(r.measured["calls"]) for r in other] == [1, 1]
    for mine, its in zip(one, other, strict=True):
        assert [p["allocated_bytes"] for p in mine.first_phases] == [p["allocated_bytes"] for p in its.first_phases]


def test_the_packed_folder_runs_it_too(tmp_path: Path) -> None:
    folder, site = tmp_path / "folder", tmp_path / "site"
    pack.write(folder)
    (wheel,) = (folder / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    harness(folder, str(site), "run", "--dry", "--only", "bfloat16/model+tiled", "--out", "r.jsonl")
    (record,) = (json.loads(line) for line in (folder / "r.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["status"] == "measured", record["because"]
