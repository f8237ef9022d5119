"""Runs that run out of memory: what is told, what is left behind, what they go down to, and where they end."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import history, optimizers, probe, prompts, rungs
from engine.errors import NothingFitsError, OutOfMemoryError
from engine.plan import Plan
from engine.run import device as run_device
from engine.run import fallback, items, runner, world
from engine.run.fallback import Descent, Lost
from engine.run.progress import Quiet
from engine.units import MIB
from engine.values import GpuProcess, Hardware, Note
from tests.architectures import architectures
from tests.conftest import GIB, RTX_4090, card, machine
from tests.evidence import small
from truth import device
from truth.cases import Case

needs_device = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)
NEIGHBOUR = GpuProcess(pid=4711, name="python", used_bytes=3 * GIB)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
FLOAT32 = {"name": "dtype", "params": {"value": "float32"}}
UUID = card().uuid or ""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path))


class Heard(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def here(free_gib: float = 8.0, *others: GpuProcess) -> Hardware:
    return machine(dataclasses.replace(card(free_gib, name=RTX_4090), processes=others))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Hardware]:
    """What the probe sees, one after another; the last stays."""
    found = [here()]
    monkeypatch.setattr(probe, "snapshot", lambda: found.pop(0) if len(found) > 1 else found[0])
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, seen: list[Hardware]) -> Iterator[None]:
    """Let plans for a card that is not here run on the counted device."""
    device.load()
    monkeypatch.setattr(Plan, "torch_device", device.NAME)
    monkeypatch.setattr(run_device, "choose", lambda plan: None)
    monkeypatch.setattr(run_device, "reset_peak", lambda _: device.reset_peak())
    monkeypatch.setattr(run_device, "peak_allocated_bytes", lambda _: device.counts().peak_bytes)
    gc.collect()
    yield


def planned(free_gib: float = 8.0, **asked: Any) -> Plan:
    """Return a plan in float32, which the CPU computes fast, for a small picture."""
    usual = {"height": 64, "width": 64, "steps": 2, "quality": "exact", "prompts_known": True, "require": [FLOAT32]}
    return engine.resolve(hardware=here(free_gib), **usual | asked)  # type: ignore[arg-type]


def beginning_with(name: str) -> Plan:
    """Return a plan that has this optimizer, and can go down to others."""
    plan = planned(require=[FLOAT32, name])
    free = tuple(s for s in plan.request.require if s.name == "dtype")
    return dataclasses.replace(plan, request=dataclasses.replace(plan.request, require=free))


def run(plan: Plan, count: int = 2, told: Quiet | None = None) -> list[Any]:
    """Return what a run of so many prompts gives."""
    texts = ["a red circle", "a blue square", "a green triangle"][:count]
    calls = items.calls(prompts.of(texts), 3, plan.request.batch)
    return [(m.plan, np.asarray(o)) for m in runner.run(plan, calls, told or Quiet()) for o in m.outputs]


def placement(plan: Plan) -> str:
    return "+".join(s.name for s in plan.optimizers if optimizers.spec(s.name).is_placement)


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What is drawn where there is room enough, on the CPU."""
    return [p for _, p in run(engine.resolve(height=64, width=64, steps=2, device="cpu"), 2)]


# Real limits of a device.


@needs_device
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("share", [0.95, 0.6])
def test_a_run_goes_down_where_the_device_is_too_small_and_draws_the_same(share: float, plain: list[Any]) -> None:
    """`share` of the weights: enough for one component at a time, or not even for that."""
    plan, told = beginning_with("resident"), Heard()
    sizes = [small.nbytes(c) for c in _modules(plan)]
    gc.collect()
    before = device.counts().live_bytes
    with device.capacity(before + round(share * sum(sizes))):
        found = run(plan, 1, told)
    assert all(np.array_equal(a, b) for (_, a), b in zip(found, plain, strict=False))
    downs = [line for line in told.lines if line.startswith("going down, ")]
    assert [placement(p) for p, _ in found] == ["model_offload" if share > 0.9 else "sequential_offload"]
    assert len(downs) == (1 if share > 0.9 else 2)
    assert "8.00 GiB are free now" in downs[0]
    gc.collect()
    assert device.counts().live_bytes == before


def _modules(plan: Plan) -> list[Any]:
    from diffusers import DiffusionPipeline

    from engine import paths

    parts = DiffusionPipeline.from_pretrained(paths.embedded_model_dir()).components.values()
    return [c for c in parts if isinstance(c, torch.nn.Module)]


# Injected at every moment.


def _at_load(patch: pytest.MonkeyPatch, fail: Callable[[Any], None]) -> None:
    chosen = optimizers.get("model_offload")
    real = chosen.apply

    def apply(pipe: Any, *args: Any) -> None:
        real(pipe, *args)
        fail(pipe)

    patch.setattr(chosen, "apply", apply)


