"""Two starts on one card wait for each other; a lock dies with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.run import lock
from tests.conftest import card

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from engine.run import lock
from tests.conftest import card
with lock.held(card(index=int(sys.argv[1])), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of card 0."""
    command = [sys.executable, "-c", HOLD, "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_start_waits_until_the_first_lets_go(holder: subprocess.Popen[str]) -> None:
    said: list[str] = []
    start = time.monotonic()

    def waiting(text: str) -> None:
        said.append(text)
        holder.send_signal(signal.SIGTERM)

    with lock.held(card(), waiting):
        assert holder.wait() != 0
    assert said == ["another dg-run is loading on Test Card; waiting for it …"]
    assert time.monotonic() - start < 30


def test_a_lock_does_not_survive_a_kill(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    said: list[str] = []
    with lock.held(card(), said.append):
        assert said == []


def test_another_card_is_not_waited_for(holder: subprocess.Popen[str]) -> None:
    said: list[str] = []
    with lock.held(card(index=1), said.append), lock.held(None, said.append):
        assert said == []


def test_a_process_does_not_wait_for_itself() -> None:
    said: list[str] = []
    with lock.held(card(), said.append), lock.held(card(), said.append):
        assert said == []


def test_a_cache_that_cannot_be_written_keeps_nobody_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    with lock.held(card(), said.append):
        assert "other starts are not waited for" in said[0]


def test_patience_has_an_end(holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.errors import HardwareError

    monkeypatch.setattr(lock, "PATIENCE_S", 0.5)
    with pytest.raises(HardwareError, match="another dg-run has been loading"):
        with lock.held(card(), lambda _: None):
            pass
