"""Runs that are remembered: nothing is lost, nothing is shifted, and an interval is as wide as errors were."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engine
from engine import calibration, doctor, history
from engine import prompts as said
from engine.errors import OutOfMemoryError
from engine.history import Range, Run
from engine.plan import Plan
from engine.run import device, items, runner
from engine.run.progress import Quiet
from engine.values import Driver, Estimate, FrozenDict, Interval
from tests.test_calibration import CARD, DRIVER, ROOT, here, made, plan

UUID = CARD.uuid or ""
GIB = 1024**3


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def run(number: int = 0, bytes_ratio: float = 1.0, seconds_ratio: float = 1.0, **more: Any) -> Run:
    """Return a run, of another kind for each number."""
    usual: dict[str, Any] = {
        "when": "2026-10-03T08:09:10Z",
        "versions": FrozenDict(history.circumstances(DRIVER)),
        "calibration": None,
        "model": f"team/model-{number}",
        "height": 1024,
        "width": 1024,
        "frames": None,
        "batch": 1,
        "steps": 28,
        "optimizers": ("dtype: bfloat16", "resident"),
        "placement": "resident",
        "basis": "traced",
        "digest": "sha256:0",
        "predicted_bytes": 10**10,
        "measured_bytes": round(10**10 * bytes_ratio),
        "predicted_seconds": 10.0,
        "measured_seconds": 10.0 * seconds_ratio,
        "interval": Interval(low_bytes=9 * 10**9, high_bytes=11 * 10**9, low_seconds=7.5, high_seconds=13.5),
    }
    return Run(**usual | more)


def remember(*runs: Run) -> None:
    for each in runs:
        history.remember(UUID, each)


# On disk.


def test_a_run_comes_back_as_it_was_and_in_order() -> None:
    runs = (run(), run(1, out_of_memory=True, measured_bytes=None, measured_seconds=None), run(2, frames=49))
    remember(*runs)
    assert history.read(UUID) == runs
    assert history.read("GPU-other") == ()
    assert history.comparable(CARD, DRIVER, None) == runs


def test_the_last_five_hundred_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_RUNS", 5)
    for number in range(12):
        remember(run(number))
        assert [r.model for r in history.read(UUID)] == [
            f"team/model-{n}" for n in range(max(0, number - 4), number + 1)
        ]
    assert sorted(p.suffix for p in history.folder().iterdir()) in ([".jsonl"], [".jsonl", ".lock"])


@pytest.mark.parametrize(
    "torn",
    [
        b'{"when": "2026',
        b"",
        b"null\n",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'{"when": 5}\n',
        b"5\n5",
    ],
)
def test_a_torn_line_is_left_out_and_spoils_no_other(torn: bytes) -> None:
    remember(run(0))
    with history.path(UUID).open("ab") as file:
        file.write(torn)
    remember(run(1))
    assert [r.model for r in history.read(UUID)] == ["team/model-0", "team/model-1"]
    assert plan().estimate.seconds is not None


@pytest.mark.parametrize(
    "more", [{"batch": "1"}, {"measured_bytes": -5}, {"measured_seconds": "fast"}, {"model": None}, {"height": True}]
)
def test_a_line_of_other_kinds_of_values_is_left_out(more: dict[str, Any]) -> None:
    remember(run(**more), run(1))
    assert [r.model for r in history.read(UUID)] == ["team/model-1"]


WRITER = """
import sys
from engine import history
from tests.test_history import UUID, run
for n in range(40):
    history.remember(UUID, run(n, digest=sys.argv[1]))
