"""The report of the GPU harness, of invented records (tests/gpu_records.py), and the folder that it is carried in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import compare, pack, report
from bench.gpu.compare import Run
from bench.gpu.matrix import Case
from engine.errors import FileError, UsageError
from engine.units import GIB
from tests import gpu_records
from tests.gpu_records import measured, record

SDXL = "SDXL/1024x1024/4steps"


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return gpu_records.records()


@pytest.fixture(scope="module")
def runs(records: list[dict[str, Any]]) -> list[Run]:
    return compare.runs(records)


def run_of(runs: list[Run], ending: str) -> Run:
    return next(r for r in runs if r.id.endswith(ending))


def test_peaks_are_of_the_first_call_and_seconds_of_the_last(runs: list[Run]) -> None:
    run = run_of(runs, "exact/SDXL/1024x1024/4steps/float16/resident")
    assert run.peak_bytes("allocated") == 8 * GIB
    assert run.peak_bytes("reserved") == 9 * GIB
    assert run.nvml_bytes == 9.5 * GIB
    assert run.seconds == 1.0
    assert run.whole_seconds == pytest.approx(1.0 + 46 * 0.1)  # SDXL takes 50 steps, of which 4 were run


def test_where_nvml_names_no_process_the_card_tells_less_what_others_had(records: list[dict[str, Any]]) -> None:
    found = json.loads(json.dumps(records[1]))
    for phases in (found["measured"]["load"], *(c["phases"] for c in found["measured"]["calls"])):
        for phase in phases:
            phase["nvml_process_bytes"] = None
    (run,) = compare.runs([found])
    assert run.nvml_bytes == (9 + 3.5 - 3) * GIB


def test_what_nvml_missed_between_two_looks_was_held_all_the_same(records: list[dict[str, Any]]) -> None:
    """Reserved at most 9 GiB, and 10 GiB with a context of 1 at rest: NVML was looked at while 9.5 were held."""
    found = json.loads(json.dumps(records[1]))
    found["measured"]["at_rest"] = {"process_bytes": 3 * GIB, "card_bytes": None, "reserved_bytes": 2 * GIB}
    (run,) = compare.runs([found])
    assert run.nvml_bytes == 9.5 * GIB and run.held_bytes == run.device_bytes == 10 * GIB
    found["measured"]["at_rest"]["process_bytes"] = None
    (run,) = compare.runs([found])
    assert run.held_bytes == 9.5 * GIB


def test_what_the_c_library_keeps_is_not_the_runs(records: list[dict[str, Any]]) -> None:
    found = json.loads(json.dumps(records[1]))
    (run,) = compare.runs([found])
    assert run.host_bytes == 2 * GIB
    found["measured"]["host"]["trimmed_bytes"] = GIB // 4
    (run,) = compare.runs([found])
    assert run.host_bytes == 2 * GIB - (GIB - GIB // 4)


def test_the_last_record_of_a_case_counts(records: list[dict[str, Any]]) -> None:
    (run,) = compare.runs([records[1], records[1] | {"status": "oom"}])
    assert run.status == "oom"


def test_errors_are_of_the_prediction_and_in_their_direction(runs: list[Run]) -> None:
    points = compare.points(runs)
    assert {len(points[of]) for of in ("allocated", "reserved", "device", "seconds")} == {2}
    point = points["allocated"][0]
    said = run_of(runs, "float16/resident").estimate.peak_allocated_bytes
    assert said is not None and point.error == pytest.approx(said / (8 * GIB) - 1)
    assert compare.summary([compare.Point(name="x", predicted=96, measured=100)]).too_low == 1
    assert compare.summary([compare.Point(name="x", predicted=98, measured=100)]).too_low == 0


def test_out_of_memory_is_counted_by_margin(runs: list[Run]) -> None:
    (trial,) = compare.trials(runs)
    assert (trial.margin, trial.tried, trial.died) == (0.03, 2, ())
    assert trial.full == (f"required/{SDXL}/float16/resident/+3.0%",)


def test_a_later_call_that_ran_out_of_memory_is_told_apart() -> None:
    one = measured(6.0, 2.5)
    later = record(f"required/{SDXL}/float16/model/+3.0%", "oom", "full", measured=one | {"calls": one["calls"][:1]})
    (trial,) = compare.trials(compare.runs([later]))
    assert (trial.full, trial.full_later) == ((), (later["id"],))
    assert f"0 of 1 ran out of memory, 1 in a later call: {later['id']} (a later call)." in report.page([later])


def test_what_fits_a_card_is_what_was_seen_to(runs: list[Run]) -> None:
    resident = run_of(runs, "exact/SDXL/1024x1024/4steps/float16/resident")  # 9.5 GiB by NVML
    assert resident.fits(10 * GIB) and not resident.fits(9 * GIB)
    emulated = run_of(runs, "8GiB")
    assert emulated.fits(8 * GIB) and emulated.fits(9 * GIB) and not emulated.fits(7 * GIB)
    required = run_of(runs, f"required/{SDXL}/float16/model/+3.0%")
    cap, context = required.record["cap_bytes"], required.context_bytes
    assert context is not None
    assert required.fits(cap + context) and not required.fits(cap + context - 1)
    assert not run_of(runs, f"chosen/{SDXL}/12GiB").fits(80 * GIB), "it ran out of memory"


def test_regret_is_what_the_choice_takes_beyond_the_best_that_fits(runs: list[Run]) -> None:
    small, large = compare.regrets(runs)
    # On 8 GiB: the choice 3.0 s, model offload 2.0 s (7.5 GiB by NVML); the rest of the steps takes the same 4.6 s.
    assert small.best is not None and small.best.id == f"exact/{SDXL}/float16/model"
    assert small.share == pytest.approx((3.0 + 4.6) / (2.0 + 4.6) - 1)
    # On 12 GiB it ran out of memory: no share, and the best is told all the same.
    assert large.share is None and large.best is not None and large.best.id == f"exact/{SDXL}/float16/resident"


def test_a_choice_that_is_the_best_has_no_regret_and_lossy_runs_stand_aside() -> None:
    chosen = record(f"chosen/{SDXL}/8GiB", measured=measured(5.0, 1.0))
    other = record(f"exact/{SDXL}/float16/model", measured=measured(1.0, 0.1))
    other |= {"id": "exact/another model", "case": other["case"] | {"name": "PixArt-Sigma"}}
    (regret,) = compare.regrets(compare.runs([chosen, other]))
    assert regret.share == 0.0, "another model's run is no better one of this"
    lossy = record(f"recipe/{SDXL}/float16/mmgp/8GiB", measured=measured(3.0, 0.1))
    assert compare.regrets(compare.runs([chosen, lossy]))[0].share == 0.0


def test_a_refusal_where_something_fits_is_shown(records: list[dict[str, Any]]) -> None:
    refused = record(f"chosen/{SDXL}/16GiB", "refused", "nothing fits")
    text = report.page([*records, refused])
    assert "| SDXL 1024x1024 | 16.00 GiB |" in text and "nothing fits" in text


def test_the_page_says_everything_that_was_asked(records: list[dict[str, Any]]) -> None:
    text = report.page(records)
    for part in (
        "## Invented Card",
        "12 cases: 6 measured, 4 oom, 1 skipped, 1 timeout",
        "#### Allocated bytes",
        "#### Reserved bytes",
        "#### Device bytes",
        "### Phase by phase",
        "- At required +3.0%: 1 of 2 ran out of memory: required/SDXL/1024x1024/4steps/float16/resident/+3.0%.",
        "1 choices: median regret 15.2%, worst 15.2%.",
        "| SDXL 1024x1024 | 8.00 GiB | 7.600 | 6.800 | **OOM** | not installed |",
        "### The CUDA context",
        "| a tensor | 1.000 | 0 B |",
        "- exact/SDXL/1024x1024/4steps/float16/group-leaf: oom: CUDA out of memory in decode",
        "- exact/SDXL/1024x1024/4steps/float16/sequential: timeout: it was ended after 6 min 0 s",
    ):
        assert part in text, part
    assert "Dry mode" not in text


def test_every_table_has_as_many_cells_as_its_head(records: list[dict[str, Any]]) -> None:
    width = None
    for line in report.page(records).splitlines():
        if not line.startswith("|"):
            width = None
        elif width is None:
            width = line.count(" | ")
        else:
            assert line.count(" | ") == width, line


def test_dry_mode_is_said_aloud_and_holds_tensors_against_counted_bytes(records: list[dict[str, Any]]) -> None:
    machine = {**gpu_records.MACHINE, "device": "counted"}
    dry = records[1] | {"machine": machine, "tensors": {"encode": 4 * GIB, "denoise": 8 * GIB, "decode": GIB}}
    text = report.page([dry])
    assert "this is no measurement of a GPU" in text
    assert "| SDXL/1024x1024/4steps/float16/resident | 8.0000 | 8.0000 | equal |  |" in text
    assert "#### Allocated bytes" not in text


def test_machines_are_kept_apart(records: list[dict[str, Any]]) -> None:
    other = records[1] | {"machine": {**gpu_records.MACHINE, "card": "Another Card"}}
    text = report.page([*records, other])
    assert "## Invented Card" in text and "## Another Card" in text and "1 cases: 1 measured" in text


def test_predictions_can_be_made_anew(records: list[dict[str, Any]]) -> None:
    stale = json.loads(json.dumps(records[1]))
    stale["plan"]["estimate"]["peak_allocated_bytes"] = 1
    (then,), (now,) = compare.runs([stale]), compare.runs([stale], anew=True)
    assert then.estimate.peak_allocated_bytes == 1
    assert now.estimate.peak_allocated_bytes == records[1]["plan"]["estimate"]["peak_allocated_bytes"]


def test_anew_is_with_the_libraries_that_the_record_was_measured_with(records: list[dict[str, Any]]) -> None:
    """torch 2.11 keeps 1 MiB for cublasLt, which a block of its own is taken for."""
    old = json.loads(json.dumps(records[1]))
    old["machine"]["versions"] |= {"torch": "2.11.0+cu130", "cudnn": "91900"}
    (now,), (then,) = compare.runs([records[1]], anew=True), compare.runs([old], anew=True)
    one, other = (run.estimate.peak_allocated_bytes for run in (now, then))
    assert one is not None and other == one + 1024**2


def test_a_brief_page_is_of_runs_alone(records: list[dict[str, Any]]) -> None:
    text = report.page(records, brief=True)
    assert "### Predicted and measured" in text and "### On a card of what is required" in text
    assert "### Phase by phase" not in text and "### The CUDA context" not in text


def test_no_records_make_a_page_too() -> None:
    assert "Nothing has been measured." in report.page([])


# --- the folder ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("packed") / "folder"
    pack.write(made)
    return made


def carried(folder: Path, installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the harness in the folder, beside what an install of the wheel would give, and without the repository."""
    (wheel,) = (folder / "wheels").glob("*.whl")
    if not installed.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "bench.gpu", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)


