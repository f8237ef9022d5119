"""The GPU harness's forks: one process that others come of, what is asked of it, and predictions made ahead."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import allocations, forked, matrix, nursery, predict, prefetch
from bench.gpu import case as cases
from bench.gpu.case import Order, Outcome
from bench.gpu.forked import Nursery
from engine.errors import UsageError
from tests import gpu_records
from tests.conftest import write

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
LOOKS = torch.cuda.is_available, torch.cuda.device_count


def order(limit_s: float = 30.0) -> Order:
    return Order(case=gpu_records.case("machine/copies").plain(), limit_s=limit_s)


def outcome(monkeypatch: pytest.MonkeyPatch, measure: Any, limit_s: float = 30.0) -> dict[str, Any]:
    """Return what comes of a fork that measures so."""
    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return nursery._forked(order(limit_s), nursery._Ready(), LOOKS)


@needs_fork
def test_a_fork_answers_and_changes_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def measure(order: Order, ready: Any) -> Outcome:
        kept.append(1)
        return Outcome(measured={"process": os.getpid(), "kept": kept})

    found = outcome(monkeypatch, measure)
    assert found["status"] == "measured" and found["measured"]["kept"] == [1]
    assert found["measured"]["process"] != os.getpid() and kept == []


@needs_fork
def test_a_long_answer_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(monkeypatch, lambda order, ready: Outcome(measured={"text": "x" * 1_000_000}))
    assert len(found["measured"]["text"]) == 1_000_000


@needs_fork
def test_a_fork_that_dies_or_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(order: Order, ready: Any) -> Outcome:
        os.kill(os.getpid(), 9)
        raise AssertionError

    def failed(order: Order, ready: Any) -> Outcome:
        raise SystemExit(3)

    def slow(order: Order, ready: Any) -> Outcome:
        time.sleep(60)
        raise AssertionError

    assert outcome(monkeypatch, killed) == {"died": ["code", -9]}
    assert outcome(monkeypatch, failed) == {"died": ["code", 1]}
    assert outcome(monkeypatch, slow, 0.3) == {"died": ["timeout", "it was ended after 0 s"]}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    """A nursery whose process is `stand_in`, which a test writes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forked, "_MODULE", "stand_in")
    made = Nursery(None)
    yield made
    made.close()


def stand_in(folder: Path, code: str) -> None:
    write(folder, "stand_in.py", f"import json, sys, time\nprint('{{}}', flush=True)\n{code}\n")


ECHO = (
    "for line in sys.stdin: print(json.dumps({'status': 'measured', 'limit': json.loads(line)['limit_s']}), flush=True)"
)


def test_one_process_answers_for_many_cases(asked: Nursery, tmp_path: Path) -> None:
    stand_in(tmp_path, ECHO)
    for limit in (5.0, 6.0):
        assert asked.ask(order(), limit).outcome == {"status": "measured", "limit": limit}
        process = asked._process
    assert asked._process is process


@pytest.mark.parametrize(
    ("died", "status", "because"),
    [
        ("['code', -9]", "killed", "SIGKILL"),
        ("['code', 3]", "failed", "ended with code 3"),
        ("['timeout', 'it was ended after 5 s']", "timeout", "after 5 s"),
    ],
)
def test_how_a_fork_died_is_said_as_ever(died: str, status: str, because: str, asked: Nursery, tmp_path: Path) -> None:
    code = f"for line in sys.stdin: sys.stderr.write('no luck'); print(json.dumps({{'died': {died}}}), flush=True)"
    stand_in(tmp_path, code)
    found = asked.ask(order(), 5).outcome
    assert found is not None and found["status"] == status and because in found["because"]
    assert found["measured"]["said"] == "no luck"


def test_a_process_that_ends_is_started_again_for_the_next_case(asked: Nursery, tmp_path: Path) -> None:
    stand_in(tmp_path, "sys.stderr.write('gone'); sys.exit(1)")
    found = asked.ask(order(), 5).outcome
    assert found is not None and found["status"] == "killed" and found["measured"]["said"] == "gone"
    stand_in(tmp_path, ECHO)
    found = asked.ask(order(), 5).outcome
    assert found is not None and found["status"] == "measured"


def test_cases_by_their_ids_come_in_that_order_with_any_number_of_steps() -> None:
    ids = [
        "exact/SDXL/1024x1024/2steps/float16/sequential",
        "machine/edges",
        "exact/SD1.5/512x512/7steps/float16/resident",
    ]
    assert [c.id for c in matrix.named(ids)] == ids
    assert [c.steps for c in matrix.named(ids)] == [2, None, 7]
    with pytest.raises(UsageError, match="no set has a case 'machine/egdes'"):
        matrix.named(["machine/egdes"])


def test_predictions_made_ahead_are_those_that_are_made_in_time() -> None:
    of, hardware = gpu_records.case("recipe/SDXL/1024x1024/4steps/float16/model/8GiB"), gpu_records.hardware()
    with prefetch.outlooks([of], hardware, forks=True) as outlooks:
        assert outlooks is not None and outlooks(of) == predict.outlook(of, hardware)
    with prefetch.outlooks([of], hardware, forks=False) as outlooks:
        assert outlooks is None


def entry(action: str, addr: int, size: int, at: int) -> dict[str, Any]:
    frames = [{"filename": "/x/torch/nn/modules/module.py", "line": 1, "name": "call"}]
    frames.append({"filename": "/x/model.py", "line": addr, "name": "forward"})
    return {"action": action, "addr": addr, "size": size, "time_us": at, "frames": frames}


def test_the_blocks_of_a_peak_are_those_that_were_held_at_it() -> None:
    """A weight of 1 MB; then 2 MB and 3, of which the first goes before 1 more comes; then a phase of 4."""
    mb = 1 << 20
    history = [
        entry("alloc", 1, mb, 1),
        entry("segment_alloc", 90, 20 * mb, 11),
        entry("alloc", 2, 2 * mb, 11),
        entry("alloc", 3, 3 * mb, 12),
        entry("free_completed", 2, 2 * mb, 13),
        entry("alloc", 4, mb, 14),
        entry("free_completed", 3, 3 * mb, 21),
        entry("alloc", 5, 4 * mb, 22),
    ]
    load, denoise, decode = allocations._peaks(history, [("load", 0), ("denoise", 10), ("decode", 20)])
    assert load["phase"] == "load" and load["blocks_bytes"] == mb
    assert (denoise["blocks_bytes"], denoise["loaded_bytes"]) == (6 * mb, 0)
    assert denoise["blocks"] == [
        [3 * mb, 1, "model.py:3 forward"],
        [2 * mb, 1, "model.py:2 forward"],
        [mb, 1, "model.py:1 forward"],
    ]
    assert denoise["segments"] == [[20 * mb, mb, "model.py:90 forward", 90]]
    assert [b[0] for b in decode["blocks"]] == [4 * mb, mb, mb]
    assert decode["blocks_bytes"] == 6 * mb


def test_weights_are_what_was_there_when_the_first_phase_began() -> None:
    history = [entry("alloc", 1, 1 << 20, 11), entry("alloc", 2, 1 << 20, 21)]
    (denoise,) = allocations._peaks(history, [("denoise", 20)])
    assert (denoise["blocks_bytes"], denoise["loaded_bytes"]) == (2 << 20, 1 << 20)
    assert denoise["blocks"] == [[1 << 20, 1, "model.py:2 forward"]]