"""


def test_two_processes_at_once_lose_nothing() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, n], env=env, stderr=subprocess.PIPE, text=True) for n in "ab"
    ]
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    for name in "ab":
        assert [r.model for r in history.read(UUID) if r.digest == name] == [f"team/model-{n}" for n in range(40)]


# What they say.


def test_only_runs_under_the_same_circumstances_are_compared() -> None:
    measured = made()
    now = history.circumstances(DRIVER)
    remember(run(0), run(1, versions=FrozenDict(now | {"torch": "1.0"})), run(2, calibration=measured.digest))
    assert [r.model for r in history.comparable(CARD, DRIVER, None)] == ["team/model-0"]
    assert [r.model for r in history.comparable(CARD, DRIVER, measured)] == ["team/model-2"]
    assert history.comparable(CARD, Driver(version="590", cuda=None), None) == ()
    assert history.comparable(None, DRIVER, None) == ()
    assert {"dg-run", "torch", "diffusers", "cuda", "cudnn", "driver"} <= set(now)


def test_fifty_repeats_of_one_run_count_once() -> None:
    found = history.summary([*(run(0, 1.0, 2.0) for _ in range(50)), run(1, 1.01, 1.0), run(2, 1.02, 1.1)])
    assert (found.runs, found.kinds, found.out_of_memory) == (52, 3, 0)
    assert found.bytes == history.Ratios(low=1.0, median=1.01, high=1.02)
    assert found.seconds is not None
    assert found.seconds.median == pytest.approx(1.1)
    assert found.seconds.high == 2.0
    assert history.ranges([run(0)] * 50)["resident", "traced"] == Range(kinds=1, bytes=None, seconds=None)


def test_a_run_that_ran_out_of_memory_has_no_ratio_and_is_counted() -> None:
    lost = run(1, out_of_memory=True, measured_bytes=None, measured_seconds=None)
    found = history.summary([run(0), lost])
    assert (found.out_of_memory, found.kinds) == (1, 2)
    assert found.bytes == history.Ratios(low=1.0, median=1.0, high=1.0)
    assert history.summary([lost]).bytes is None
    assert history.summary([]).seconds is None


errors = st.lists(st.floats(0, 5), min_size=history.FEWEST_KINDS, max_size=60)


@given(errors, st.data())
def test_a_larger_error_never_makes_an_interval_narrower(found: list[float], data: st.DataObject) -> None:
    before = history.widest_error(found)
    assert before is not None
    at = data.draw(st.integers(0, len(found) - 1))
    larger = [*found[:at], found[at] + data.draw(st.floats(0, 5)), *found[at + 1 :]]
    after = history.widest_error(larger)
    assert after is not None
    assert after >= before
    assert history.widest_error(found[::-1]) == before
    assert before <= max(found) * history.stretch(8) + 1e-12


def test_of_fewer_than_eight_nothing_is_concluded() -> None:
    assert history.widest_error([0.1] * 7) is None
    assert history.widest_error([0.1] * 8) == pytest.approx(0.1 * history.stretch(8))


def test_the_largest_error_is_stretched_until_there_are_nineteen() -> None:
    """At n = 19 the chance is 1 / (n + 1) = 0.05. For whole f it is one over a binomial: 1 / 21 at n = 5 and f = 2."""
    assert history.stretch(19) == pytest.approx(1, abs=1e-9)
    stretched = [history.stretch(n) for n in range(5, 20)]
    assert stretched == sorted(stretched, reverse=True)
    assert 1.9 < stretched[0] < 2
    ordered = [n / 100 for n in range(1, 101)]
    assert history.widest_error(ordered[:19]) == ordered[18]
    assert history.widest_error(ordered[:39]) == ordered[37]
    assert history.widest_error(ordered) == ordered[95]


DRAWS: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda r: abs(r.gauss(0, 0.1)),
    "off by a third, always": lambda r: abs(r.gauss(0.3, 0.05)),
    "uniform": lambda r: r.random(),
    "exponential": lambda r: r.expovariate(1),
}


@pytest.mark.parametrize("count", [8, 12, 19, 40])
@pytest.mark.parametrize("name", DRAWS)
def test_95_of_100_next_errors_lie_within(name: str, count: int) -> None:
    """4000 draws: the share that is seen of a true 95 % has a standard deviation of 0.35 %."""
    chance, draw = random.Random(f"{name} {count}"), DRAWS[name]
    held = 0
    for _ in range(4000):
        limit = history.widest_error([draw(chance) for _ in range(count)])
        held += draw(chance) <= (limit or 0)
    assert held / 4000 > 0.95 - 3 * 0.0035


def test_heavy_tails_are_covered_from_nineteen_on_and_nearly_so_before() -> None:
    chance = random.Random(7)

    def share(count: int) -> float:
        held = 0
        for _ in range(4000):
            limit = history.widest_error([chance.lognormvariate(0, 1) for _ in range(count)])
            held += chance.lognormvariate(0, 1) <= (limit or 0)
        return held / 4000

    assert share(19) > 0.94
    assert share(8) > 0.92


ranges = st.builds(
    Range, kinds=st.just(9), bytes=st.none() | st.floats(1.005, 20), seconds=st.none() | st.floats(1.05, 20)
)
estimates = st.builds(
    Estimate,
    peak_allocated_bytes=st.none() | st.integers(1, 2**45),
    required_bytes=st.none() | st.integers(1, 2**45),
    seconds=st.none() | st.floats(0.001, 1e5).map(lambda s: round(s, 3)),
    interval=st.builds(Interval, low_bytes=st.just(5), high_seconds=st.just(7.0)),
)


@given(estimates, st.none() | ranges)
def test_no_run_ever_shifts_an_estimate(before: Estimate, found: Range | None) -> None:
    after = history.adjusted(before, found)
    assert dataclasses.replace(after, interval=before.interval) == before
    span = after.interval
    if found is None or found.bytes is None or before.peak_allocated_bytes is None:
        assert (span.low_bytes, span.high_bytes) == (before.interval.low_bytes, before.interval.high_bytes)
    else:
        assert (span.low_bytes or 0) <= before.peak_allocated_bytes <= (span.high_bytes or 0)
        assert span.high_bytes == math.ceil(before.peak_allocated_bytes * found.bytes)
    if found is not None and found.seconds is not None and before.seconds is not None:
        assert (span.low_seconds or 0) <= before.seconds <= (span.high_seconds or 0)


@settings(max_examples=50)
@given(st.lists(st.floats(0.2, 5), min_size=8, max_size=30))
def test_the_truth_of_every_run_but_the_worst_lies_in_the_interval_they_make(ratios: list[float]) -> None:
    found = history.ranges([run(n, seconds_ratio=r) for n, r in enumerate(ratios)])["resident", "traced"]
    assert found.seconds is not None
    assert found.bytes == pytest.approx(1.005)
    outside = [r for r in ratios if not 1 / found.seconds - 1e-9 <= r <= found.seconds + 1e-9]
    assert len(outside) <= len(ratios) // 20
    assert found.seconds >= 1.05


def spread(*ratios: float, **more: Any) -> None:
    remember(*(run(n, seconds_ratio=r, bytes_ratio=1 + (r - 1) / 10, **more) for n, r in enumerate(ratios)))


def test_eight_different_runs_narrow_or_widen_a_plans_interval_and_nothing_else() -> None:
    before = plan().estimate
    spread(*(1.01 + n / 1000 for n in range(7)))
    assert plan().estimate == before
    spread(*(1.01 + n / 1000 for n in range(9)))
    narrow = plan()
    assert dataclasses.replace(narrow.estimate, interval=before.interval) == before
    assert (narrow.estimate.interval.high_seconds or 0) < (before.interval.high_seconds or 0)
    assert (narrow.estimate.interval.high_bytes or 0) < (before.interval.high_bytes or 0)
    (note,) = [n.because for n in narrow.notes if n.kind == "remembered"]
    assert "9 different runs on this card" in note
    assert note in narrow.explain()
    spread(*(3.0 + n for n in range(9)))
    wide = plan().estimate
    assert (wide.interval.high_seconds or 0) > 10 * (before.seconds or 1)
    assert wide.seconds == before.seconds
    assert wide.required_bytes == before.required_bytes


def test_runs_under_one_placement_say_nothing_of_another() -> None:
    before = [engine.resolve(optimizers=[n], hardware=here()).estimate for n in ("resident", "sequential_offload")]
    spread(*(1.01,) * 8)
    after = [engine.resolve(optimizers=[n], hardware=here()).estimate for n in ("resident", "sequential_offload")]
    assert after[0].interval != before[0].interval
    assert after[1] == before[1]


# Where they come from.


class Pipe:
    """A pipeline that draws nothing, and takes no time."""

    components: ClassVar[dict[str, Any]] = {}

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def set_progress_bar_config(self, **_: Any) -> None:
        """There is no bar."""

    def __call__(self, prompt: str, **_: Any) -> Any:
        if self.error is not None:
            raise self.error

        class Result:
            images = [Image.new("RGB", (8, 8))]  # noqa: RUF012

        return Result()


class Heard(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def called(plan: Plan, pipe: Pipe, *texts: str, told: Quiet | None = None) -> list[Any]:
    """Return the pictures of a pipeline that is ready."""
    calls = items.calls(said.of(texts), 7, plan.request.batch)
    made = runner.of(plan, runner.Ready(pipe=pipe, calls=calls), told or Quiet())
    return [output for each in made for output in each.outputs]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is not there, on which 12,345 bytes were allocated."""
    monkeypatch.setattr(device, "reset_peak", lambda name: None)
    monkeypatch.setattr(device, "peak_allocated_bytes", lambda name: None if name == "cpu" else 12345)


