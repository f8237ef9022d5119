"""Cases as forks of one process that has imported the libraries and has started no CUDA: `python -m bench.gpu.nursery`.

A process that is started anew spends most of a short case on imports. A fork has a CUDA context, an allocator and
libraries of its own just as well, since none of them was begun before it. Orders come as lines of JSON on standard
input, outcomes go as lines of JSON to standard output, one after the other.

A model is built here once, on meta, for the cases that follow each other. Its weights are made in each fork: pages that
a fork shares with its parent are copied when CUDA pins them for a transfer, which then takes several times as long.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.gpu import case as cases
from bench.gpu.case import Order, Outcome
from bench.gpu.matrix import Case

_CHUNK_BYTES = 1 << 16
_Looks = tuple[Callable[[], bool], Callable[[], int]]
"""torch's own `is_available` and `device_count`."""


class _Ready:
    """The one pipeline that is ready for forks, its weights on meta."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self.pipe: Any = None

    def prepare(self, order: Order) -> None:
        """Build what a case begins with."""
        case = Case.of(order.case)
        if case.model is None or case.kind == "machine":
            self.drop()
            return
        from bench.gpu import weights
        from engine import facts

        wants = case.model, cases.dtype_of(order)
        if wants != self._key:
            self.drop()
            self.pipe, self._key = weights.weightless(facts.find(case.model), wants[1]), wants

    def drop(self) -> None:
        self._key, self.pipe = None, None
        gc.collect()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    # Libraries look for cards when they are imported, and models when they are made; a fork could not use one then.
    looks = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    # Threads of OpenMP do not live on in a fork, which then waits for them for ever.
    torch.set_num_threads(1)
    _imports()
    ready = _Ready()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        try:
            ready.prepare(order)
        except Exception as error:  # noqa: BLE001 - what a foreign library raises is not one class, and all of it is an answer
            ready.drop()
            outcome = Outcome()
            cases.explain(error, outcome)
            found = asdict(outcome)
        else:
            found = _forked(order, ready, looks)
        print(json.dumps(found), file=answers, flush=True)


def _imports() -> None:
    """Import what every case imports."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import pynvml  # noqa: F401
    import transformers  # noqa: F401
    from accelerate import hooks  # noqa: F401
    from diffusers.hooks import group_offloading  # noqa: F401

    from bench.gpu import machine, phases, predict, weights  # noqa: F401
    from engine.dryrun import inputs  # noqa: F401
    from engine.run import load  # noqa: F401


def _forked(order: Order, ready: _Ready, looks: _Looks) -> dict[str, Any]:
    """Return what a fork of this process measured; how it died, where it says nothing."""
    reading, writing = os.pipe()
    gc.freeze()  # a collection in the fork would touch, and so copy, every page that holds an object
    number = os.fork()
    if number == 0:
        os.close(reading)
        code = 1
        try:
            os.setsid()
            _in_fork(order, ready, looks, writing)
            code = 0
        except BaseException:  # noqa: BLE001 - nothing may come back into the loop of the process that was forked
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    gc.unfreeze()
    os.close(writing)
    return _heard(number, reading, order.limit_s)


def _in_fork(order: Order, ready: _Ready, looks: _Looks, writing: int) -> None:
    import torch

    torch.cuda.is_available, torch.cuda.device_count = looks
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    outcome = cases.measure(order, ready.pipe)
    with os.fdopen(writing, "w", encoding="utf-8") as file:
        json.dump(asdict(outcome), file)


def _heard(number: int, reading: int, limit_s: float) -> dict[str, Any]:
    until, parts = time.monotonic() + limit_s, []
    timed_out = False
    while True:
        seen, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not seen:
            timed_out = True
            _end(number)
            break
        part = os.read(reading, _CHUNK_BYTES)
        if not part:
            break
        parts.append(part)
    os.close(reading)
    _, status = os.waitpid(number, 0)
    code = os.waitstatus_to_exitcode(status)
    if timed_out:
        return {"died": ["timeout", f"it was ended after {limit_s:.0f} s"]}
    try:
        found: dict[str, Any] = json.loads(b"".join(parts))
    except ValueError:
        return {"died": ["code", code]}
    return found


def _end(number: int) -> None:
    """End a fork, and whatever it has started."""
    for send in (os.killpg, os.kill):
        try:
            send(number, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
        return


if __name__ == "__main__":
    main()
