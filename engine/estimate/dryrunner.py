"""Dry runs, made by a process of their own, which is started for the first and kept for the next. No torch in here.

Torch is imported there and not here: planning starts no CUDA, what a foreign model's code does in a dry run ends with
that process, and its memory goes back when this process ends.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import errors
from engine.errors import DgRunError, ModelError
from engine.facts.model import Model
from engine.values import Request, Step

MOST_SECONDS = 600.0
"""How long one dry run may take; the longest of the catalogue takes some seconds."""

_ASKED = ("model", "height", "width", "frames", "batch", "guidance", "call")


class DryRunner:
    """A process that makes dry runs, one after another. Whoever holds `one_at_a_time` is alone with it."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            # A forked child would speak into its parent's pipes, and take the parent's answers for its own.
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Begin with no process, and with a lock that nobody holds."""
        self._process: subprocess.Popen[bytes] | None = None
        self.one_at_a_time = threading.RLock()

    def trace(
        self, model: Model, request: Request, dtype: str, changes: Sequence[Step] = (), *, is_plain: bool = False
    ) -> bytes:
        """Return the bytes of a trace, of a pipeline that `changes` were applied to; if not plain, with the VAE's ways.

        Raises: ModelError, UsageError, IncompatibleError: what the dry run has against the request.
        """
        question = json.dumps(
            {
                "model": _plain(model),
                "request": {name: getattr(request, name) for name in _ASKED},
                "dtype": dtype,
                "changes": [[s.name, dict(s.params)] for s in changes],
                "is_plain": is_plain,
            },
            default=str,
        )
        with self.one_at_a_time:
            try:
                head, content = self._asked(question.encode() + b"\n")
            except BaseException:
                # An answer that was not read to its end would be taken for the next one's. Nobody else's process is
                # ended here, since the next asker starts only after this.
                self.close()
                raise
        if "error" in head:
            raise _error(head["error"])
        return content

    def _asked(self, question: bytes) -> tuple[dict[str, Any], bytes]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(MOST_SECONDS, process.kill)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
            head: dict[str, Any] = json.loads(line) if line else {}
            content = process.stdout.read(head.get("bytes", 0))
        except OSError:
            head, content = {}, b""
        finally:
            watch.cancel()
        if not head or len(content) != head.get("bytes", 0):
            code = process.wait()
            why = f"its process ended by signal {-code}" if code < 0 else f"its process ended with code {code}"
            raise ModelError(
                "the dry run of this model did not come to its end",
                f"{why}; a dry run of more than {MOST_SECONDS:.0f} s is ended, and so is one without memory",
                "ask for a smaller size, or report this with the model's name",
            )
        return head, content

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            home = str(Path(__file__).parents[2])
            paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.dryrun.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
            atexit.register(self.close)
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.close)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _plain(model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "source": model.source,
        "pipeline_class": model.pipeline_class,
        "revision": model.revision,
        "components": {n: dataclasses.asdict(c) for n, c in model.components.items()},
        "defaults": dataclasses.asdict(model.defaults),
    }


def _error(told: dict[str, str]) -> DgRunError:
    """Return the error that the dry run ended with."""
    kind = getattr(errors, told["kind"], ModelError)
    made: DgRunError = kind(told["what"], told["why"], told["do"])
    return made