def _after(patch: pytest.MonkeyPatch, owner: Any, name: str, fail: Callable[[Any], None], number: int = 1) -> None:
    """Let a method fail once it has done its work, the time of this number."""
    real, count = getattr(owner, name), [0]

    def after(self: Any, *args: Any, **given: Any) -> Any:
        result = real(self, *args, **given)
        count[0] += 1
        if count[0] == number:
            fail(self)
        return result

    patch.setattr(owner, name, after)


def _inject(moment: str, patch: pytest.MonkeyPatch, fail: Callable[[Any], None]) -> None:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    match moment:
        case "load":
            _at_load(patch, fail)
        case "encoding" | "encoding, staged":
            _after(patch, FluxPipeline, "encode_prompt", fail)
        case "step 2" | "step 2, staged":
            _after(patch, FluxTransformer2DModel, "forward", fail, 4)  # guidance calls it twice a step
        case "decode":
            _after(patch, AutoencoderKL, "decode", fail)
        case "second picture":
            _after(patch, AutoencoderKL, "decode", fail, 2)


@needs_device
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "moment",
    ["load", "encoding", "encoding, staged", "step 2", "step 2, staged", "decode", "second picture"],
)
def test_nothing_of_a_try_that_ran_out_of_memory_is_left_when_the_next_begins(
    moment: str, monkeypatch: pytest.MonkeyPatch, plain: list[Any]
) -> None:
    held: list[weakref.ref[Any]] = []
    left: list[tuple[int, int]] = []
    live = device.counts().live_bytes

    def fail(owner: Any) -> None:
        parts = owner.components.values() if hasattr(owner, "components") else [owner]
        modules = [m for part in parts if isinstance(part, torch.nn.Module) for m in part.modules()]
        held.extend(map(weakref.ref, [owner, *modules]))
        held.extend(weakref.ref(t) for m in modules for t in m.parameters())
        raise torch.OutOfMemoryError("injected")

    after = Descent.after

    def watched(self: Descent, lost: Lost) -> Plan:
        left.append((device.counts().live_bytes - live, sum(r() is not None for r in held)))
        return after(self, lost)

    monkeypatch.setattr(Descent, "after", watched)
    plan, told = beginning_with("staged_encoding" if "staged" in moment else "model_offload"), Heard()
    with monkeypatch.context() as patch:
        _inject(moment, patch, fail)
        found = run(plan, 2 if moment == "second picture" else 1, told)
    assert len(held) > 50
    assert left == [(0, 0)]
    assert len([line for line in told.lines if line.startswith("going down, 1 of 2")]) == 1
    went_on = [p.optimizers != plan.optimizers for p, _ in found]
    assert went_on == ([False, True] if moment == "second picture" else [True])
    assert all(np.array_equal(a, b) for (_, a), b in zip(found, plain, strict=False))
    gc.collect()
    assert device.counts().live_bytes == live
    (remembered,) = [r for r in history.read(UUID) if r.out_of_memory]
    assert remembered.optimizers == tuple(map(str, plan.optimizers))
    assert remembered.room_bytes == plan.budget_bytes


@needs_device
@pytest.mark.parametrize("architecture", architectures("qwen_image", "flux"))
def test_nothing_of_a_pipeline_that_is_gone_is_left_on_the_device(architecture: str) -> None:
    """Of Qwen-Image diffusers' classes keep tables: see `engine/run/tables.py`."""

    def drawn() -> None:
        pipe, call = Case(architecture=architecture, steps=()).made()
        pipe.to(device.NAME)
        pipe(**call)

    device.load()
    run_device.release(device.NAME)
    before = device.counts().live_bytes
    drawn()
    gc.collect()
    if architecture == "qwen_image":
        assert device.counts().live_bytes - before > 100_000
    run_device.release(device.NAME)
    assert device.counts().live_bytes == before


# What is told, and where it ends. Nothing is loaded from here on.


def lost(plan: Plan, **more: Any) -> Lost:
    usual: dict[str, Any] = {
        "plan": plan,
        "what": "the device ran out of memory while generating",
        "why": "CUDA out of memory.",
        "measured_bytes": 700 * MIB,
        "free_bytes": 200 * MIB,
        "others": (NEIGHBOUR,),
        "room_bytes": plan.budget_bytes,
    }
    return Lost(**usual | more)


def whole(**asked: Any) -> Plan:
    return engine.resolve(hardware=here(), **{"quality": "exact"} | asked)


