"""The GPU harness, as far as it goes without a card: its cases, its journal, its loop, and the processes it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as commands
from bench.gpu import journal, machines, matrix, predict, runner
from bench.gpu.case import Order, unnamed
from bench.gpu.journal import Journal
from bench.gpu.matrix import Case
from bench.gpu.recipes import RECIPES
from engine import optimizers
from engine.errors import FileError, HardwareError, UsageError
from engine.units import GIB
from engine.values import Hardware
from tests import gpu_records
from tests.conftest import write

ROOT = Path(__file__).parents[1]
ASKED_FOR = {"FLUX.1-dev", "SDXL", "SD3.5-medium", "Wan2.1-1.3B", "Qwen-Image"}


# --- cases ---


@pytest.mark.parametrize("name", matrix.sets())
def test_ids_are_one_of_each_and_cases_survive_json(name: str) -> None:
    cases = matrix.cases(name)
    assert len({c.id for c in cases}) == len(cases) > 20
    assert [Case.of(json.loads(json.dumps(c.plain()))) for c in cases] == list(cases)


def test_ids_are_what_files_of_results_are_known_by() -> None:
    """They stay as they are: a journal that was begun goes on only with the same ids."""
    found = {c.id for c in matrix.cases("quick")} | {c.id for c in matrix.cases("full")}
    assert {
        "machine/copies",
        "machine/convolutions/SDXL",
        "exact/FLUX.1-dev/1024x1024/4steps/bfloat16/resident",
        "exact/Wan2.1-1.3B/832x480x81/4steps/bfloat16/model+tiled",
        "exact/SDXL/1024x1024/batch4/4steps/float16/resident+sliced+tiled",
        "required/SDXL/1024x1024/4steps/float16/group-leaf/+3.0%",
        "chosen/Qwen-Image/1328x1328/4steps/12GiB",
        "recipe/SDXL/1024x1024/4steps/float16/mmgp/8GiB",
    } <= found


def test_every_field_that_makes_another_case_makes_another_id() -> None:
    case = gpu_records.case("required/SDXL/1024x1024/4steps/float16/model/+3.0%")
    plain = case.plain()
    for change in (
        {"height": 512},
        {"frames": 2},
        {"batch": 2},
        {"steps": 5},
        {"dtype": "float32"},
        {"placement": "other"},
        {"extras": ("fp8",)},
        {"margin": 0.031},
        {"budget_bytes": GIB},
        {"recipe": "x", "placement": None},
        {"kind": "exact"},
    ):
        assert Case.of({**plain, **change}).id != case.id, change


def test_the_quick_set_has_each_asked_model_in_every_kind() -> None:
    cases = matrix.cases("quick")
    for kind in ("exact", "required", "chosen", "recipe"):
        assert {c.name for c in cases if c.kind == kind} == ASKED_FOR


def test_what_tells_most_comes_first_and_every_model_has_its_turn() -> None:
    cases = matrix.cases("quick")
    exact = [c for c in cases if c.kind == "exact"]
    assert {c.name for c in exact[:5]} == ASKED_FOR
    assert {c.placement for c in exact[:5]} == {"resident"}
    assert [c.kind for c in cases[:3]] == ["machine", "machine", "exact"]


def test_narrowing() -> None:
    cases = matrix.cases("quick", models=["SDXL"], budgets_bytes=[6 * GIB], steps=2)
    assert {c.name for c in cases} == {None, "SDXL"}
    assert {c.budget_bytes for c in cases if c.kind in ("chosen", "recipe")} == {6 * GIB}
    assert {c.steps for c in cases if c.kind != "machine"} == {2}


@pytest.mark.parametrize(
    ("asked", "says"), [({"models": ["SDLX"]}, "did you mean 'SDXL'?"), ({}, "did you mean 'quick'?")]
)
def test_a_wrong_name_is_refused_with_the_nearest_right_one(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        matrix.cases("full" if asked else "qiuck", **asked)
    assert refused.value.do == says


def test_lists_are_in_the_order_that_dg_run_writes_and_recipes_are_there() -> None:
    for case in matrix.cases("full"):
        assert list(case.optimizers) == list(optimizers.in_order(case.optimizers))
        assert case.recipe is None or case.recipe in RECIPES


# --- what is said of a case before it runs ---


def test_the_outlook_caps_what_is_required_and_what_is_emulated() -> None:
    hardware = gpu_records.hardware()
    resident = gpu_records.case("required/SDXL/1024x1024/4steps/float16/resident/+3.0%")
    seen = predict.outlook(resident, hardware)
    assert seen.plan is not None and seen.plan.estimate.required_bytes is not None and seen.cap_bytes is not None
    context = seen.plan.estimate.device_bytes - seen.plan.estimate.peak_reserved_bytes  # type: ignore[operator]
    assert seen.cap_bytes == round(seen.plan.estimate.required_bytes * 1.03) - context
    chosen = predict.outlook(gpu_records.case("chosen/SDXL/1024x1024/4steps/12GiB"), hardware)
    assert chosen.cap_bytes == 12 * GIB - context
    assert chosen.plan is not None and chosen.plan.request.vram_bytes == 12 * GIB
    assert predict.outlook(gpu_records.case("recipe/SDXL/1024x1024/4steps/float16/model/12GiB"), hardware).plan is None


def test_what_would_be_no_use_is_not_run() -> None:
    tiled = gpu_records.case("exact/SDXL/1024x1024/4steps/float16/resident+tiled")
    seen = predict.outlook(tiled, gpu_records.hardware())
    assert seen.status == "skipped" and seen.because is not None
    assert seen.because.startswith("vae_tiling would have no effect")


@pytest.mark.slow
def test_a_refusal_of_dg_run_is_an_answer() -> None:
    seen = predict.outlook(gpu_records.case("chosen/Qwen-Image/1328x1328/4steps/8GiB"), gpu_records.hardware())
    assert seen.plan is not None
    assert (seen.status == "refused") == (seen.plan.fits is False)


def test_what_cannot_fit_by_far_is_not_run() -> None:
    small = machines.hardware(True)  # a card of 24 GiB
    flux = predict.outlook(gpu_records.case("exact/FLUX.1-dev/1024x1024/4steps/bfloat16/resident"), small)
    assert flux.status == "skipped" and flux.because is not None and "on the card" in flux.because
    large = gpu_records.case("recipe/SDXL/1024x1024/4steps/float16/model/24GiB")
    assert predict.outlook(large, small).status is None


def test_a_rule_that_a_list_breaks_is_told() -> None:
    (case,) = [c for c in matrix.cases("dry") if c.id.endswith("sequential+fp8")]
    broken = Case.of({**case.plain(), "optimizers": [{"name": n, "params": {}} for n in ("model_offload", "resident")]})
    seen = predict.outlook(broken, machines.hardware(True))
    assert seen.status == "skipped" and seen.because is not None and "cannot be combined" in seen.because


# --- the journal ---


def line(case_id: str = "a", status: str = "measured", **more: Any) -> dict[str, Any]:
    return {"id": case_id, "machine": gpu_records.MACHINE, "status": status, **more}


def test_a_record_is_there_for_whoever_comes_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    Journal(path).append(line())
    again = Journal(path)
    assert again.has("a", gpu_records.MACHINE) and not again.has("b", gpu_records.MACHINE)
    assert path.read_bytes().endswith(b"\n")


def test_a_torn_last_line_is_dropped_and_what_follows_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    one = Journal(path)
    one.append(line("a"))
    one.append(line("b"))
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole), 9):
        path.write_bytes(whole[:length])
        again = Journal(path)
        assert again.has("a", gpu_records.MACHINE) and not again.has("b", gpu_records.MACHINE)
        again.append(line("c"))
        assert [r["id"] for r in journal.read(path)] == ["a", "c"]


@pytest.mark.parametrize(
    "other", [{"card": "another"}, {"driver": "2"}, {"versions": {"torch": "2.14"}}, {"device": "counted"}]
)
def test_what_was_measured_on_another_machine_is_measured_again(other: dict[str, Any], tmp_path: Path) -> None:
    one = Journal(tmp_path / "out.jsonl")
    one.append(line())
    assert not one.has("a", gpu_records.MACHINE | other)
    assert one.has("a", gpu_records.MACHINE | {"revision": "another"})


@pytest.mark.parametrize("status", [*journal.DIED, "measured", "oom", "refused", "skipped"])
def test_only_what_died_is_tried_again_and_only_on_demand(status: str, tmp_path: Path) -> None:
    one = Journal(tmp_path / "out.jsonl")
    one.append(line(status=status))
    assert one.has("a", gpu_records.MACHINE)
    assert one.has("a", gpu_records.MACHINE, retry=True) == (status not in journal.DIED)


@pytest.mark.parametrize("text", ["not json\n", '{"schema": "other"}\n', "[1]\n"])
def test_a_file_of_something_else_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "out.jsonl", json.dumps({"schema": journal.SCHEMA, **line()}) + "\n" + text)
    with pytest.raises(FileError, match=r"out\.jsonl:2: this is no record"):
        Journal(path)


# --- the loop ---

FOREVER = 1e9


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """The orders that were given to processes, none of which is started."""
    found: list[Order] = []

    def ask(order: Order, limit_s: float) -> runner.Answer:
        found.append(order)
        outcome = {"status": "measured", "because": None, "phase": None, "measured": {"calls": [{"seconds": 1.0}]}}
        return runner.Answer(outcome=outcome, wall_s=1.0)

    monkeypatch.setattr(runner, "ask", ask)
    return found


def loop(
    cases: list[Case],
    path: Path,
    *,
    until: float | None = None,
    look: Callable[[], Hardware] | None = None,
    **more: Any,
) -> int:
    limits = runner.Limits(until=time.monotonic() + FOREVER if until is None else until, case_s=60)
    hardware = look or gpu_records.hardware
    return runner.run(cases, Journal(path), gpu_records.MACHINE, hardware, limits, told=lambda text: None, **more)


def three() -> list[Case]:
    return [
        gpu_records.case("machine/copies"),
        gpu_records.case("exact/SDXL/1024x1024/4steps/float16/resident"),
        gpu_records.case("recipe/SDXL/1024x1024/4steps/float16/model/8GiB"),
    ]


def test_a_run_goes_on_where_it_stopped(asked: list[Order], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert loop(three()[:2], path) == 0
    assert loop(three(), path) == 0
    assert [Case.of(o.case).id for o in asked] == [c.id for c in three()]
    found = journal.read(path)
    assert [r["id"] for r in found] == [c.id for c in three()]
    assert found[1]["plan"]["estimate"]["peak_allocated_bytes"] > 0
    assert found[0]["plan"] is None and found[2]["cap_bytes"] < 8 * GIB
    assert "uuid" in found[1]["plan"]["hardware"]["gpus"][0] and found[1]["plan"]["hardware"]["gpus"][0]["uuid"] is None


def test_what_is_not_run_is_recorded_with_its_reason(asked: list[Order], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    loop([gpu_records.case("recipe/SDXL/1024x1024/4steps/float16/mmgp/8GiB")], path)
    (found,) = journal.read(path)
    assert not asked and found["status"] == "skipped" and "pip install mmgp" in found["because"]


def test_no_case_is_begun_once_the_time_is_up(asked: list[Order], tmp_path: Path) -> None:
    assert loop(three(), tmp_path / "out.jsonl", until=time.monotonic() + 5) == 3
    assert not asked and not (tmp_path / "out.jsonl").exists()


def test_a_case_that_all_time_ran_out_on_is_left_for_the_next_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def ask(order: Order, limit_s: float) -> runner.Answer:
        now[0] += limit_s
        return runner.Answer(
            outcome={"status": "timeout", "because": "", "phase": None, "measured": {}}, wall_s=limit_s
        )

    monkeypatch.setattr(runner, "ask", ask)
    path = tmp_path / "out.jsonl"
    # The first has its own 60 s and is at fault itself; for the second 40 s are left.
    assert loop(three(), path, until=100.0) == 2
    assert [(r["id"], r["status"]) for r in journal.read(path)] == [("machine/copies", "timeout")]


def test_an_interrupted_case_is_not_recorded_and_what_was_is_kept(
    monkeypatch: pytest.MonkeyPatch, asked: list[Order], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    loop(three()[:1], path)

    def interrupted(order: Order, limit_s: float) -> runner.Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop(three(), path)
    assert [r["id"] for r in journal.read(path)] == ["machine/copies"]


# --- the processes ---


def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, limit_s: float = 30.0) -> dict[str, Any]:
    """Return the outcome of a case's process that runs `code`."""
    (tmp_path / "stand_in").mkdir(exist_ok=True)
    write(tmp_path / "stand_in", "__init__.py", "")
    write(tmp_path / "stand_in", "case.py", f"import json, os, signal, subprocess, sys, time\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_PACKAGE", "stand_in")
    outcome = runner.ask(Order(case=gpu_records.case("machine/copies").plain()), limit_s).outcome
    assert outcome is not None
    return outcome


