"""Traces and estimates on disk: what they are known by, and what a cache that is damaged, shared or not there does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import facts
from engine.estimate import dryrunner, store, tracefile
from engine.estimate.trace import Builder, Trace, TracedModule
from engine.facts.model import Model
from engine.files import write
from engine.values import Estimate, FrozenDict, Gpu, Request
from tests import toys
from tests.conftest import RTX_4090, card, machine

ROOT = Path(__file__).parents[1]


def small() -> Trace:
    made = Builder()
    made.phase("denoise")
    made.begin("unet")
    made.died(made.born(1000))
    made.end("unet")
    return toys.trace(made, toys.component("unet", TracedModule(path="unet.a", weights=(toys.weight(0, 64),))))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that nothing is in yet, and nothing shipped."""
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_SHIPPED", tmp_path / "nothing")
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dry runs that were made, of a model smaller than any."""
    runs: list[str] = []

    class Runner(dryrunner.DryRunner):
        def trace(self, model: Model, request: Request, dtype: str, changes: Any = (), **more: Any) -> bytes:
            runs.append(dtype)
            return tracefile.dump(small())

    monkeypatch.setattr(store, "_dry", Runner())
    return runs


def model() -> Model:
    return facts.find(None)


def request(**more: Any) -> Request:
    usual: dict[str, Any] = {"model": "x", "height": 64, "width": 64}
    return Request(**usual | more)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_trace_is_made_once_and_read_from_then_on(cache: Path, made: list[str]) -> None:
    first = store.find(model(), request(), "float16")
    assert first == small()
    (path,) = files(cache / "traces")
    assert tracefile.load(path.read_bytes()) == small()
    assert store.find(model(), request(), "float16") == small()
    assert made == ["float16"]
    store.find(model(), request(), "float32")
    assert made == ["float16", "float32"]


@pytest.mark.parametrize("content", [b"", b"dg-run trace 1\n", b"x" * 1000, tracefile.dump(small())[:-1]])
def test_a_damaged_trace_is_made_again_and_written_over(cache: Path, made: list[str], content: bytes) -> None:
    store.find(model(), request(), "float16")
    (path,) = files(cache / "traces")
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert store.find(model(), request(), "float16") == small()
    assert len(made) == 2
    assert tracefile.load(path.read_bytes()) == small()


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder would be")
    for _ in range(2):
        assert store.find(model(), request(), "float16") == small()
    answers = store.Answers("key")
    answers.put("a", Estimate(required_bytes=1))
    answers.save()
    assert answers.get("a") == Estimate(required_bytes=1)
    assert len(made) == 2
    assert cache.read_text() == "a file where the folder would be"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


WRITER = """
import sys
from pathlib import Path
from engine.estimate import store, tracefile
from engine.files import write
from tests.test_store import small
path, content = Path(sys.argv[1]), tracefile.dump(small())
for _ in range(200):
    write(path, content)
    assert tracefile.load(path.read_bytes()) == small()