@pytest.mark.usefixtures("measured")
def test_each_call_on_a_card_is_remembered_beside_its_prediction() -> None:
    made_plan, told = plan(), Heard()
    pictures = called(made_plan, Pipe(), "a red circle", "a blue square", told=told)
    assert len(pictures) == 2
    first, second = history.read(UUID)
    assert first.kind == second.kind
    assert (first.model, first.height, first.width, first.digest) == ("embedded", 128, 128, made_plan.digest)
    assert (first.predicted_bytes, first.measured_bytes) == (made_plan.estimate.peak_allocated_bytes, 12345)
    assert first.predicted_seconds == made_plan.estimate.seconds
    assert first.interval == made_plan.estimate.interval
    assert 0 < (first.measured_seconds or 0) < 5
    assert (first.placement, first.basis, first.calibration) == ("resident", "traced", None)
    assert history.comparable(CARD, DRIVER, None) == (first, second)
    assert told.lines == []


@pytest.mark.usefixtures("measured")
def test_a_run_of_a_calibrated_plan_says_by_which_calibration() -> None:
    calibration.keep(made())
    called(plan(), Pipe(), "a red circle")
    assert [r.calibration for r in history.read(UUID)] == [made().digest]
    assert len(history.comparable(CARD, DRIVER, made())) == 1