def test_a_process_answers_with_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = process(monkeypatch, tmp_path, "print(json.dumps(json.load(sys.stdin)))", 12.5)
    assert found["limit_s"] == 12.5 and found["case"]["part"] == "copies"


@pytest.mark.parametrize(
    ("code", "status", "because"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "SIGKILL: the host's memory may have been full"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed", "SIGSEGV"),
        ("sys.stderr.write('CUDA error: no luck'); sys.exit(3)", "failed", "ended with code 3"),
        ("print('no answer')", "failed", "ended with code 0"),
        ("time.sleep(60)", "timeout", "ended after"),
    ],
)
def test_a_case_that_dies_says_how(
    code: str, status: str, because: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = process(monkeypatch, tmp_path, code, 0.5 if status == "timeout" else 30.0)
    assert found["status"] == status and because in found["because"]
    if "stderr" in code:
        assert found["measured"]["said"] == "CUDA error: no luck"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes")
def test_a_case_that_is_ended_leaves_nobody_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"p = subprocess.Popen(['sleep', '60']); open({str(file)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    assert process(monkeypatch, tmp_path, code, 1.0)["status"] == "timeout"
    pid = int(file.read_text(encoding="utf-8"))
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2]:
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    pytest.fail("what the case had started is still there")


# --- commands ---