def test_it_goes_down_twice_and_then_ends_with_all_it_has_seen(seen: list[Hardware]) -> None:
    plan, told = engine.ladder(whole()), Heard()
    descent, tried = Descent(told), [plan]
    for _ in range(rungs.MOST_RUNGS):
        tried.append(descent.after(lost(tried[-1])))
    assert [p.optimizers for p in tried[1:]] == [r.optimizers for r in plan.ladder or ()]
    with pytest.raises(OutOfMemoryError) as caught:
        descent.after(lost(tried[-1]))
    assert caught.value.exit_code == 7
    assert "while generating; so did 2 before it that needed more" in caught.value.what
    for each in tried:
        assert f"{world.name(each)}: predicted " in caught.value.why
    for part in ("0.59 GiB needed", "measured 0.68 GiB by then", "free then: 0.20 GiB"):
        assert part in caught.value.why
    assert "also on the card: python (pid 4711) with 3.00 GiB" in caught.value.why
    assert "end what else uses the card (pid 4711)" in caught.value.do
    assert len([r for r in history.read(UUID) if r.out_of_memory]) == 3
    assert [line.partition(": ")[0] for line in told.lines if line.startswith("going")] == [
        "going down, 1 of 2",
        "going down, 2 of 2",
    ]


def test_it_goes_down_to_what_fits_what_is_free_by_then(seen: list[Hardware]) -> None:
    seen[:] = [here(0.9)]  # the profiles that ask for more than that are not permitted now
    with pytest.raises(OutOfMemoryError) as caught:
        Descent(Heard()).after(lost(whole()))
    assert caught.value.do


def test_a_list_and_a_lock_do_not_go_down_and_name_what_needs_less(seen: list[Hardware], tmp_path: Path) -> None:
    listed = whole(optimizers=["dtype", "resident"], quality="near")
    locked = whole().lock(tmp_path / "plan.yaml").plan(here())
    for plan in (listed, locked):
        with pytest.raises(OutOfMemoryError) as caught:
            Descent(Heard()).after(lost(plan))
        assert " would do with 0.59 GiB: plan without a list" in caught.value.do
        assert "predicted" in caught.value.why


def test_without_a_card_there_is_nowhere_to_go() -> None:
    plan = engine.resolve(device="cpu")
    with pytest.raises(OutOfMemoryError) as caught:
        Descent(Heard()).after(fallback.seen(plan, OutOfMemoryError("the device ran out of memory", "full")))
    assert "smaller picture" in caught.value.do
    assert "free then" not in caught.value.why


def test_what_a_neighbour_took_is_no_room_that_was_tried(seen: list[Hardware]) -> None:
    plan = whole()
    seen[:] = [here(6.0, NEIGHBOUR)]
    found = fallback.seen(plan, OutOfMemoryError("full"))
    assert (found.free_bytes, found.room_bytes, found.others) == (6 * GIB, 6 * GIB, (NEIGHBOUR,))
    assert Descent(Heard()).after(found).optimizers != plan.optimizers
    assert whole().optimizers == plan.optimizers  # with all that was planned for it was never tried


def test_an_error_lets_go_of_what_its_frames_hold() -> None:
    class Thing:
        pass

    refs: list[weakref.ref[Any]] = []

    def inner() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        raise ValueError("inner")

    def outer() -> None:
        thing = Thing()
        refs.append(weakref.ref(thing))
        try:
            inner()
        except ValueError as error:
            raise OutOfMemoryError("outer") from error

    with pytest.raises(OutOfMemoryError) as caught:
        outer()
    error = caught.value
    assert all(r() is not None for r in refs)
    fallback.forget(error)
    assert all(r() is None for r in refs)
    assert str(error) == "outer"


# What is free is read again.


def test_a_plan_that_does_not_fit_any_more_is_solved_for_anew_and_said_in_a_line(seen: list[Hardware]) -> None:
    plan, told = whole(), Heard()
    assert world.current(plan, told) is plan
    seen[:] = [here(40.0)]
    assert world.current(plan, told) is plan  # a plan is what was asked for: more room changes nothing
    assert told.lines == []
    bigger = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, required_bytes=7 * GIB))
    bigger = dataclasses.replace(bigger, optimizers=(), profile=None)
    seen[:] = [here(6.0)]
    found = world.current(bigger, told)
    assert found.fits
    assert found.card is not None
    assert found.card.free_bytes == 6 * GIB
    assert told.lines == [
        f"free VRAM went from 8.00 GiB to 6.00 GiB since the plan: {world.name(found)} instead of nothing"
    ]


def test_the_plan_that_is_made_anew_at_the_load_says_what_changed_and_what_it_goes_down_to() -> None:
    plan, told = whole(), Heard()
    engine.ladder(plan)  # so that no dry run is missing
    other = engine.resolve(hardware=here(7.0), quality="exact", forbid=["resident"])
    with runner._settled(plan, told, lambda: other) as now:
        assert now.optimizers == other.optimizers
        assert now.ladder
    assert told.lines[0] == (
        f"free VRAM went from 8.00 GiB to 7.00 GiB since the plan: {world.name(other)} instead of {world.name(plan)}"
    )
    assert "if memory runs out: " in told.lines[1]


