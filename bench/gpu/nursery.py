"""Cases as forks of one process that has imported the libraries and has started no CUDA: `python -m bench.gpu.nursery`.

A process that is started anew spends most of a short case on imports. A fork has a CUDA context, an allocator and
libraries of its own just as well, since none of them was begun before it. Orders come as lines of JSON on standard
input, outcomes go as lines of JSON to standard output, one after the other.

A model's weights on the host are made here, before the fork, and serve one case after another: a fork that changes a
page has it copied. They are there twice for what makes its own copies (pinning), so that an order says whether there is
room for that.
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
    """The one pipeline that is ready for forks: its weights on meta, or on the host."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._pipe: Any = None
        self._is_filled = False

    def prepare(self, order: Order) -> float:
        """Make what a case can begin with; return the seconds that it took."""
        case, started = Case.of(order.case), time.perf_counter()
        if case.model is None or case.kind == "machine":
            self.drop()
            return 0.0
        from bench.gpu import weights
        from engine import facts

        dtype, on_card = cases.dtype_of(order), cases.is_on_card(order)
        wants = (case.model, dtype)
        if wants != self._key or (self._is_filled and (on_card or not order.shares_weights)):
            self.drop()
            self._pipe, self._key = weights.weightless(facts.find(case.model), dtype), wants
        if not on_card and order.shares_weights and not self._is_filled:
            weights.filled(self._pipe, "cpu")
            self._is_filled = True
        return time.perf_counter() - started

    def take(self) -> tuple[Any, bool]:
        """Return the pipeline, and whether its weights are there: for a fork alone, which goes on to change it."""
        return self._pipe, self._is_filled

    def drop(self) -> None:
        self._key, self._pipe, self._is_filled = None, None, False
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
            prepared_s = ready.prepare(order)
        except Exception as error:  # noqa: BLE001 - what a foreign library raises is not one class, and all of it is an answer
            ready.drop()
            outcome = Outcome()
            cases.explain(error, outcome)
            found = asdict(outcome)
        else:
            found = _forked(order, ready, looks) | {"prepared_s": round(prepared_s, 3)}
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
    outcome = cases.measure(order, ready.take())
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