def test_the_commands_of_the_front_door(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["list", "--dry"]) == 0
    assert capsys.readouterr().out.splitlines() == [c.id for c in matrix.cases("dry")]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["list", "--models", "SDLX"], 2, "did you mean 'SDXL'?"),
        (["list", "--budgets", "8"], 2, "is not a size"),
        (["list", "--only", "nothing"], 2, "has 'nothing' in its id"),
        (["run", "--minutes", "0"], 2, "more than nothing"),
        (["report", "nowhere.jsonl"], 2, "there is no file"),
    ],
)
def test_errors_are_told_in_three_parts(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(words) == code
    assert says in capsys.readouterr().err


def test_without_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "NEEDED", ("torch", "a-package-that-is-not-here"))
    with pytest.raises(UsageError, match="a-package-that-is-not-here not installed"):
        machines.refuse_incomplete()


@pytest.mark.usefixtures("no_card")
def test_without_a_card_it_says_so() -> None:
    with pytest.raises(HardwareError, match="there is no card here"):
        machines.hardware(False)


def test_a_record_names_nobody() -> None:
    """Neither the card's UUID nor whoever else uses it."""
    hardware = gpu_records.hardware()
    (card,) = hardware.gpus
    told = machines.described(hardware, {"device": "cuda", "torch": "2.13.0", "name": card.name})
    assert told["gpu"]["uuid"] is None and told["gpu"]["processes"] == ()


def test_what_libraries_say_is_kept_without_this_machines_folders() -> None:
    text = f"{sys.prefix}/lib/x.so and {Path.cwd()}/y and {Path.home()}/z"
    assert unnamed(text) == "<python>/lib/x.so and <here>/y and ~/z"


def test_planning_and_reporting_need_no_torch(tmp_path: Path) -> None:
    made = gpu_records.record("exact/SDXL/1024x1024/4steps/float16/resident", measured=gpu_records.measured(8.0, 1.0))
    file = write(tmp_path, "r.jsonl", json.dumps(made) + "\n")
    code = (
        "import sys; from bench.gpu import __main__ as m; "
        f"m.main(['list']); m.main(['report', {str(file)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
