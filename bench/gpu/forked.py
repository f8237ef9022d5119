"""The runner's side of `nursery.py`: ask it for one case after another, and start it anew where it died. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from bench.gpu import runner
from bench.gpu.case import Order, unnamed
from bench.gpu.runner import Answer

_MODULE = "bench.gpu.nursery"
_START_S = 240.0
_GRACE_S = 120.0
"""Beside a case's own time: for building its model."""
_KEPT_CHARACTERS = 2000


class Nursery:
    """Asks for cases as `runner.ask` does."""

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this does

    def start(self) -> None:
        """Start the process, and let it import while something else is done."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=runner.environment(self._uuid),
                start_new_session=True,
                bufsize=0,
            )
            self._is_ready = False

    def ask(self, order: Order, limit_s: float) -> Answer:
        """Return what a case's process says within `limit_s`; how it died, where it does not live to say anything."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        began, mark = time.monotonic(), self._end_of_said()
        try:
            if not self._is_ready:
                if self._line(_START_S) is None:
                    return self._lost(began, mark)
                self._is_ready = True
            order = Order(**{**asdict(order), "limit_s": limit_s})
            self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            found = self._line(limit_s + _GRACE_S)
        except OSError:
            found = None
        except BaseException:  # such as Ctrl-C: what was asked for is not waited for
            self.close()
            raise
        if found is None:
            return self._lost(began, mark)
        wall = time.monotonic() - began
        if "died" in found:
            how, why = found["died"]
            status, because = runner.death(why) if how == "code" else (how, why)
            told = {"said": self._told(mark)}
            return Answer(outcome={"status": status, "because": because, "phase": None, "measured": told}, wall_s=wall)
        return Answer(outcome=found, wall_s=wall)

    def _line(self, limit_s: float) -> dict[str, Any] | None:
        """Return the next line of the process; None where it does not come within `limit_s`, or at all."""
        assert self._process is not None and self._process.stdout is not None
        out, until, content = self._process.stdout, time.monotonic() + limit_s, b""
        while not content.endswith(b"\n"):
            seen, _, _ = select.select([out], [], [], max(0.0, until - time.monotonic()))
            part = os.read(out.fileno(), 1 << 16) if seen else b""
            if not part:
                return None
            content += part
        found: dict[str, Any] = json.loads(content)
        return found

    def _lost(self, began: float, mark: int) -> Answer:
        said = self._told(mark)
        self.close()
        because = "the process that forks cases did not answer"
        return Answer(
            outcome={"status": "killed", "because": because, "phase": None, "measured": {"said": said}},
            wall_s=time.monotonic() - began,
        )

    def _end_of_said(self) -> int:
        return os.fstat(self._said.fileno()).st_size

    def _told(self, mark: int) -> str:
        """Return the end of what was written to stderr since `mark`."""
        size = self._end_of_said()
        start = max(mark, size - _KEPT_CHARACTERS)
        return unnamed(os.pread(self._said.fileno(), size - start, start).decode("utf-8", "replace")).strip()

    def close(self) -> None:
        """End the process, and the fork that it may be waiting for."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            runner.end(process)
