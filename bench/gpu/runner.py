"""Run cases one by one, each in a process of its own, until they are done or the time is up. No torch in here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.gpu import predict
from bench.gpu.case import Order, unnamed
from bench.gpu.journal import Journal
from bench.gpu.matrix import Case
from bench.gpu.recipes import RECIPES
from engine.errors import HardwareError
from engine.units import format_seconds
from engine.values import Hardware

_LEAST_S = 20.0
"""With less than this left no case is begun."""
_KEPT_CHARACTERS = 2000
_PACKAGE = __package__ or "bench.gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long: all of it, and one case."""

    until: float
    """By `time.monotonic`."""
    case_s: float
    second_under_s: float | None = None
    """How long a first call may have taken for a second one to be made; None: any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a case's process gave back; `outcome` is None where it was cut off by the end of all time."""

    outcome: dict[str, Any] | None
    wall_s: float


def run(
    cases: Sequence[Case],
    journal: Journal,
    machine: dict[str, Any],
    look: Callable[[], Hardware],
    limits: Limits,
    *,
    dry: bool = False,
    retry: bool = False,
    told: Callable[[str], None] = print,
    asked: Callable[[Order, float], Answer] | None = None,
    outlooks: Callable[[Case], predict.Outlook] | None = None,
) -> int:
    """Measure what the journal does not have, and return how many cases are left for another time.

    `look` gives the hardware as it is when a case begins. `asked` measures a case (a process of its own is started
    for each, if it is not given); `outlooks` knows what is expected of a case already.
    """
    asked = asked or ask
    wanted = [c for c in cases if not journal.has(c.id, machine, retry=retry)]
    if len(wanted) < len(cases):
        told(f"{len(cases) - len(wanted)} of {len(cases)} cases are in {journal.path} already")
    for done, case in enumerate(wanted):
        left = limits.until - time.monotonic()
        if left < _LEAST_S:
            return len(wanted) - done
        hardware = look()
        expected = predict.outlook(case, hardware, told) if outlooks is None else outlooks(case)
        started = time.time()
        status, outcome, wall = _of(case, expected), None, 0.0
        if status is None:
            order = replace(_order(case, expected, hardware, dry), second_under_s=limits.second_under_s)
            answer = asked(order, min(limits.case_s, limits.until - time.monotonic()))
            if answer.outcome is not None and answer.outcome["status"] == "timeout" and _is_over(limits, answer):
                return len(wanted) - done  # it was all time that was over, not the case's own
            outcome, wall = answer.outcome, answer.wall_s
        record = {
            "id": case.id,
            "case": case.plain(),
            "machine": machine,
            "at": round(started),
            "wall_s": round(wall, 3),
            "cap_bytes": expected.cap_bytes,
            "plan": None if expected.plan is None else predict.plain(expected.plan),
            "tensors": predict.tensor_peaks(expected.plan) if dry and status is None and expected.plan else None,
            **({"status": status[0], "because": status[1], "phase": None, "measured": {}} if status else outcome or {}),
        }
        journal.append(record)
        told(_line(done + 1, len(wanted), record))
    return 0


def _of(case: Case, expected: predict.Outlook) -> tuple[str, str | None] | None:
    """Return how a case ends that is not run, or None."""
    if expected.status is not None:
        return expected.status, expected.because
    if case.recipe is not None and (missing := RECIPES[case.recipe].missing):
        return "skipped", missing
    return None


def _is_over(limits: Limits, answer: Answer) -> bool:
    return time.monotonic() >= limits.until - 1 and answer.wall_s < limits.case_s


def _order(case: Case, expected: predict.Outlook, hardware: Hardware, dry: bool) -> Order:
    return Order(
        case=case.plain(),
        plan=None if expected.plan is None else predict.plain(expected.plan),
        cap_bytes=expected.cap_bytes,
        card_bytes=case.budget_bytes,
        uuid=None if dry else hardware.gpus[0].uuid,
        dry=dry,
    )


def ask(order: Order, limit_s: float) -> Answer:
    """Return what a case's process says within `limit_s`; how it died, where it does not live to say anything."""
    order = Order(**{**asdict(order), "limit_s": limit_s})
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{_PACKAGE}.case"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment(order.uuid),
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one and all that it has started
        )
        try:
            out, _ = process.communicate(json.dumps(asdict(order)).encode(), timeout=limit_s)
            died = None
        except subprocess.TimeoutExpired:
            out, died = b"", ("timeout", f"it was ended after {format_seconds(limit_s)}")
        finally:
            end(process)
        said.seek(max(0, said.tell() - _KEPT_CHARACTERS))
        tail = unnamed(said.read().decode("utf-8", "replace")[-_KEPT_CHARACTERS:])
    wall = time.monotonic() - started
    with contextlib.suppress(ValueError):
        if died is None and process.returncode == 0:
            return Answer(outcome=json.loads(out), wall_s=wall)
    status, why = died or death(process.returncode)
    measured = {"said": tail.strip()}
    return Answer(outcome={"status": status, "because": why, "phase": None, "measured": measured}, wall_s=wall)


def environment(uuid: str | None) -> dict[str, str]:
    """Return the environment of a process that measures: with one card, this package, and no network."""
    home = str(Path(__file__).parents[len(_PACKAGE.split("."))])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if uuid is not None:
        more["CUDA_VISIBLE_DEVICES"] = uuid
    return os.environ | more


def end(process: subprocess.Popen[bytes]) -> None:
    """End a case's process, and whatever it has started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def death(code: int) -> tuple[str, str]:
    """Return the status of a case whose process ended with `code`, and why."""
    if code >= 0:
        return "failed", f"its process ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    memory = ": the host's memory may have been full" if name == "SIGKILL" else ""
    return "killed", f"its process was ended by {name}{memory}"


def greet(
    dry: bool,
    uuid: str | None,
    limit_s: float = 300.0,
    *,
    asked: Callable[[Order, float], Answer] | None = None,
) -> dict[str, Any]:
    """Return what torch says of the card, from a process of its own. Raises: HardwareError, when it cannot use it."""
    order = Order(case=Case(kind="machine", part="card").plain(), uuid=uuid, dry=dry)
    outcome = (asked or ask)(order, limit_s).outcome
    assert outcome is not None
    if outcome["status"] != "measured":
        said = outcome["measured"].get("said", "")
        raise HardwareError(
            "there is nothing to measure on",
            " ".join(f"{outcome['because']} {said}".split()),
            "install what `python -m bench.gpu run --help` names, or try it with --dry",
        )
    found: dict[str, Any] = outcome["measured"]["torch"]
    return found


def _line(number: int, count: int, record: dict[str, Any]) -> str:
    """Return a line about a case that is done."""
    calls = record["measured"].get("calls") or []
    took = f" {calls[-1]['seconds']:.2f} s a call" if calls else ""
    why = f": {record['because'][:140]}" if record["because"] else ""
    return f"[{number}/{count}] {record['id']}  {record['status']}{took}{why}"