def test_the_folder_has_what_it_needs_and_says_what_to_type(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    (wheel,) = (folder / "wheels").iterdir()
    assert f"wheels/{wheel.name}" in text and text.count("venv/bin/python -m bench.gpu run") == 1
    pins = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert any(p.startswith("torch==") and "+" not in p for p in pins)
    assert all("==" in p for p in pins)
    assert (folder / "bench" / "gpu" / "REVISION").read_text(encoding="utf-8").strip()
    assert not list(folder.rglob("*.pyc")) and not (folder / "bench" / "gpu" / "results").exists()


def test_the_folder_works_without_the_repository(folder: Path, tmp_path: Path) -> None:
    assert "mmgp" in carried(folder, tmp_path / "site", "run", "--help").stdout
    lines = "".join(json.dumps(r) + "\n" for r in gpu_records.records())
    (tmp_path / "r.jsonl").write_text(lines, encoding="utf-8")
    assert "## Invented Card" in carried(folder, tmp_path / "site", "report", str(tmp_path / "r.jsonl")).stdout


def test_a_folder_is_packed_from_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_ROOT", tmp_path)
    with pytest.raises(UsageError, match="from a checkout"):
        pack.write(tmp_path / "folder")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(FileError, match="is not empty"):
        pack.write(tmp_path)


def test_cases_of_records_are_cases(records: list[dict[str, Any]]) -> None:
    assert all(Case.of(r["case"]).id == r["id"] for r in records)