answers = store.Answers("shared")
answers.put(sys.argv[2], store.Estimate(required_bytes=int(sys.argv[2])))
answers.save()
"""


def test_two_processes_at_once_write_the_same_trace_and_each_reads_it_whole(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "traces" / "same.trace"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), n], env=env, stderr=subprocess.PIPE, text=True)
        for n in ("1", "2")
    ]
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert files(path.parent) == [path]
    assert tracefile.load(path.read_bytes()) == small()
    kept = store.Answers("shared")
    # Who reads before the other writes forgets the other's: an answer is found again, a file is never broken.
    assert Estimate(required_bytes=1) == kept.get("1") or Estimate(required_bytes=2) == kept.get("2")


def test_answers_of_others_that_came_meanwhile_are_kept(cache: Path) -> None:
    mine, other = store.Answers("key"), store.Answers("key")
    mine.put("a", Estimate(required_bytes=1))
    other.put("b", Estimate(required_bytes=2))
    mine.save()
    other.save()
    kept = store.Answers("key")
    assert [kept.get("a"), kept.get("b")] == [Estimate(required_bytes=1), Estimate(required_bytes=2)]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "[" * 100_000, "\ufffd"),
        *('{"a": 5}', '{"a": "x"}', '{"a": []}', '{"a": [1]}', '{"a": {}}', '{"a": {"host": 5}}'),
        *('{"a": {"host": {}, "interval": {}, "phases": [{}]}}', '{"a": {"host": {}, "interval": {}, "phases": 5}}'),
    ],
)
def test_damaged_answers_are_none(cache: Path, content: str) -> None:
    write(store.Answers("key")._path, content.encode())
    answers = store.Answers("key")
    assert answers.get("a") is None
    answers.put("a", Estimate(seconds=1.5))
    answers.save()
    assert store.Answers("key").get("a") == Estimate(seconds=1.5)


def test_an_estimate_comes_back_as_it_was(cache: Path) -> None:
    taken = engine.resolve(optimizers=["resident"], hardware=machine(card(name=RTX_4090))).estimate
    assert taken.phases
    answers = store.Answers("key")
    answers.put("a", taken)
    answers.save()
    assert store.Answers("key").get("a") == taken


def test_changed_code_makes_old_files_unknown(cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store.find(model(), request(), "float16")
    answers = store.Answers("key")
    answers.put("a", Estimate(required_bytes=1))
    answers.save()
    monkeypatch.setattr(store, "_fingerprint", lambda patterns: "0" * 12)
    assert store.known(store.key(model(), request(), "float16")) is None
    assert store.Answers("key").get("a") is None
    store.find(model(), request(), "float16")
    assert len(made) == 2


def test_the_fingerprint_is_of_the_code_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in (*store._TRACING, *store._ANSWERING):
        assert list(store._PACKAGE.glob(pattern)), pattern
    monkeypatch.setattr(store, "_PACKAGE", tmp_path)
    fresh = store._fingerprint.__wrapped__
    (tmp_path / "a.py").write_text("1")
    before = fresh(("*.py",))
    (tmp_path / "b.txt").write_text("1")
    assert fresh(("*.py",)) == before
    (tmp_path / "a.py").write_text("2")
    assert fresh(("*.py",)) != before


def component(**more: Any) -> Model:
    """Return the embedded model with its transformer changed."""
    known = model()
    changed = dataclasses.replace(known.components["transformer"], **more)
    return dataclasses.replace(known, components=FrozenDict({**known.components, "transformer": changed}))


MATTERS: dict[str, Callable[[], str]] = {
    "config": lambda: store.key(component(config=FrozenDict(num_layers=9)), request(), "float16"),
    "class": lambda: store.key(component(cls="Other"), request(), "float16"),
    "module": lambda: store.key(component(module="diffusers.other"), request(), "float16"),
    "pipeline": lambda: store.key(dataclasses.replace(model(), pipeline_class="Other"), request(), "float16"),
    "fewer components": lambda: store.key(
        dataclasses.replace(model(), components=FrozenDict(vae=model().components["vae"])), request(), "float16"
    ),
    "dtype": lambda: store.key(model(), request(), "bfloat16"),
    **{
        name: lambda name=name, value=value: store.key(model(), request(**{name: value}), "float16")  # type: ignore[misc]
        for name, value in {
            "height": 80,
            "width": 80,
            "frames": 9,
            "batch": 2,
            "guidance": 2.0,
            "call": FrozenDict(true_cfg_scale=1.0),
        }.items()
    },
}


@pytest.mark.parametrize("name", MATTERS)
def test_a_trace_is_known_by_what_decides_it(name: str) -> None:
    assert MATTERS[name]() != store.key(model(), request(), "float16")


def test_a_trace_is_known_by_the_libraries_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.key(model(), request(), "float16")
    monkeypatch.setattr(store, "_library_versions", lambda: {"torch": "1.0"})
    assert store.key(model(), request(), "float16") != before


def test_a_trace_is_not_known_by_what_does_not_decide_it() -> None:
    """Neither the machine, nor what was asked of it, nor how many steps there are, nor how the weights are stored."""
    same = store.key(model(), request(), "float16")
    asked = request(
        steps=99,
        model="another/name",
        revision="0" * 40,
        vram_bytes=1,
        host_ram_bytes=1,
        headroom_bytes=1,
        device="cuda",
        gpu="0",
        profile="low",
        quality="exact",
        prefer="vram",
    )
    assert store.key(model(), asked, "float16") == same
    assert store.key(dataclasses.replace(model(), id="y", path=Path("elsewhere")), request(), "float16") == same
    assert store.key(component(stored_dtype="float64"), request(), "float16") == same
    assert store.key(component(variants=("fp16",)), request(), "float16") == same


GPU = dataclasses.replace(card(name="Some Card"), cores=1000, sm_clock_mhz=1000)


@pytest.mark.parametrize(
    "other",
    [
        {"name": "Other"},
        {"arch": "8.0"},
        {"total_bytes": 1},
        {"pcie_generation": 3},
        {"pcie_width": 8},
        {"mig": True},
        {"cores": 1},
        {"sm_clock_mhz": 1},
        {"memory_clock_mhz": 1},
        {"memory_bus_bits": 64},
    ],
)
def test_an_answer_is_known_by_what_of_the_card_decides_it(other: dict[str, Any]) -> None:
    def case(gpu: Gpu) -> str:
        return store.card_key(gpu, Request(model="m", steps=8), {})

    assert case(dataclasses.replace(GPU, **other)) != case(GPU)
    assert case(dataclasses.replace(GPU, free_bytes=5, index=3, uuid="GPU-1", used_bytes=7)) == case(GPU)


def test_an_answer_is_known_by_the_number_of_steps_and_by_how_weights_are_stored() -> None:
    cases = [
        store.card_key(GPU, Request(model="m", steps=8), {}),
        store.card_key(GPU, Request(model="m", steps=9), {}),
        store.card_key(GPU, Request(model="m", steps=8), {"vae": "float16"}),
    ]
    assert len(set(cases)) == 3


def test_warm_answers_come_without_the_trace(cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def answer() -> Estimate:
        return engine.resolve(optimizers=["resident"], hardware=machine(card(name=RTX_4090))).estimate

    first = answer()

    def not_read(*_: object) -> None:
        raise AssertionError("the trace was read")

    for name in ("known", "find"):
        monkeypatch.setattr(store, name, not_read)
    assert answer() == first
    assert first.required_bytes is not None
    assert len(made) == 1


def test_a_budget_is_applied_to_an_answer_and_not_kept_with_it(cache: Path, made: list[str]) -> None:
    def fits(free_gib: float) -> bool | None:
        return engine.resolve(optimizers=["resident"], hardware=machine(card(free_gib, name=RTX_4090))).fits

    assert [fits(0.5), fits(23), fits(0.6)] == [False, True, False]
    assert len(made) == 1


def test_without_torch_nothing_is_estimated_and_the_notes_say_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "can_trace", lambda: False)
    told: list[str] = []
    plan = engine.resolve(hardware=machine(card(name=RTX_4090)), told=told.append)
    assert json.loads(plan.to_json())["fits"] is None
    assert plan.estimate == Estimate()
    assert [n.because for n in plan.notes if n.kind == "not_estimated"] == [
        "torch, diffusers and transformers are needed for a dry run, and not all are installed"
    ]
    assert "and not all are installed" in plan.explain()
    assert told == []
    assert files(cache / "estimates") == []


@pytest.mark.parametrize(
    ("gpus", "more", "because"),
    [
        ([], {}, "estimates are of a card's memory, and this runs without one"),
        ([card(arch=None)], {}, "the card's compute capability is not known: name a card of the table (--gpu)"),
    ],
)
def test_why_there_is_no_estimate_is_said(gpus: list[Gpu], more: dict[str, Any], because: str) -> None:
    plan = engine.resolve(hardware=machine(*gpus), **more)
    assert [n.because for n in plan.notes if n.kind == "not_estimated"] == [because]
    assert because in plan.explain()
    assert plan.fits is None


def test_the_first_dry_run_of_a_size_is_told_of_and_a_known_one_is_not(cache: Path, made: list[str]) -> None:
    told: list[str] = []
    for _ in range(2):
        engine.resolve(hardware=machine(card(name=RTX_4090)), told=told.append)
    assert len(told) == 1
    assert "dry run of embedded" in told[0]