def test_a_list_that_does_not_fit_any_more_is_refused_unless_it_was_insisted_on(seen: list[Hardware]) -> None:
    plan = whole(optimizers=["dtype", "resident"], quality="near")
    seen[:] = [here(1.0)]
    with pytest.raises(NothingFitsError, match=r"free VRAM went from 8.00 GiB to 1.00 GiB since the plan"):
        world.current(plan, Heard())
    forced = dataclasses.replace(plan, fits=None)
    assert world.current(forced, Heard()) is forced


def test_where_the_card_is_not_seen_the_plan_stays(seen: list[Hardware]) -> None:
    plan = whole()
    for now in (machine(), machine(card(1.0, index=1)), machine(card(None))):
        seen[:] = [now]
        assert world.current(plan, Heard()) is plan
    imagined = engine.resolve(hardware=here(), vram="20GiB")
    assert world.hardware(imagined) is None


def test_what_the_user_allowed_stays_the_limit(seen: list[Hardware]) -> None:
    plan = whole(vram="6GiB", host_ram="16GiB")
    now = world.hardware(plan)
    assert now is not None
    assert (now.gpus[0].free_bytes, now.host.ram_bytes) == (6 * GIB, 16 * GIB)
    seen[:] = [here(5.6)]
    now = world.hardware(plan)
    assert now is not None
    assert now.gpus[0].free_bytes == round(5.6 * GIB)
    assert not now.gpus[0].hypothetical


def test_our_own_context_counts_as_free(seen: list[Hardware], monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate has it among what is needed: the plan that ran a moment ago fits again."""
    plan = whole()
    monkeypatch.setattr(run_device, "is_started", lambda _: True)
    own = world.context_bytes(plan)
    assert own == (plan.estimate.device_bytes or 0) - (plan.estimate.peak_reserved_bytes or 0)
    now = world.hardware(plan)
    assert now is not None
    assert now.gpus[0].free_bytes == 8 * GIB + own


# The budget is enforced on the card.


class _Cuda:
    """What of torch.cuda sets the limit."""

    def __init__(self, total: int, reserved: int = 0) -> None:
        self.total, self.reserved, self.share = total, reserved, -1.0

    def get_device_properties(self, _: int) -> Any:
        return types.SimpleNamespace(total_memory=self.total)

    def memory_reserved(self, _: int) -> int:
        return self.reserved

    def set_per_process_memory_fraction(self, share: float, _: int) -> None:
        self.share = share

    @property
    def allowed(self) -> int:
        """As torch cuts it off (CUDACachingAllocator.cpp)."""
        return int(self.share * self.total)


@pytest.mark.parametrize("total", [24 * GIB - 12345, 8 * GIB, 10 * GIB // 7])
def test_the_budget_less_the_context_is_what_the_allocator_may_reserve(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = whole()
    taken = plan.estimate
    assert None not in (taken.required_bytes, taken.device_bytes, taken.peak_reserved_bytes, plan.budget_bytes)
    context = (taken.device_bytes or 0) - (taken.peak_reserved_bytes or 0)
    for reserved in (0, 512 * MIB):  # what the process held before is not the plan's
        cuda = _Cuda(total, reserved)
        for name in ("get_device_properties", "memory_reserved", "set_per_process_memory_fraction"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        run_device._cap(plan)
        assert cuda.allowed == min(total, (plan.budget_bytes or 0) - context + reserved)
        tight = dataclasses.replace(plan, budget_bytes=taken.required_bytes)
        run_device._cap(tight)
        # The replay within so much succeeds: what fits by its estimate fits under the limit.
        assert cuda.allowed == (taken.required_bytes or 0) - context + reserved
        assert cuda.allowed >= (taken.peak_allocated_bytes or 0) + reserved


def test_what_was_insisted_on_has_no_limit_but_the_users() -> None:
    plan = whole()
    forced = dataclasses.replace(plan, notes=(Note(kind="forced", optimizer=None, because="so"),))
    assert run_device.most_reserved_bytes(forced) is None
    capped = whole(vram="6GiB")
    assert run_device.most_reserved_bytes(dataclasses.replace(capped, notes=forced.notes)) == 6 * GIB
    assert run_device.most_reserved_bytes(dataclasses.replace(plan, budget_bytes=None)) is None
    unknown = engine.resolve(hardware=machine(card(8.0, arch=None)))
    assert run_device.most_reserved_bytes(unknown) == unknown.budget_bytes
