"""What a run goes down to when memory runs out, and what is remembered of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import engine
from engine import api, history, rungs
from engine.errors import NothingFitsError
from engine.plan import Plan
from engine.run import remember
from engine.run.progress import Quiet
from engine.solve.judge import REMEMBERED
from engine.values import Hardware
from tests.conftest import GIB, RTX_4090, card, machine


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path))


LIST = ["dtype", "resident"]


def here(free_gib: float = 8.0) -> Hardware:
    return machine(card(free_gib, name=RTX_4090))


def planned(free_gib: float = 8.0, **asked: object) -> Plan:
    if "optimizers" not in asked:
        asked = {"quality": "exact"} | asked  # one dry run does for all of it
    return engine.resolve(hardware=here(free_gib), **asked)  # type: ignore[arg-type]


def most(plan: Plan) -> int:
    """Return what a run may need, by its interval."""
    taken = plan.estimate
    assert taken.required_bytes is not None
    assert taken.interval.high_bytes is not None
    assert taken.peak_allocated_bytes is not None
    return taken.required_bytes + taken.interval.high_bytes - taken.peak_allocated_bytes


def test_each_rung_surely_needs_less_than_the_one_before() -> None:
    plan = engine.ladder(planned())
    assert plan.ladder is not None
    assert len(plan.ladder) == rungs.MOST_RUNGS
    last = plan
    for rung in plan.ladder:
        found = rungs.below(last)
        assert found is not None
        assert most(found) < (last.estimate.required_bytes or 0)
        assert (rung.optimizers, rung.required_bytes, rung.fits) == (
            found.optimizers,
            found.estimate.required_bytes,
            True,
        )
        assert {r.rule for r in found.rejected} >= {"estimate.below"}
        last = found
    assert planned().ladder is None
    assert dataclasses.replace(plan, ladder=None) == planned()


def test_what_was_asked_holds_on_every_rung() -> None:
    plan = engine.ladder(planned(forbid=["model_offload"], profile="low"))
    assert plan.ladder
    for rung in plan.ladder:
        assert rung.quality == "exact"
        assert not {"model_offload", "layerwise_casting"} & {s.name for s in rung.optimizers}
        assert rung.profile is not None
        assert rung.profile.name in ("low", "extreme-low")


def test_a_list_a_lock_and_a_machine_without_a_card_have_none(tmp_path: Path) -> None:
    exact = engine.ladder(planned(optimizers=LIST))
    assert (exact.ladder, exact.is_fixed) == ((), True)
    locked = planned().lock(tmp_path / "plan.yaml").plan(here())
    assert (engine.ladder(locked).ladder, locked.is_fixed) == ((), True)
    assert engine.ladder(engine.resolve(device="cpu")).ladder == ()
    unfit = planned(1.0)
    assert unfit.fits is False
    assert engine.ladder(unfit).ladder == ()


def test_what_would_need_less_than_a_list_is_found_for_the_error_that_says_so() -> None:
    found = rungs.below(planned(optimizers=LIST))
    assert found is not None
    assert found.fits
    assert not found.is_fixed
    assert most(found) < (planned(optimizers=LIST).estimate.required_bytes or 0)


def test_it_survives_json_and_is_told_in_a_line_a_rung() -> None:
    plan = engine.ladder(planned())
    assert plan.ladder
    assert Plan.from_json(plan.to_json()) == plan
    told = plan.explain()
    assert "if memory runs out: " in told
    assert "after that: " in told
    assert "if memory runs out" not in planned().explain()
    assert "if memory runs out" not in engine.ladder(planned(optimizers=LIST)).explain()


def test_a_plan_that_was_written_before_there_was_a_ladder_is_read() -> None:
    plan = planned()
    content = json.loads(plan.to_json())
    del content["ladder"], content["locked"]
    assert Plan.from_json(json.dumps(content)) == plan


# What ran out of memory is not planned again with so little room.


def lose(plan: Plan, room_bytes: int | None = None) -> None:
    remember.run(plan, None, None, Quiet(), out_of_memory=True, room_bytes=room_bytes)


def test_what_ran_out_of_memory_is_not_planned_again_with_so_little() -> None:
    before = planned()
    lose(before)
    now = planned()
    assert now.optimizers != before.optimizers
    assert now.fits
    lost = next(r for r in now.rejected if r.rule == REMEMBERED)
    assert lost.optimizers == before.optimizers
    assert "with 7.50 GiB for it, and has 7.50 GiB now" in lost.because
    assert str(history.path(card().uuid or "")) in lost.remedy
    assert "ran out of memory here on" in now.explain()
    assert planned(7.9).optimizers == now.optimizers
    assert planned(8.1).optimizers == before.optimizers
    least = api.least_free_vram(before)
    assert planned(least / GIB).optimizers == before.optimizers
    assert planned((least - 1) / GIB).optimizers != before.optimizers


def test_it_is_the_same_run_only_under_the_same_request() -> None:
    before = planned()
    lose(before)

    def is_known(seen: Hardware = before.hardware, **asked: object) -> bool:
        request = dataclasses.replace(before.request, **asked)  # type: ignore[arg-type]
        return bool(history.ran_out(seen.gpus[0], seen.driver, request))

    assert is_known()
    assert is_known(steps=50)  # a step has what the one before it gave back
    assert is_known(prefer="vram", quality="exact", profile="low", headroom_bytes=0)
    for asked in ({"height": 256}, {"batch": 2}, {"call": {"max_sequence_length": 64}}, {"guidance": 5.0}):
        assert not is_known(**asked)
    assert not is_known(machine(card(8.0, name=RTX_4090, index=1)))


def test_steps_that_do_nothing_make_no_other_run() -> None:
    before = planned()
    assert before.acting != before.optimizers
    lose(dataclasses.replace(before, optimizers=before.acting))
    assert planned().optimizers != before.optimizers


def test_less_room_than_was_planned_for_is_what_counts() -> None:
    """A neighbour took it in the meantime: with all of the budget it was never tried."""
    before = planned()
    lose(before, room_bytes=2 * GIB)
    assert planned().optimizers == before.optimizers


def test_what_has_run_since_with_no_more_room_is_planned_again() -> None:
    before = planned()
    lose(before)
    remember.run(planned(8.5), 10**8, 1.0, Quiet())  # with more
    assert planned().optimizers != before.optimizers
    remember.run(before, 10**8, 1.0, Quiet())
    assert planned().optimizers == before.optimizers
    lose(before)
    assert planned().optimizers != before.optimizers


def test_a_list_that_ran_out_of_memory_is_still_run_and_told_of() -> None:
    before = planned(optimizers=LIST)
    lose(before)
    now = planned(optimizers=LIST)
    assert (now.fits, now.optimizers) == (True, before.optimizers)
    assert [n for n in now.notes if "ran out of memory here on" in n.because]


def test_where_all_of_it_ran_out_nothing_fits_and_it_is_said_why() -> None:
    lost = planned(require=["resident"])
    while lost.fits is not False:
        lose(lost)
        lost = planned(require=["resident"])
    assert {r.rule for r in lost.rejected} >= {REMEMBERED}
    with pytest.raises(NothingFitsError, match="ran out of memory here on"):
        lost.load()


def test_lines_without_room_and_damaged_ones_say_nothing() -> None:
    before = planned()
    lose(before)
    path = history.path(card().uuid or "")
    line = json.loads(path.read_text())
    changes: tuple[dict[str, object], ...] = (
        {"room_bytes": None},
        {"asked": None},
        {"acting": 5},
        {"room_bytes": "much"},
        {"versions": {}},
    )
    for change in changes:
        path.write_text(json.dumps(line | change) + "\n")
        assert planned().optimizers == before.optimizers
    for name in ("room_bytes", "asked", "acting"):
        line.pop(name)
    path.write_text(json.dumps(line) + "\n")
    assert len(history.read(card().uuid or "")) == 1
    assert planned().optimizers == before.optimizers