@pytest.mark.usefixtures("measured")
def test_a_run_that_ran_out_of_memory_is_remembered_and_one_that_was_refused_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    def full(plan: Plan, calls: Sequence[items.Call], *_: object, **__: object) -> runner.Ready:
        return runner.Ready(pipe=Pipe(torch.OutOfMemoryError("2 GiB")), calls=tuple(calls))

    monkeypatch.setattr(runner, "prepared", full)
    with pytest.raises(OutOfMemoryError):
        next(plan().run("a red circle", seed=7))
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(BaseException):  # noqa: B017
            called(plan(), Pipe(error), "a red circle")  # type: ignore[arg-type]
    (found,) = history.read(UUID)
    assert (found.out_of_memory, found.measured_bytes, found.measured_seconds) == (True, None, None)


@pytest.mark.usefixtures("measured")
def test_a_run_on_the_cpu_is_not_remembered_nor_one_whose_card_has_no_name(state: Path) -> None:
    for made_plan in (engine.resolve(device="cpu"), plan().without_identity()):
        called(made_plan, Pipe(), "a red circle")
    assert not state.exists()


@pytest.mark.usefixtures("measured")
def test_where_nothing_can_be_written_one_line_says_so_and_the_run_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "file"))
    told = Heard()
    assert len(called(plan(), Pipe(), "a red circle", told=told)) == 1
    (line,) = told.lines
    assert "could not be remembered in" in line


# What the doctor says of them.


def lines() -> dict[str, doctor.Line]:
    return {line.name: line for line in doctor.examine(here()) if line.name.startswith("card 0:")}


def test_the_doctor_shows_what_was_measured_and_what_changed() -> None:
    assert "`dg-run calibrate` measures this card" in lines()["card 0: measured"].text
    assert lines()["card 0: measured"].state == "ok"
    calibration.keep(made())
    assert lines()["card 0: measured"].text == "on 2026-10-03, in 22 s"
    calibration.keep(made(disturbed=True, missing=FrozenDict(context_bytes="nobody tells")))
    found = lines()["card 0: measured"]
    assert found.state == "note"
    assert "another program computed on it meanwhile" in found.text
    assert "not measured: context_bytes" in found.text
    calibration.keep(made(driver="1.0"))
    assert "driver changed from 1.0 to 580.65.06" in lines()["card 0: measured"].text


def test_the_doctor_shows_how_far_predictions_were_off_and_what_helps() -> None:
    assert "card 0: runs" not in lines()
    remember(*(run(n, 0.99 + n / 100, 1.0) for n in range(3)), run(9, versions=FrozenDict()))
    found = lines()["card 0: runs"]
    assert found.state == "ok"
    assert found.text.startswith("3 remembered, 3 of them different, and 1 of other versions")
    assert "measured peaks 0.99 to 1.01 of predicted, median 1.000" in found.text
    remember(*(run(n, 1.1, 1.5, out_of_memory=n == 20) for n in range(10, 22)))
    found = lines()["card 0: runs"]
    assert found.state == "note"
    assert "1 ran out of memory" in found.text
    assert "seconds are off: calibrate this card (`dg-run calibrate`)" in found.text
    assert "peaks are off: please report it" in found.text
    calibration.keep(made())
    remember(*(run(n, 1.0, 0.5, calibration=made().digest) for n in range(3)))
    assert "calibrate again when nothing else computes on it" in lines()["card 0: runs"].text
