"""`resolve` from several threads and processes at once: the same answers as one after another, and none is lost."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.estimate import dryrunner, store, tracefile
from engine.estimate.store import Answers
from engine.facts import embedded
from engine.values import Estimate, Request
from tests.conftest import machine

REQUESTS: list[dict[str, Any]] = [
    {"gpu": "RTX 4090"},
    {"gpu": "RTX 3060", "steps": 4},
    {"gpu": "RTX 4090", "vram": "6GiB"},
    {"gpu": "A100 80GB", "optimizers": ["vae_tiling", {"name": "dtype", "params": {"value": "float16"}}]},
    {"gpu": "RTX 4090", "model": "stabilityai/sdxl-turbo"},
    {"gpu": "RTX 3060", "model": "stabilityai/sdxl-turbo", "profile": "low"},
    {"gpu": "RTX 3090", "forbid": ["vae_slicing"]},
    {"device": "cpu", "height": 256, "width": 256},
]


def _resolved(asked: dict[str, Any]) -> str:
    return engine.resolve(
        asked.get("model"), hardware=machine(), **{k: v for k, v in asked.items() if k != "model"}
    ).to_json()


def _at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Return what the jobs return, all started at one moment, each in a thread of its own."""
    ready = threading.Barrier(len(jobs))

    def begun(job: Callable[[], Any]) -> Any:
        ready.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(begun, jobs))


def test_eight_threads_answer_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "serial"))
    alone = [_resolved(asked) for asked in REQUESTS]
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "at once"))
    assert _at_once([lambda asked=asked: _resolved(asked) for asked in REQUESTS]) == alone  # type: ignore[misc]
    assert _at_once([lambda asked=asked: _resolved(asked) for asked in REQUESTS]) == alone  # type: ignore[misc]

    def kept(name: str) -> dict[str, str]:
        return {p.name: p.read_text() for p in (tmp_path / name / "estimates").glob("*.json")}

    serial, parallel = kept("serial"), kept("at once")
    assert serial.keys() == parallel.keys()


def test_no_answer_is_lost_when_many_threads_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path))

    def save(number: int) -> None:
        answers = Answers("one-trace")
        answers.put(f"case {number}", Estimate(required_bytes=number))
        answers.save()

    _at_once([lambda n=n: save(n) for n in range(16)])  # type: ignore[misc]
    kept = Answers("one-trace")
    assert [kept.get(f"case {n}") for n in range(16)] == [Estimate(required_bytes=n) for n in range(16)]


def test_no_answer_is_lost_when_processes_save_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from engine.estimate.store import Answers; from engine.values import Estimate\n"
        "for n in range(20):\n"
        "    a = Answers('one-trace'); a.put(f'{sys.argv[1]} {n}', Estimate(required_bytes=n)); a.save()\n"
    )
    env = os.environ | {"DG_RUN_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [subprocess.Popen([sys.executable, "-c", code, name], env=env) for name in ("a", "b")]
    assert [process.wait(60) for process in started] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DG_RUN_CACHE", str(tmp_path))
        kept = Answers("one-trace")
        assert all(kept.get(f"{name} {n}") == Estimate(required_bytes=n) for name in ("a", "b") for n in range(20))


def test_one_dry_run_is_made_for_all_threads_that_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path))
    model = embedded.model()
    usual = Request(model=model.id, height=128, width=128, call=model.defaults.call)
    shipped = next(store.shipped_path("x").parent.glob("*.trace")).read_bytes()
    asked = []

    def trace(self: Any, *_: Any, **__: Any) -> bytes:
        asked.append(threading.get_ident())
        return shipped

    monkeypatch.setattr(dryrunner.DryRunner, "trace", trace)
    odd = Request(model=model.id, height=144, width=144, call=usual.call)
    found = _at_once([lambda: store.find(model, odd, "bfloat16")] * 6)
    assert len(asked) == 1
    assert all(f == tracefile.load(shipped) for f in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_speaks_to_no_process_of_its_parent() -> None:
    runner = dryrunner.DryRunner()
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    runner._process = process
    try:
        with runner.one_at_a_time:  # held by a thread that the child does not have
            child = multiprocessing.get_context("fork").Process(target=_child, args=(runner,))
            child.start()
            child.join(20)
        assert child.exitcode == 0
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def _child(runner: dryrunner.DryRunner) -> None:
    free = threading.Thread(target=runner.one_at_a_time.acquire, daemon=True)
    free.start()
    free.join(5)
    os._exit(0 if runner._process is None and not free.is_alive() else 1)
